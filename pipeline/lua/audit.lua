#!lua flags=allow-oom,no-writes
-- Audit: one consistent look at the log's head and every stream's account.
-- Pending is counted from the log's own positions (the head's running count less the one in the frame header at the
-- checkpoint), never by subtracting what was processed.
--
-- KEYS 1 head   2 prefix of segments   3 prefix of checkpoints   4 owner
-- ARGV streams in the order of their bits
-- Answer: {head, owner (flat hash), the store's clock (ms), then for each stream {processed, dead, at, pending, segment, offset, index, ordinal}}
local HEAD = '<I8I8I8I8I8I8I8I8'
local head = redis.call('GET', KEYS[1])
local time = redis.call('TIME')
local answer = {head or '', redis.call('HGETALL', KEYS[4]), time[1] * 1000 + math.floor(time[2] / 1000)}
local totals, seg_head, off_head = {0, 0, 0, 0, 0}, 1, 0
if head then
  local ordinal
  seg_head, off_head, ordinal, totals[1], totals[2], totals[3], totals[4], totals[5] = struct.unpack(HEAD, head)
end
for i, stream in ipairs(ARGV) do
  local row = redis.call('HMGET', KEYS[3] .. stream, 'processed', 'dead', 'at', 'segment', 'offset', 'index', 'ordinal')
  local seg, off, index = tonumber(row[4] or 1), tonumber(row[5] or 0), tonumber(row[6] or 0)
  while seg < seg_head and off >= redis.call('STRLEN', KEYS[2] .. string.format('%d', seg)) do
    seg = seg + 1; off = 0
  end
  local before = totals[i]
  if seg < seg_head or (seg == seg_head and off < off_head) then
    local raw = redis.call('GETRANGE', KEYS[2] .. string.format('%d', seg), off, off + 56)
    if #raw == 57 then
      local _, _, to, n, _, _, _, c0, c1, c2, c3, c4 = struct.unpack('<c2BBI2I4I8I8I6I6I6I6I6', raw)
      local counts = {c0, c1, c2, c3, c4}
      before = counts[i]
      if to < 32 and math.floor(to / 2 ^ (i - 1)) % 2 == 1 then before = before + index end
    end
  end
  answer[#answer + 1] = {tonumber(row[1] or 0), tonumber(row[2] or 0), tonumber(row[3] or 0), totals[i] - before,
    seg, off, index, tonumber(row[7] or 0)}
end
return answer
