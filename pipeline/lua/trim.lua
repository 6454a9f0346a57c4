#!lua flags=allow-oom
-- Trim: let go of the oldest segment and its index, unless a stream has yet to read it. From then on its events are no
-- longer retained; the segment itself stays until forget.lua has dropped their ids, so that a crash in between leaves
-- no event in the log whose id can be taken again.
--
-- KEYS 1 head   2 owner   3 sealed segments   4 spans   5 prefix of segments   6 prefix of rows   7 prefix of checkpoints
-- ARGV 1 epoch   2 segment, then the streams
-- Answer: 1, or 0 where it is not the oldest sealed one or is still needed
if redis.call('HGET', KEYS[2], 'epoch') ~= ARGV[1] then
  return redis.error_reply('FENCED another writer holds the lease')
end
local raw, segment = redis.call('GET', KEYS[1]), tonumber(ARGV[2])
if not raw then return 0 end
local open = struct.unpack('<I8', raw)
local first = struct.unpack('<I8', raw, 8 * 17 + 1)
if segment ~= first or segment >= open then return 0 end
local length = redis.call('STRLEN', KEYS[5] .. ARGV[2])
for i = 3, #ARGV do
  local at = redis.call('HMGET', KEYS[7] .. ARGV[i], 'segment', 'offset')
  local reading = tonumber(at[1] or 1)
  if reading < segment or (reading == segment and tonumber(at[2] or 0) < length) then return 0 end
end
redis.call('UNLINK', KEYS[6] .. ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('HDEL', KEYS[4], ARGV[2])
redis.call('SETRANGE', KEYS[1], 8 * 17, struct.pack('<I8', segment + 1))
return 1
