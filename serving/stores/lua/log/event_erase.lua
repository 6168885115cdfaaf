#!lua flags=allow-oom
-- Deletes what the streams hold of a user, and adds a mark by which consumers meet the erasure in order. Works while
-- memory is full.
-- KEYS: stream, impressions, index, erased, consents, controls.
-- ARGV: keyed hash of the user, address, '1' to refuse from now on what they did before now; and, if nothing newer may
-- be there, the newest entry of their index as it was read.
-- Returns {id of the mark, events deleted, impressions deleted}, or false if there is something newer.
--! include log/entries
if ARGV[4] and (redis.call('LINDEX', KEYS[3], -1) or '') ~= ARGV[4] then return false end
local marker = add(KEYS[1], 'x', ARGV[1], 'k', ARGV[2], 'f', '1', 'b', '')
redis.call('HDEL', KEYS[6], ARGV[2])
if ARGV[3] == '1' then
  redis.call('HSET', KEYS[4], ARGV[1], string.match(marker, '%d+'))
else
  local allowed, at = consent_of(KEYS[5], ARGV[2])
  redis.call('HSET', KEYS[5], ARGV[2], allowed .. ' ' .. at .. ' ' .. marker)
end
local noted, deleted = {e = {}, i = {}}, {e = 0, i = 0}
for _, name in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
  local ids = noted[string.sub(name, 1, 1)]
  ids[#ids + 1] = string.sub(name, 2)
end
for kind, ids in pairs(noted) do
  for at = 1, #ids, 1000 do  -- many at a time, because every client of this server waits
    local gone = redis.call('XDEL', kind == 'e' and KEYS[1] or KEYS[2], unpack(ids, at, math.min(at + 999, #ids)))
    deleted[kind] = deleted[kind] + gone
  end
end
redis.call('DEL', KEYS[3])
return {marker, deleted.e, deleted.i}
