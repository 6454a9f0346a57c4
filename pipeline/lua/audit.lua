#!lua flags=allow-oom,no-writes
-- Audit: one consistent look at the log's head and every stream's account.
-- Pending is counted from the log's own positions (the head's running count less the one in the frame header at the
-- checkpoint), never by subtracting what was processed. Where no header stands there the log is damaged: then it is the
-- count in the next sound one, less the events in between, which every stream will give up.
--
-- KEYS 1 head   2 prefix of segments   3 prefix of checkpoints   4 owner
-- ARGV streams in the order of their bits
-- Answer: {head, owner (flat hash), the store's clock (ms), then for each stream {processed, dead, at, pending, segment, offset, index, ordinal}}
local HEAD = '<I8I8I8I8I8I8I8I8'
local head = redis.call('GET', KEYS[1])
local time = redis.call('TIME')
local answer = {head or '', redis.call('HGETALL', KEYS[4]), time[1] * 1000 + math.floor(time[2] / 1000)}
local totals, seg_head, off_head, ordinal_head = {0, 0, 0, 0, 0}, 1, 0, 0
if head then
  seg_head, off_head, ordinal_head, totals[1], totals[2], totals[3], totals[4], totals[5] = struct.unpack(HEAD, head)
end

-- Of the header at the start of some bytes: addressees, the frame's ordinal and the counts before it; nil where none is.
local function header(raw, any_version)
  if #raw < 57 then return end
  local magic, version, to, n, size, _, ordinal, c0, c1, c2, c3, c4, source = struct.unpack('<c2BBI2I4I8I8I6I6I6I6I6B', raw)
  if magic == 'NX' and (version == 1 or any_version) and source + 4 * n <= size then
    return to, ordinal, {c0, c1, c2, c3, c4}
  end
end

-- The ordinal and the counts of the first sound header behind an address; the log's end where none follows.
local function behind(seg, off, least)
  while seg <= seg_head do
    local key = KEYS[2] .. string.format('%d', seg)
    local size = redis.call('STRLEN', key)
    while off + 57 <= size do
      local chunk = redis.call('GETRANGE', key, off, off + 1048575)
      local at = string.find(chunk, 'NX', 1, true)
      while at do
        local _, ordinal, counts = header(string.sub(chunk, at, at + 56))
        if counts and ordinal >= least and ordinal <= ordinal_head then return ordinal, counts end
        at = string.find(chunk, 'NX', at + 1, true)
      end
      off = off + #chunk - 56
    end
    seg = seg + 1; off = 0
  end
  return ordinal_head, totals
end

for i, stream in ipairs(ARGV) do
  local row = redis.call('HMGET', KEYS[3] .. stream, 'processed', 'dead', 'at', 'segment', 'offset', 'index', 'ordinal')
  local seg, off, index = tonumber(row[4] or 1), tonumber(row[5] or 0), tonumber(row[6] or 0)
  while seg < seg_head and off >= redis.call('STRLEN', KEYS[2] .. string.format('%d', seg)) do
    seg = seg + 1; off = 0
  end
  local before = totals[i]
  if seg < seg_head or (seg == seg_head and off < off_head) then
    local to, _, counts = header(redis.call('GETRANGE', KEYS[2] .. string.format('%d', seg), off, off + 56), true)
    if not counts then
      local upto, reached = nil, tonumber(row[7] or 0)
      upto, counts = behind(seg, off + 1, reached)
      before = counts[i] - (upto - reached)
    else
      before = counts[i]
      if to < 32 and math.floor(to / 2 ^ (i - 1)) % 2 == 1 then before = before + index end
    end
  end
  answer[#answer + 1] = {tonumber(row[1] or 0), tonumber(row[2] or 0), tonumber(row[3] or 0), totals[i] - before,
    seg, off, index, tonumber(row[7] or 0)}
end
return answer
