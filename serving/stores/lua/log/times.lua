#!lua flags=allow-oom
-- Stores for how long entries stay.
-- KEYS: meta; ARGV: these times, time in ms for which the index of a user stays.
-- Of the latter the shortest that ever was is kept: an index may have expired by it.
local shortest = redis.call('HGET', KEYS[1], 'index_ms')
if not shortest or tonumber(shortest) > tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], 'index_ms', ARGV[2]) end
return redis.call('HSET', KEYS[1], 'times', ARGV[1])
