#!lua
-- Accept: the one atomic step that takes events into the log.
-- Drops the ids that are known already, appends each frame to the open segment, counts, and answers with places.
-- No allow-oom flag: at the store's memory limit it fails before its first write, so nothing is half-taken.
--
-- KEYS  1 head   2 prefix of segments   3 prefix of id buckets   4 sealed segments   5 the last answer to this sender
-- ARGV  1 now ms   2 rejected by validation   3 segment bytes   4 segment ms   5 the sender's number of this request
--       6 frames, then for each frame:
--       to (bit mask of streams, +32 canary)   source   n   digests (10 bytes each)   n records; last the deadline: ms by
--       the store's own clock, 0 for none. A store that was stalled comes to a request whose sender has long been told no.
-- A request that comes again, since its answer was lost on its way, gets that answer.
-- Answer: for each frame {address, first ordinal, events taken, arrival ms, indexes (from 0) of duplicates...}
-- include _append
local ANSWER_KEPT_S = 60  -- the sender asks again within seconds
local BUCKET_FILL = 48  -- mean ids a bucket holds: far enough below 128 that no bucket leaves the compact encoding

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

-- Linear hashing: `buckets` is the round's size (a power of two), buckets below `split` have been divided already.
local function bucket_of(digest)
  local h = struct.unpack('<I4', digest)
  local b = h % buckets
  if b < split then b = h % (buckets * 2) end
  return KEYS[3] .. b
end

local function grow()
  local flat = redis.call('HGETALL', KEYS[3] .. split)
  local moved, gone = {}, {}
  for i = 1, #flat, 2 do
    if struct.unpack('<I4', flat[i]) % (buckets * 2) ~= split then
      moved[#moved + 1] = flat[i]
      moved[#moved + 1] = flat[i + 1]
      gone[#gone + 1] = flat[i]
    end
  end
  if #gone > 0 then
    redis.call('HSET', KEYS[3] .. (split + buckets), unpack(moved))
    redis.call('HDEL', KEYS[3] .. split, unpack(gone))
  end
  split = split + 1
  if split == buckets then
    buckets = buckets * 2
    split = 0
  end
end

local answer, arg = {}, 7
for _ = 1, tonumber(ARGV[6]) do
  local to, source, n, digests = tonumber(ARGV[arg]), ARGV[arg + 1], tonumber(ARGV[arg + 2]), ARGV[arg + 3]
  local size = 64 + #source
  for i = 1, n do size = size + #ARGV[arg + 3 + i] + 4 end
  make_room(size, segment_bytes, segment_ms, KEYS[4])
  local address = seg * 16777216 + off
  local records = {}
  local verdict = {string.format('%d', address), ordinal, 0, string.format('%d', last)}
  for i = 1, n do
    local digest = string.sub(digests, i * 10 - 9, i * 10)
    if redis.call('HSETNX', bucket_of(digest), digest, struct.pack('<I6I2', address, #records)) == 1 then
      records[#records + 1] = ARGV[arg + 3 + i]
      ids = ids + 1
      if ids > (buckets + split) * BUCKET_FILL then grow() end
    else
      verdict[#verdict + 1] = i - 1
    end
  end
  verdict[3] = #records
  duplicates = duplicates + n - #records
  if #records > 0 then append(KEYS[2], to, source, records) end
  answer[#answer + 1] = verdict
  arg = arg + 4 + n
end
save_head()
redis.call('SET', KEYS[5], struct.pack('<I8', number) .. cmsgpack.pack(answer), 'EX', ANSWER_KEPT_S)
return answer
