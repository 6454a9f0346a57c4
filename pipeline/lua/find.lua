#!lua flags=allow-oom,no-writes
-- Find: fields by the first of several hashes that has them, in one trip; hashes that are further on are asked for the rest alone.
--
-- KEYS hashes   ARGV fields
-- Answer: for each field its value, or nil
local answer, absent = {}, {}
for i = 1, #ARGV do
  answer[i], absent[i] = false, i
end
for _, key in ipairs(KEYS) do
  if #absent == 0 then break end
  local fields, still = {}, {}
  for i, at in ipairs(absent) do fields[i] = ARGV[at] end
  for i, value in ipairs(redis.call('HMGET', key, unpack(fields))) do
    if value then answer[absent[i]] = value else still[#still + 1] = absent[i] end
  end
  absent = still
end
return answer
