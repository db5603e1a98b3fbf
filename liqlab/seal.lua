-- Move the oldest events out of the hot streams and into one block, unless something has changed since they were read.
--
-- KEYS     names, blocks, hot streams that were read ..., hot streams that did not exist then ...
-- ARGV     epoch, time sealed up to so far, elements of names, time sealed up to from now on, field, block, TTL of the
--          blocks, how many names are added, how many streams were read, then of each of these the first and the last
--          ID that the block holds ('' for none), then the added names
-- returns  events removed from the streams; -1 with nothing done where another writer or sealer came in between

local call = redis.call
local head = call('LRANGE', KEYS[1], 0, 1)
if head[1] ~= ARGV[1] or head[2] ~= ARGV[2] or call('LLEN', KEYS[1]) ~= tonumber(ARGV[3]) then return -1 end

local read = 2 + ARGV[9] -- the last of KEYS that was
for i = read + 1, #KEYS, 1000 do -- a stream that is new may have events from before the cut: nobody would see them again
  if call('EXISTS', unpack(KEYS, i, math.min(i + 999, #KEYS))) > 0 then return -1 end
end

-- Streams lose events at the front and gain them at the end: with both ends the same, all between is.
local cut = ARGV[4]
for i = 3, read do
  local first = call('XRANGE', KEYS[i], '-', '(' .. cut .. '-0', 'COUNT', 1)[1]
  local last = call('XREVRANGE', KEYS[i], '(' .. cut .. '-0', '-', 'COUNT', 1)[1]
  if (first and first[1] or '') ~= ARGV[2 * i + 4] or (last and last[1] or '') ~= ARGV[2 * i + 5] then return -1 end
end

call('XADD', KEYS[2], cut .. '-0', ARGV[5], ARGV[6])
call('EXPIRE', KEYS[2], ARGV[7])
call('LSET', KEYS[1], 1, cut)
for i = #ARGV - tonumber(ARGV[8]) + 1, #ARGV do call('RPUSH', KEYS[1], ARGV[i]) end
local moved = 0
for i = 3, read do
  if ARGV[2 * i + 4] ~= '' then moved = moved + call('XTRIM', KEYS[i], 'MINID', cut) end
end
return moved
