#!lua flags=allow-oom
-- Commit: what streams write and the checkpoint that covers it, as one atomic step, refused once the lease is lost.
-- allow-oom, so that a backlog drains while ingest already refuses.
--
-- KEYS 1 owner
-- ARGV 1 epoch, 2 the commands
-- include _commands
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
carry_out(ARGV[2])
return 'OK'
