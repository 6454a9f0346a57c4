#!lua flags=allow-oom,no-writes
-- Fetch: single events by place, each without its whole frame. place is a frame's address and the index in it.
--
-- KEYS 1 prefix of segments   ARGV for each place frame address, index
-- Answer: for each place {received ms, source, record, ordinal, to} or {} where the log no longer reaches
local answer = {}
for i = 1, #ARGV / 2 do
  local address, index = tonumber(ARGV[2 * i - 1]), tonumber(ARGV[2 * i])
  local off = address % 16777216
  local key = KEYS[1] .. string.format('%d', (address - off) / 16777216)
  local row = {}
  local header = redis.call('GETRANGE', key, off, off + 56)
  if #header == 57 then
    local magic, version, to, n, size, received, ordinal, _, _, _, _, _, source_size = struct.unpack('<c2BBI2I4I8I8I6I6I6I6I6B', header)
    if magic == 'NX' and version == 1 and index < n then
      local start = off + 57 + source_size
      local table_part = redis.call('GETRANGE', key, start + 4 * index, start + 4 * index + 7)
      local from = struct.unpack('<I4', table_part)
      local upto = size - source_size - 4 * n
      if index + 1 < n then upto = struct.unpack('<I4', table_part, 5) end
      local records = start + 4 * n
      row = {received, redis.call('GETRANGE', key, off + 57, off + 56 + source_size),
        redis.call('GETRANGE', key, records + from, records + upto - 1), ordinal + index, to}
      if source_size == 0 then row[2] = '' end
    end
  end
  answer[i] = row
end
return answer
