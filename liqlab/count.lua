-- Count the events of a shard's hot streams, and those of its blocks by what their headers say.
--
-- KEYS     names, blocks, hot streams ...
-- ARGV     where to begin in the blocks, where to end: '' for the time that events are sealed up to
-- returns  {events, where the blocks that are left begin or '', where they end, {entry, ...}}: the last are what is no
--          block of liqlab.codecs.blocks; they are not counted

local VERSION, PAGE, PAGES, OTHERS = 1, 8, 8, 16 -- a page is copied into Lua's heap, others are sent: neither may grow
local call, byte = redis.call, string.byte
local start, last, total, others = ARGV[1], ARGV[2], 0, {}
if last == '' then -- all in one moment: what is sealed after it is counted as hot
  last = (call('LINDEX', KEYS[1], 1) or '0') .. '-0'
  for i = 3, #KEYS do total = total + call('XLEN', KEYS[i]) end
end
for _ = 1, PAGES do
  local page = call('XRANGE', KEYS[2], start, last, 'COUNT', PAGE)
  for _, entry in ipairs(page) do
    local field, version, high, low = entry[2][1], byte(entry[2][2], 1, 3)
    if field == 'b' and version == VERSION and low then
      total = total + 256 * high + low
    else
      others[#others + 1] = entry
    end
  end
  start = #page == PAGE and '(' .. page[PAGE][1] or ''
  if start == '' or #others >= OTHERS then break end
end
if collectgarbage('count') > 1024 then collectgarbage() end
return {total, start, last, others}
