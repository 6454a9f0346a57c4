#!lua flags=allow-oom
-- Lease: who may commit. Taking it raises the epoch, which fences off every earlier holder; renewing keeps the epoch.
-- `raise` is taking it again as its holder, against commits of one's own that are still on their way.
--
-- KEYS 1 owner
-- ARGV 1 action (take, seize, raise, renew, release)   2 holder   3 now ms; 0 for the store's own clock, the one that all
--      instances share   4 ttl ms   5 epoch (raise, renew, release)
-- Answer: the epoch held, or 0
local epoch = tonumber(redis.call('HGET', KEYS[1], 'epoch') or 0)
local expires = tonumber(redis.call('HGET', KEYS[1], 'expires') or 0)
local action, holder, now, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if now == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end
if action == 'renew' then
  if epoch == 0 or string.format('%d', epoch) ~= ARGV[5] then return 0 end  -- nobody holds what was emptied
  redis.call('HSET', KEYS[1], 'expires', string.format('%d', now + ttl))
  return epoch
end
if action == 'release' then
  if string.format('%d', epoch) == ARGV[5] then redis.call('HSET', KEYS[1], 'expires', '0') end
  return epoch
end
if action == 'raise' and string.format('%d', epoch) ~= ARGV[5] then return 0 end
-- A lease that would run out much later than a full term from now was written by a clock that has since been set back.
if action == 'take' and now < expires and expires - now <= 2 * ttl then return 0 end
-- Not counted from 1: in a store that was emptied a writer of before must not find its own epoch again.
local raised = math.max(epoch + 1, now)
redis.call('HSET', KEYS[1], 'epoch', string.format('%d', raised), 'holder', holder, 'expires', string.format('%d', now + ttl))
return raised
