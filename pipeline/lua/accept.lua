#!lua
-- Accept: the one atomic step that takes events into the log.
-- Drops the ids that are known already, appends each frame to the open segment, counts, and answers with places.
-- No allow-oom flag: at the store's memory limit it fails before its first write, so nothing is half-taken.
--
-- KEYS  1 head   2 prefix of segments   3 the id table   4 sealed segments   5 the last answer to this sender
-- ARGV  1 now ms   2 rejected by validation   3 segment bytes   4 segment ms   5 the sender's number of this request
--       6 frames, then for each frame:
--       to (bit mask of streams, +32 canary)   source   n (at most 5,000)   digests (10 bytes each)   offset table and records
--       last the deadline: ms by the store's own clock, 0 for none. A store that was stalled comes to a request whose sender
--       has long been told no.
-- A request that comes again, since its answer was lost on its way, gets that answer.
-- Answer: for each frame {address, first ordinal, events taken, arrival ms, indexes (from 0) of duplicates...}
-- include _append
local ANSWER_KEPT_S = 60  -- the sender asks again within seconds
local MOST = 6000  -- words that Lua hands on at once (its stack takes 8,000), even: fields stay with their values

local number, past, latest = tonumber(ARGV[5]), redis.call('GET', KEYS[5]), 0
if past then latest = struct.unpack('<I8', past) end
if number == latest then return cmsgpack.unpack(string.sub(past, 9)) end
local deadline, time = tonumber(ARGV[#ARGV]), redis.call('TIME')
if number < latest or deadline > 0 and time[1] * 1000 + time[2] / 1000 > deadline then
  return redis.error_reply('LATE the store came to it too late; nothing was taken')
end
open_head(tonumber(ARGV[1]), KEYS[2])
rejected = rejected + tonumber(ARGV[2])
local segment_bytes, segment_ms = tonumber(ARGV[3]), tonumber(ARGV[4])

-- An offset table and records without some of the n events.
local function without(packed, n, dropped)
  local offsets, records, at = {}, {}, 0
  for i = 1, n do
    if not dropped[i] then
      local from, upto = struct.unpack('<I4', packed, 4 * i - 3), #packed - 4 * n
      if i < n then upto = struct.unpack('<I4', packed, 4 * i + 1) end
      offsets[#offsets + 1] = struct.pack('<I4', at)
      records[#records + 1] = string.sub(packed, 4 * n + from + 1, 4 * n + upto)
      at = at + upto - from
    end
  end
  return table.concat(offsets) .. table.concat(records)
end

local answer, arg = {}, 7
for _ = 1, tonumber(ARGV[6]) do
  local to, source, n, joined, packed = tonumber(ARGV[arg]), ARGV[arg + 1], tonumber(ARGV[arg + 2]), ARGV[arg + 3], ARGV[arg + 4]
  make_room(64 + #source + #packed, segment_bytes, segment_ms, KEYS[4])
  local address = seg * 16777216 + off
  local verdict = {string.format('%d', address), ordinal, 0, string.format('%d', last)}
  local digests, dropped, taken, words = {struct.unpack(string.rep('c10', n), joined)}, {}, {}, {}
  digests[n + 1] = nil  -- where it ended
  local found, count = n > 0 and redis.call('HMGET', KEYS[3], unpack(digests)), 0
  for i = 1, n do
    local digest = digests[i]
    if found[i] or taken[digest] then
      dropped[i] = true
      verdict[#verdict + 1] = i - 1
    else
      taken[digest] = true
      words[2 * count + 1], words[2 * count + 2] = digest, struct.pack('<I6I2', address, count)
      count = count + 1
    end
  end
  for at = 1, #words, MOST do redis.call('HSET', KEYS[3], unpack(words, at, math.min(at + MOST - 1, #words))) end
  verdict[3] = count
  ids, duplicates = ids + count, duplicates + n - count
  if count > 0 then append(KEYS[2], to, source, count, count < n and without(packed, n, dropped) or packed) end
  answer[#answer + 1] = verdict
  arg = arg + 5
end
save_head()
redis.call('SET', KEYS[5], struct.pack('<I8', number) .. cmsgpack.pack(answer), 'EX', ANSWER_KEPT_S)
return answer
