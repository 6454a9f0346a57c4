#!lua flags=allow-oom
-- Commit: what streams write and the checkpoint that covers it, as one atomic step, refused once the lease is lost.
-- allow-oom, so that a backlog drains while ingest already refuses.
--
-- KEYS 1 owner
-- ARGV 1 epoch, then commands, each as its number of words and the words
local MOST = 6000  -- words that Lua hands on at once (its stack takes 8,000), a multiple of 2: fields stay with their values
if redis.call('HGET', KEYS[1], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
local i, count = 2, #ARGV
while i <= count do
  local last = i + tonumber(ARGV[i])
  if last - i <= MOST then
    redis.call(unpack(ARGV, i + 1, last))
  else  -- HSET, HDEL, ZADD, LPUSH ... all take a key and then as many as one likes
    for at = i + 3, last, MOST do
      redis.call(ARGV[i + 1], ARGV[i + 2], unpack(ARGV, at, math.min(at + MOST - 1, last)))
    end
  end
  i = last + 1
end
return 'OK'
