#!lua flags=allow-oom
-- Adds a mark of what a user has set, and stores it by their address. Works while memory is full.
-- KEYS: stream, consents, controls; ARGV: address, purposes ('' leaves them as they are), '1' if profiles forget what
-- came before; and, if the controls change, the new ones as profiles hold them and in words.
-- Returns the id of the mark, by which consumers meet it in order.
--! include log/entries
local fields = {'k', ARGV[1], 'c', ARGV[2], 'f', ARGV[3]}
if ARGV[4] then fields[7], fields[8] = 'b', ARGV[4] end
local mark = add(KEYS[1], unpack(fields))
if ARGV[4] then redis.call('HSET', KEYS[3], ARGV[1], mark .. ' ' .. ARGV[5]) end
local allowed, at, forgotten = consent_of(KEYS[2], ARGV[1])
if ARGV[2] ~= '' then allowed, at = ARGV[2], mark end
if ARGV[3] == '1' then forgotten = mark end
redis.call('HSET', KEYS[2], ARGV[1], allowed .. ' ' .. at .. ' ' .. forgotten)
return mark
