-- Shared by the scripts that carry out commands packed as one word (checkpoints.pack): of each the number of its words, then
-- each word behind its length (all numbers u32).

-- HSETNX of many fields, none of them named twice: those that are not there yet.
local function set_new(words, count)
  local fields, new = {}, {}
  for i = 3, count, 2 do fields[#fields + 1] = words[i] end
  for i, value in ipairs(redis.call('HMGET', words[2], unpack(fields))) do
    if not value then new[#new + 1], new[#new + 2] = fields[i], words[2 * i + 2] end
  end
  if #new > 0 then redis.call('HSET', words[2], unpack(new)) end
end

local function carry_out(commands)
  local at, count, formats = 1, nil, {}
  while at <= #commands do
    count, at = struct.unpack('<I4', commands, at)
    if not formats[count] then formats[count] = '<' .. string.rep('I4c0', count) end
    local words = {struct.unpack(formats[count], commands, at)}
    at = words[count + 1]
    if words[1] == 'HSETNX' and count > 4 then set_new(words, count) else redis.call(unpack(words, 1, count)) end
  end
end
