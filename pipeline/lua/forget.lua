#!lua flags=allow-oom
-- Forget: drop the ids of events whose segment was let go of by trim.lua; with the last of them the segment itself.
--
-- KEYS 1 head   2 the id table   3 owner   4 the segment, with the last ids
-- ARGV 1 epoch, then digest, place ...
if redis.call('HGET', KEYS[3], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
local digests, known = {}, {}
for i = 2, #ARGV, 2 do digests[#digests + 1] = ARGV[i] end
if #digests > 0 then
  for i, place in ipairs(redis.call('HMGET', KEYS[2], unpack(digests))) do
    if place == ARGV[2 * i + 1] then known[#known + 1] = digests[i] end
  end
end
local ids = struct.unpack('<I8', redis.call('GET', KEYS[1]), 8 * 12 + 1)
if #known > 0 then
  ids = ids - redis.call('HDEL', KEYS[2], unpack(known))
  redis.call('SETRANGE', KEYS[1], 8 * 12, struct.pack('<I8', ids))
end
if KEYS[4] then redis.call('UNLINK', KEYS[4]) end
return ids
