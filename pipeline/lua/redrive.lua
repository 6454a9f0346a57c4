#!lua
-- Redrive: dead letters go back into the log, each in a frame addressed to the stream that gave it up, in the same step in
-- which they cease to be dead. One that is no longer dead (somebody was faster) is passed over.
--
-- KEYS  1 head   2 prefix of segments   3 sealed segments   4 prefix of dead letters   5 prefix of their order
--       6 prefix of checkpoints   7 events sent again
-- ARGV  1 now ms   2 segment bytes   3 segment ms, then for each letter: stream   its bit   id   source   record
-- Answer: for each letter 1 or 0
-- include _append
open_head(tonumber(ARGV[1]), KEYS[2])
local answer = {}
for arg = 4, #ARGV, 5 do
  local stream, bit, id, source, record = ARGV[arg], tonumber(ARGV[arg + 1]), ARGV[arg + 2], ARGV[arg + 3], ARGV[arg + 4]
  local raw = redis.call('HGET', KEYS[4] .. stream, id)
  local was_dead = redis.call('HDEL', KEYS[4] .. stream, id)
  if was_dead == 1 then
    redis.call('ZREM', KEYS[5] .. stream, id)
    redis.call('HINCRBY', KEYS[6] .. stream, 'dead', -1)
    make_room(64 + #source + #record, tonumber(ARGV[2]), tonumber(ARGV[3]), KEYS[3])
    local place = string.format('%.0f', (seg * 16777216 + off) * 8192)
    local letter, past = cjson.decode(raw or '{}'), redis.call('HGET', KEYS[7], '<' .. id)
    local kept = {id = id, attempts = letter.attempts, first_at = letter.first_at, received_at = letter.received_at}
    if past then
      past = cjson.decode(past)
      kept.attempts, kept.first_at, kept.received_at = kept.attempts + past.attempts, past.first_at, past.received_at
    end
    redis.call('HSET', KEYS[7], id, place, '<' .. stream .. '-' .. place, cjson.encode(kept))
    append(KEYS[2], bit + REDRIVE, source, 1, struct.pack('<I4', 0) .. record)
  end
  answer[#answer + 1] = was_dead
end
save_head()
return answer
