#!lua flags=allow-oom
-- Seal: close the open segment before it is full, so that it can be let go of: with few events in a small memory it is all
-- there is. Only where every stream has read all of it: a segment goes as a whole.
--
-- KEYS  1 head   2 prefix of segments   3 sealed segments   4 owner   5 prefix of checkpoints
-- ARGV  1 epoch, then the streams
-- Answer: the streams that have yet to read some of it; without any it is sealed, or there was nothing in it
-- include _append
if redis.call('HGET', KEYS[4], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
open_head(0, KEYS[2])
local behind = {}
for i = 2, #ARGV do
  local at = redis.call('HMGET', KEYS[5] .. ARGV[i], 'segment', 'offset')
  if off > 0 and (tonumber(at[1] or 1) < seg or tonumber(at[2] or 0) < off) then behind[#behind + 1] = ARGV[i] end
end
if off > 0 and #behind == 0 then
  make_room(0, 0, 0, KEYS[3])
  save_head()
end
return behind
