-- One batch of events, whole or not at all: streams, VWAP, candles, percentile bins, unique symbols, and the mark of
-- its writer.
--
-- KEYS     every key that is touched: the writer's mark, the names, then the rest
-- ARGV[1]  msgpack: {seq, ahead, mark_ttl, names, streams, vwaps, candles, bins, uniques}
--          ahead     true: sent before batches with lower numbers, so known by its own number alone
--          names     {epoch, stored, next epoch, {name, ...}}: what the writer takes the names to be, and what it adds
--          streams   {maxlen, ttl, {key, {field, ...}, {id, ...}, {{value, ...} a field}, {place = {field, value, ...}}} ...}
--                    where the last holds the rows that have other fields
--          vwaps     {ttl, {key, ...}, {price_sum, ...}, {volume_sum, ...}, {count, ...}, {last_update, ...}}
--          candles   {ttl, {key, ...}, {count, ...}, {volume, ...}, {buy_volume, ...}, {max_size, ...},
--                     {price_total, ...}, {notional, ...}}
--          bins      {ttl, {key, ...}, {{bin, ...}, ...}, {{count, ...}, ...}}: at most `MOST_BINS` of liqlab.batch a key
--          uniques   {ttl, key, {symbol, ...}}
--          where key is an index into KEYS, and sums and counts are text
-- returns  {late, trimmed}: events that came late, events that MAXLEN pushed out; {0, 0} for a repeated batch;
--          {-1, 0} with nothing written where the names are not what the writer takes them to be

local seq, ahead, mark_ttl, names, streams, vwaps, candles, bins, uniques = unpack(cmsgpack.unpack(ARGV[1]))
local call, pcall, format, match = redis.call, redis.pcall, string.format, string.match

local mark = ahead and 'ahead:' .. format('%.0f', seq) or 'seq'
local last = call('HGET', KEYS[1], mark)
if last and (ahead or tonumber(last) >= seq) then return {0, 0} end

local head = call('LRANGE', KEYS[2], 0, 1)
if (head[1] or '') ~= names[1] or math.max(call('LLEN', KEYS[2]) - 2, 0) ~= names[2] then return {-1, 0} end
if not head[1] then call('RPUSH', KEYS[2], names[3], '0') end
for i = 1, #names[4] do call('RPUSH', KEYS[2], names[4][i]) end
local sealed = tonumber(head[2]) or 0 -- whatever is older lies in blocks: new events get later IDs

-- The shortest text that reads back as the same double: a hash keeps numbers as text, and every byte is paid for.
local function text(x)
  local s = format('%.15g', x)
  if tonumber(s) ~= x then s = format('%.17g', x) end
  return s
end

local late, trimmed = 0, 0
for i = 3, #streams do
  local key, fields, ids, columns, odd = KEYS[streams[i][1]], unpack(streams[i], 2)
  local f1, f2, f3 = unpack(fields)
  local a, b, c = unpack(columns)
  local top_ms, top_seq = sealed, -1
  local info = pcall('XINFO', 'STREAM', key)
  if not info.err then -- the last ID that was ever given, though its event may be gone
    for at = 1, 20, 2 do
      if info[at] == 'last-generated-id' then
        local ms, n = match(info[at + 1], '(%d+)-(%d+)')
        if tonumber(ms) >= top_ms then top_ms, top_seq = tonumber(ms), tonumber(n) end
        break
      end
    end
  end
  for j = 1, #ids do
    local id, came_late = ids[j], nil
    if top_ms then
      local ms = tonumber(match(id, '%d+'))
      if ms > top_ms then
        top_ms = nil -- the rest of the batch is newer still: its own IDs stand
      else
        -- A stream only grows at its end, so a late event takes the next free ID there and carries its own time.
        top_seq = top_seq + 1
        id = format('%.0f-%.0f', top_ms, top_seq)
        if ms < top_ms then
          came_late = format('%.0f', ms)
          late = late + 1
        end
      end
    end
    local row = odd[j]
    if row or came_late or #fields > 3 then
      if not row then
        row = {}
        for n = 1, #fields do
          row[#row + 1] = fields[n]
          row[#row + 1] = columns[n][j]
        end
      end
      if came_late then
        row[#row + 1] = 't'
        row[#row + 1] = came_late
      end
      call('XADD', key, id, unpack(row))
    elseif c then
      call('XADD', key, id, f1, a[j], f2, b[j], f3, c[j])
    else
      call('XADD', key, id, f1, a[j])
    end
  end
  trimmed = trimmed + call('XTRIM', key, 'MAXLEN', '~', streams[1])
  call('EXPIRE', key, streams[2])
end

local ttl, key, price_sum, volume_sum, count, last_update = unpack(vwaps)
for i = 1, #key do
  local k = KEYS[key[i]]
  local old = call('HMGET', k, 'price_sum', 'volume_sum', 'count', 'last_update')
  local p, v, n, at = price_sum[i], volume_sum[i], count[i], last_update[i]
  if old[1] then
    p, v = text(p + old[1]), text(v + old[2])
    n, at = format('%.0f', n + old[3]), format('%.0f', math.max(at, tonumber(old[4])))
  end
  call('HSET', k, 'price_sum', p, 'volume_sum', v, 'count', n, 'last_update', at)
  call('EXPIRE', k, ttl)
end

local volume, buy_volume, max_size, price_total, notional
ttl, key, count, volume, buy_volume, max_size, price_total, notional = unpack(candles)
for i = 1, #key do
  local k = KEYS[key[i]]
  local old = call('HMGET', k, 'count', 'volume', 'buy_volume', 'max_size', 'price_total', 'notional')
  local n, v, b, m, p, u = count[i], volume[i], buy_volume[i], max_size[i], price_total[i], notional[i]
  if old[1] then
    n, v, b = format('%.0f', n + old[1]), text(v + old[2]), text(b + old[3])
    m, p, u = text(math.max(m, tonumber(old[4]))), text(p + old[5]), text(u + old[6])
  end
  call('HSET', k, 'count', n, 'volume', v, 'buy_volume', b, 'max_size', m, 'price_total', p, 'notional', u)
  call('EXPIRE', k, ttl)
end

local bin
ttl, key, bin, count = unpack(bins)
for i = 1, #key do
  local k, pairs = KEYS[key[i]], {}
  -- Two calls for many counts: one HINCRBY each would take longer than everything else.
  local old = call('HMGET', k, unpack(bin[i]))
  for j = 1, #bin[i] do
    pairs[2 * j - 1] = bin[i][j]
    pairs[2 * j] = old[j] and format('%.0f', old[j] + count[i][j]) or count[i][j]
  end
  call('HSET', k, unpack(pairs))
  call('EXPIRE', k, ttl)
end

local unique = KEYS[uniques[2]]
for i = 1, #uniques[3], 1000 do -- unpack has room for about 8,000 values
  call('PFADD', unique, unpack(uniques[3], i, math.min(i + 999, #uniques[3])))
end
if call('TTL', unique) < 0 then call('EXPIRE', unique, uniques[1]) end

call('HSET', KEYS[1], mark, seq)
if not ahead and call('HLEN', KEYS[1]) > 1 then -- batches that had been sent ahead of this one are behind it now
  for _, name in ipairs(call('HKEYS', KEYS[1])) do
    local n = tonumber(match(name, '^ahead:(%d+)$'))
    if n and n < seq then call('HDEL', KEYS[1], name) end
  end
end
call('EXPIRE', KEYS[1], mark_ttl)

-- A decoded batch takes about 1 KB an event of Lua's heap, which the server keeps, and from Redis 8 counts as its own.
streams, vwaps, candles, bins, uniques = nil, nil, nil, nil, nil
if collectgarbage('count') > 1024 then collectgarbage() end
return {late, trimmed}
