-- Shared by the scripts that append to the log: the head (the log's end and counters) and one way to append a frame.
local HEAD = '<I8I8I8I8I8I8I8I8I8I8I8I8I8I8I8I8I8I8'
local seg, off, ordinal, c0, c1, c2, c3, c4 = 1, 0, 0, 0, 0, 0, 0, 0
local accepted, bridge_only, duplicates, rejected, ids, opened, newest, first = 0, 0, 0, 0, 0, 0, 0, 1
local last = 0  -- the arrival of what comes now; newest: that of what is in the log already
local buckets, split = 0, 0  -- of an id table of before (move_ids.lua)
local CANARY, REDRIVE = 32, 64

local function open_head(now, segments)
  local raw = redis.call('GET', KEYS[1])
  if raw then
    seg, off, ordinal, c0, c1, c2, c3, c4, accepted, bridge_only, duplicates, rejected, ids, buckets, split, opened, newest, first =
      struct.unpack(HEAD, raw)
  end
  last = math.max(now, newest)  -- arrival never runs backwards, whatever the clock does
  off = redis.call('STRLEN', segments .. string.format('%d', seg))  -- not what the head says: the segment itself decides
end

local function save_head()
  redis.call('SET', KEYS[1], struct.pack(HEAD, seg, off, ordinal, c0, c1, c2, c3, c4,
    accepted, bridge_only, duplicates, rejected, ids, buckets, split, opened, newest, first))
end

-- Make room for `size` more bytes: seals the open segment where it is full or old.
local function make_room(size, segment_bytes, segment_ms, sealed)
  if off > 0 and (off + size > segment_bytes or last - opened >= segment_ms) then
    redis.call('HSET', sealed, string.format('%d', seg), struct.pack('<I8I8I8I8', opened, newest, off, ordinal))
    seg = seg + 1
    off = 0
  end
  if off == 0 then opened = last end
end

-- Append one frame of n events. packed: their offset table and records, as frames.pack made it. to: bit mask of streams,
-- +32 canary (counts nowhere), +64 sent again (was accepted before).
local function append(segments, to, source, n, packed)
  local header = struct.pack('<c2BBI2I4I8I8I6I6I6I6I6B', 'NX', 1, to, n, #source + #packed, last, ordinal, c0, c1, c2, c3, c4, #source)
  local segment = segments .. string.format('%d', seg)
  redis.call('APPEND', segment, header .. source)
  off = redis.call('APPEND', segment, packed)  -- not joined to the header before: Lua hashes every string that it makes
  ordinal, newest = ordinal + n, last
  if math.floor(to / CANARY) % 2 == 1 then return end
  if to % 2 >= 1 then c0 = c0 + n end
  if to % 4 >= 2 then c1 = c1 + n end
  if to % 8 >= 4 then c2 = c2 + n end
  if to % 16 >= 8 then c3 = c3 + n end
  if to % 32 >= 16 then c4 = c4 + n end
  if to >= REDRIVE then return end
  if to == 16 then bridge_only = bridge_only + n else accepted = accepted + n end
end
