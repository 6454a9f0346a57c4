#!lua flags=allow-oom,no-writes
-- Vectors: the Python service's features of users, whichever form they were written in, and Nexus's tiles of some, in one trip.
--
-- KEYS partner keys, then hashes of tiles   ARGV 1 how many partner keys
-- Answer: for each partner key a string, a flat hash, {error} or nil; for each other key its flat hash
local answer, partners = {}, tonumber(ARGV[1])
for i, key in ipairs(KEYS) do
  if i > partners then
    answer[i] = redis.call('HGETALL', key)
  else
    local value = redis.pcall('GET', key)
    if type(value) == 'table' and value.err then
      value = redis.pcall('HGETALL', key)
      if value.err then value = {value.err} end
    end
    answer[i] = value
  end
end
return answer
