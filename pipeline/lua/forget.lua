#!lua flags=allow-oom
-- Forget: drop the ids of events whose segment was let go of by trim.lua; with the last of them the segment itself.
--
-- KEYS 1 head   2 prefix of id buckets   3 owner   4 the segment, with the last ids
-- ARGV 1 epoch, then digest, place ...
if redis.call('HGET', KEYS[3], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
local raw = redis.call('GET', KEYS[1])
local ids, buckets, split = struct.unpack('<I8I8I8', raw, 8 * 12 + 1)
for i = 2, #ARGV, 2 do
  local h = struct.unpack('<I4', ARGV[i])
  local b = h % buckets
  if b < split then b = h % (buckets * 2) end
  local key = KEYS[2] .. b
  if redis.call('HGET', key, ARGV[i]) == ARGV[i + 1] then
    redis.call('HDEL', key, ARGV[i])
    ids = ids - 1
  end
end
redis.call('SETRANGE', KEYS[1], 8 * 12, struct.pack('<I8', ids))
if KEYS[4] then redis.call('UNLINK', KEYS[4]) end
return ids
