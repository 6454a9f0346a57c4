#!lua flags=allow-oom
-- Move ids: those that earlier versions kept in buckets, by linear hashing, into the one id table; the last bucket first, so
-- that a move that was broken off goes on where it stood.
--
-- KEYS 1 head   2 the id table   3 prefix of buckets   ARGV how many buckets at most
-- Answer: how many buckets are left
local raw = redis.call('GET', KEYS[1])
if not raw then return 0 end
local buckets, split = struct.unpack('<I8I8', raw, 8 * 13 + 1)
local left = buckets + split
for _ = 1, math.min(left, tonumber(ARGV[1])) do
  left = left - 1
  local bucket = KEYS[3] .. string.format('%d', left)
  local flat = redis.call('HGETALL', bucket)
  if #flat > 0 then redis.call('HSET', KEYS[2], unpack(flat)) end
  redis.call('DEL', bucket)
end
redis.call('SETRANGE', KEYS[1], 8 * 13, struct.pack('<I8I8', left, 0))
return left
