-- Move the oldest events out of the hot streams and into one block, unless something has changed since they were read.
--
-- KEYS     names, blocks, hot streams ...
-- ARGV     epoch, time sealed up to so far, elements of names, time sealed up to from now on, field, block, TTL of the
--          blocks, how many names are added, then of each stream the first and the last ID that the block holds ('' for
--          none), then the added names
-- returns  events removed from the streams; -1 with nothing done where another writer or sealer came in between

local call = redis.call
local head = call('LRANGE', KEYS[1], 0, 1)
if head[1] ~= ARGV[1] or head[2] ~= ARGV[2] or call('LLEN', KEYS[1]) ~= tonumber(ARGV[3]) then return -1 end

-- Streams lose events at the front and gain them at the end: with both ends the same, all between is.
local cut = ARGV[4]
for i = 3, #KEYS do
  local first = call('XRANGE', KEYS[i], '-', '(' .. cut .. '-0', 'COUNT', 1)[1]
  local last = call('XREVRANGE', KEYS[i], '(' .. cut .. '-0', '-', 'COUNT', 1)[1]
  if (first and first[1] or '') ~= ARGV[2 * i + 3] or (last and last[1] or '') ~= ARGV[2 * i + 4] then return -1 end
end

call('XADD', KEYS[2], cut .. '-0', ARGV[5], ARGV[6])
call('EXPIRE', KEYS[2], ARGV[7])
call('LSET', KEYS[1], 1, cut)
for i = #ARGV - tonumber(ARGV[8]) + 1, #ARGV do call('RPUSH', KEYS[1], ARGV[i]) end
local moved = 0
for i = 3, #KEYS do
  if ARGV[2 * i + 3] ~= '' then moved = moved + call('XTRIM', KEYS[i], 'MINID', cut) end
end
return moved
