-- One batch of events, whole or not at all: streams, VWAP, candles, unique symbols, and the mark of its writer.
--
-- KEYS     every key that is touched, the writer's mark first
-- ARGV[1]  msgpack: {seq, mark_ttl, streams, vwaps, candles, uniques}
--          streams   {maxlen, ttl, {key, {id, ...}, {field value ..., ...}} ...}
--          vwaps     {ttl, {key, price_sum, volume_sum, count, last_update} ...}
--          candles   {ttl, {key, count, volume, buy_volume, max_size, price_total, notional} ...}
--          uniques   {ttl, key, {symbol, ...}}
--          where key is an index into KEYS
-- returns  {late, trimmed}: events that came late, events that MAXLEN pushed out; {0, 0} for a repeated batch

local seq, mark_ttl, streams, vwaps, candles, uniques = unpack(cmsgpack.unpack(ARGV[1]))
local call, format = redis.call, string.format

local last = call('HGET', KEYS[1], 'seq')
if last and tonumber(last) >= seq then return {0, 0} end

-- The shortest text that reads back as the same double: a hash keeps numbers as text, and every byte is paid for.
local function text(x)
  local s = format('%.15g', x)
  if tonumber(s) ~= x then s = format('%.17g', x) end
  return s
end

local late, trimmed = 0, 0
for i = 3, #streams do
  local key, ids, rows = KEYS[streams[i][1]], streams[i][2], streams[i][3]
  local top = call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  local top_ms, top_seq = -1, -1
  if top then
    local ms, n = string.match(top[1], '(%d+)-(%d+)')
    top_ms, top_seq = tonumber(ms), tonumber(n)
  end
  for j = 1, #ids do
    local id, row = ids[j], rows[j]
    if top_ms >= 0 then
      local ms = tonumber(string.match(id, '%d+'))
      if ms > top_ms then
        top_ms = -1 -- the rest of the batch is newer still: its own IDs stand
      else
        -- A stream only grows at its end, so a late event takes the next free ID there and carries its own time.
        top_seq = top_seq + 1
        id = format('%.0f-%.0f', top_ms, top_seq)
        if ms < top_ms then
          row[#row + 1] = 't'
          row[#row + 1] = format('%.0f', ms)
          late = late + 1
        end
      end
    end
    call('XADD', key, id, unpack(row))
  end
  trimmed = trimmed + call('XTRIM', key, 'MAXLEN', '~', streams[1])
  call('EXPIRE', key, streams[2])
end

for i = 2, #vwaps do
  local v = vwaps[i]
  local key = KEYS[v[1]]
  local old = call('HMGET', key, 'price_sum', 'volume_sum', 'count', 'last_update')
  call('HSET', key,
    'price_sum', text(v[2] + (tonumber(old[1]) or 0)),
    'volume_sum', text(v[3] + (tonumber(old[2]) or 0)),
    'count', format('%.0f', v[4] + (tonumber(old[3]) or 0)),
    'last_update', format('%.0f', math.max(v[5], tonumber(old[4]) or 0)))
  call('EXPIRE', key, vwaps[1])
end

for i = 2, #candles do
  local c = candles[i]
  local key = KEYS[c[1]]
  local old = call('HMGET', key, 'count', 'volume', 'buy_volume', 'max_size', 'price_total', 'notional')
  call('HSET', key,
    'count', format('%.0f', c[2] + (tonumber(old[1]) or 0)),
    'volume', text(c[3] + (tonumber(old[2]) or 0)),
    'buy_volume', text(c[4] + (tonumber(old[3]) or 0)),
    'max_size', text(math.max(c[5], tonumber(old[4]) or 0)),
    'price_total', text(c[6] + (tonumber(old[5]) or 0)),
    'notional', text(c[7] + (tonumber(old[6]) or 0)))
  call('EXPIRE', key, candles[1])
end

local unique = KEYS[uniques[2]]
for i = 1, #uniques[3], 1000 do -- unpack has room for about 8,000 values
  call('PFADD', unique, unpack(uniques[3], i, math.min(i + 999, #uniques[3])))
end
if call('TTL', unique) < 0 then call('EXPIRE', unique, uniques[1]) end

call('HSET', KEYS[1], 'seq', seq)
call('EXPIRE', KEYS[1], mark_ttl)

-- A decoded batch takes about 1 KB an event of Lua's heap, which the server keeps, and from Redis 8 counts as its own.
streams, vwaps, candles, uniques = nil, nil, nil, nil
if collectgarbage('count') > 1024 then collectgarbage() end
return {late, trimmed}
