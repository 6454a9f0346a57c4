#!lua flags=allow-oom
-- Publish: public feature values, written only by the holder of the lease, so that an older writer never replaces a newer one's.
--
-- KEYS 1 owner   ARGV 1 epoch, then key, value ...
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
for i = 2, #ARGV, 2 do redis.call('SET', ARGV[i], ARGV[i + 1]) end
return 'OK'
