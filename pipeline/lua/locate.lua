#!lua flags=allow-oom,no-writes
-- Locate: the places of event ids, from the id table (see accept.lua for its linear hashing).
--
-- KEYS 1 head   2 prefix of id buckets   ARGV digests
-- Answer: for each digest its place as accept.lua packed it, or ''
local head = redis.call('GET', KEYS[1])
local answer = {}
local buckets, split
if head then buckets, split = struct.unpack('<I8I8', head, 8 * 13 + 1) end
for i, digest in ipairs(ARGV) do
  answer[i] = ''
  if head then
    local h = struct.unpack('<I4', digest)
    local b = h % buckets
    if b < split then b = h % (buckets * 2) end
    answer[i] = redis.call('HGET', KEYS[2] .. string.format('%d', b), digest) or ''
  end
end
return answer
