-- What a legacy key holds, as one number that changes with it; and its removal, only while it holds just that.
--
-- KEYS     the key
-- ARGV     nothing; or the state that it must have to be removed
-- returns  {type, entries, state}; with ARGV {type, entries, state, 1 where the key was removed}
--
-- Such keys gain entries at their end and lose them at the front: with number and both ends the same, all between is.

local call, key = redis.call, KEYS[1]
local kind, parts = call('TYPE', key).ok, {}
if kind == 'zset' then
  local first, last = call('ZRANGE', key, 0, 0, 'WITHSCORES'), call('ZRANGE', key, -1, -1, 'WITHSCORES')
  parts = {call('ZCARD', key), first[1], first[2], last[1], last[2]}
elseif kind == 'stream' then
  local first, last = call('XRANGE', key, '-', '+', 'COUNT', 1)[1], call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  parts = {call('XLEN', key), first and first[1] or '', last and last[1] or ''}
end
local state = redis.sha1hex(kind .. ' ' .. table.concat(parts, ' '))
if not ARGV[1] then return {kind, parts[1] or 0, state} end
local same = state == ARGV[1]
if same then call('UNLINK', key) end
return {kind, parts[1] or 0, state, same and 1 or 0}
