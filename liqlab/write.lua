-- One batch of events, whole or not at all: streams, VWAP, candles, sketches of notionals, unique symbols, and the mark of
-- its writer.
--
-- KEYS     every key that is touched: the writer's mark, the names, the limits, the blocks, the stream that symbols
--          share, then the rest
-- ARGV[1]  msgpack: {seq, ahead, mark_ttl, names, streams, vwaps, candles, sketches, uniques}
--          ahead     true: sent before batches with lower numbers, so known by its own number alone
--          names     {epoch, stored, next epoch, {name, ...}}: what the writer takes the names to be, and what it adds
--          streams   {maxlen, ttl, {key, {field, ...}, {id, ...}, {{value, ...} a field}, {place = {field, value, ...}}} ...}
--                    where the last holds the rows that have other fields
--          vwaps     {ttl, {key, ...}, {price_sum, ...}, {volume_sum, ...}, {count, ...}, {last_update, ...}}
--          candles   {form, ttl, {key, ...}, {cell, ...}, ...}, the last three for each width; form is packed or hash,
--                    and a cell is what liqlab.candles packs
--          sketches  {ttl, kept, {key, ...}, {bucket, ...}, {words, ...}}: words are what liqlab.quantiles packs, kept
--                    how many buckets before the newest stay
--          uniques   {ttl, key, {symbol, ...}}
--          where key is an index into KEYS, and sums and counts are text
-- returns  {late, trimmed}: events that came late, events that MAXLEN or the limits pushed out;
--          {-2, 0, epoch of the names} for a repeated batch;
--          {-1, 0} with nothing written where the names are not what the writer takes them to be

local seq, ahead, mark_ttl, names, streams, vwaps, candles, sketches, uniques = unpack(cmsgpack.unpack(ARGV[1]))
local call, pcall, format, match = redis.call, redis.pcall, string.format, string.match

local mark = ahead and 'ahead:' .. format('%.0f', seq) or 'seq'
local last = call('HGET', KEYS[1], mark)
local head = call('LRANGE', KEYS[2], 0, 1)
if last and (ahead or tonumber(last) >= seq) then
  call('EXPIRE', KEYS[1], mark_ttl) -- a write, so that WAIT behind it is about all before it, on whatever connection
  return {-2, 0, head[1] or ''}
end
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

local MOST_OF_ONE_MS = 1024 -- late events: a block, which holds 32,768 events, ends between two different times
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
      local ms = tonumber(id) or tonumber(match(id, '%d+'))
      if ms > top_ms then
        top_ms = nil -- the rest of the batch is newer still: its own IDs stand
      else
        -- A stream only grows at its end, so a late event takes the next free ID there and carries its own time.
        top_seq = top_seq + 1
        if top_seq == MOST_OF_ONE_MS then top_ms, top_seq = top_ms + 1, 0 end
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

-- Bytes, not counts: between two rounds of cleanup this keeps the streams within what the last one measured and allowed.
local MOST_BLOCKS = 16 -- in one batch, since their events are counted: cleanup itself makes the larger cuts
local limit = call('HMGET', KEYS[3], 'bytes', 'event_bytes', 'block_bytes')
if limit[3] then
  local event_bytes, block_bytes = tonumber(limit[2]), tonumber(limit[3])
  local hot, blocks = call('XLEN', KEYS[5]), call('XLEN', KEYS[4])
  local over = hot * event_bytes + blocks * block_bytes - tonumber(limit[1])
  local oldest = math.min(math.ceil(over / block_bytes), blocks, MOST_BLOCKS)
  if oldest > 0 then
    for _, entry in ipairs(call('XRANGE', KEYS[4], '-', '+', 'COUNT', oldest)) do
      local field, block = unpack(entry[2])
      if field == 'b' then trimmed = trimmed + 256 * string.byte(block, 2) + string.byte(block, 3) end
    end
    call('XTRIM', KEYS[4], 'MAXLEN', blocks - oldest)
    over = over - oldest * block_bytes
  end
  if over > 0 and oldest == blocks then
    trimmed = trimmed + call('XTRIM', KEYS[5], 'MAXLEN', math.max(hot - math.ceil(over / event_bytes), 0))
  end
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

-- The packed form of a candle, and the fields of the hash, are those of liqlab.candles.
local CELL, CELL_BYTES = '<I4I4I4ddddddddd', 84
local CELL_FIELDS = {'count', 'open_ms', 'close_ms', 'volume', 'buy_volume', 'price_total', 'notional', 'max_size',
                     'high', 'low', 'open', 'close'}

local function stored_cell(k) -- in either form: the setting may have changed since
  local old = pcall('GET', k)
  if type(old) == 'string' then
    return #old == CELL_BYTES and {struct.unpack(CELL, old)}
  elseif old and old.err then
    old = pcall('HMGET', k, unpack(CELL_FIELDS))
    for i = 1, #CELL_FIELDS do
      old[i] = tonumber(old[i])
      if not old[i] then return end
    end
    return old
  end
end

local function merge_cell(new, old)
  for i = 4, 7 do new[i] = new[i] + old[i] end
  new[1] = new[1] + old[1]
  new[8], new[9], new[10] = math.max(new[8], old[8]), math.max(new[9], old[9]), math.min(new[10], old[10])
  if old[2] <= new[2] then new[2], new[11] = old[2], old[11] end
  if old[3] > new[3] then new[3], new[12] = old[3], old[12] end
end

local packed = candles[1] == 'packed'
for width = 2, #candles, 3 do
  local ttl, key, cell = candles[width], candles[width + 1], candles[width + 2]
  for i = 1, #key do
    local k = KEYS[key[i]]
    if not packed or not call('SET', k, cell[i], 'NX', 'EX', ttl) then
      local new, old = {struct.unpack(CELL, cell[i])}, stored_cell(k)
      if old then merge_cell(new, old) end
      if packed then
        call('SET', k, struct.pack(CELL, unpack(new, 1, 12)), 'EX', ttl)
      else
        local pairs = {}
        for n = 1, 12 do
          pairs[2 * n - 1] = CELL_FIELDS[n]
          pairs[2 * n] = text(new[n])
        end
        if call('TYPE', k).ok ~= 'hash' then call('DEL', k) end
        call('HSET', k, unpack(pairs))
        call('EXPIRE', k, ttl)
      end
    end
  end
end

-- As in liqlab.quantiles: what a word can count, and what is in front of the words. They are folded whenever they grow
-- past FOLD, and when the next bucket begins, unless there are so FEW that it would hardly free anything.
local WORD, QUARTERS, EACH, HEAD, HEAD_BYTES, FOLD, FEW = 8, 4, 5, '<ddI2I2', 20, 512, 64

local function fold(field)
  local bins, counts, first = {}, {}, {}
  for at = 1, #field - 1, 2 do
    local low, high = string.byte(field, at, at + 1)
    local word = low + 256 * high
    local n = word % WORD
    local bin = word - n
    if not counts[bin] then
      bins[#bins + 1] = bin
      counts[bin], first[bin] = 0, word
    end
    counts[bin] = counts[bin] + (n < QUARTERS and 1 or n - QUARTERS + 2)
  end
  table.sort(bins)
  local words = {}
  for i = 1, #bins do
    local bin = bins[i]
    local left = counts[bin]
    if left == 1 then words[#words + 1] = struct.pack('<I2', first[bin]) end
    while left > 1 do
      local n = left == EACH + 1 and EACH - 1 or math.min(left, EACH) -- never one that is left over
      words[#words + 1] = struct.pack('<I2', bin + QUARTERS - 2 + n)
      left = left - n
    end
  end
  return table.concat(words)
end

local kept, bucket, words
ttl, kept, key, bucket, words = unpack(sketches)
for i = 1, #key do
  local k, field = KEYS[key[i]], words[i]
  local old = call('HGET', k, bucket[i])
  if old and #old >= HEAD_BYTES then
    local least, most, first, last = struct.unpack(HEAD, field)
    local old_least, old_most, old_first, old_last = struct.unpack(HEAD, old)
    local counts = string.sub(old, HEAD_BYTES + 1) .. string.sub(field, HEAD_BYTES + 1)
    if math.floor(#counts / FOLD) > math.floor((#old - HEAD_BYTES) / FOLD) then counts = fold(counts) end
    field = struct.pack(HEAD, math.min(least, old_least), math.max(most, old_most), math.min(first, old_first),
                        math.max(last, old_last)) .. counts
  end
  if call('HSET', k, bucket[i], field) == 1 then -- a new bucket may push out the oldest
    local all = call('HKEYS', k)
    local newest, before = 0, -1
    for _, at in ipairs(all) do
      newest = math.max(newest, tonumber(at))
      if tonumber(at) < tonumber(bucket[i]) then before = math.max(before, tonumber(at)) end
    end
    for _, at in ipairs(all) do
      if tonumber(at) < newest - kept then call('HDEL', k, at) end
    end
    local over = before >= 0 and call('HGET', k, format('%.0f', before))
    if over and #over > HEAD_BYTES + FEW then
      local counts = fold(string.sub(over, HEAD_BYTES + 1))
      if HEAD_BYTES + #counts < #over then
        call('HSET', k, format('%.0f', before), string.sub(over, 1, HEAD_BYTES) .. counts)
      end
    end
  end
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
streams, vwaps, candles, sketches, uniques = nil, nil, nil, nil, nil
if collectgarbage('count') > 1024 then collectgarbage() end
return {late, trimmed}
