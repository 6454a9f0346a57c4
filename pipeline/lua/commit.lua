#!lua flags=allow-oom
-- Commit: what streams write and the checkpoint that covers it, as one atomic step, refused once the lease is lost.
-- allow-oom, so that a backlog drains while ingest already refuses.
--
-- KEYS 1 owner
-- ARGV 1 epoch, then commands, each as its number of words and the words
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
local i, count = 2, #ARGV
while i <= count do
  local words = tonumber(ARGV[i])
  redis.call(unpack(ARGV, i + 1, i + words))
  i = i + words + 1
end
return 'OK'
