#!lua flags=allow-oom
-- Commit: what streams write and the checkpoint that covers it, as one atomic step, refused once the lease is lost.
-- allow-oom, so that a backlog drains while ingest already refuses.
--
-- KEYS 1 owner
-- ARGV 1 epoch, 2 the commands: of each the number of its words, then each word behind its length (all numbers u32)
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
local commands, at, count, formats = ARGV[2], 1, nil, {}
while at <= #commands do
  count, at = struct.unpack('<I4', commands, at)
  if not formats[count] then formats[count] = '<' .. string.rep('I4c0', count) end
  local words = {struct.unpack(formats[count], commands, at)}
  at = words[count + 1]
  redis.call(unpack(words, 1, count))
end
return 'OK'
