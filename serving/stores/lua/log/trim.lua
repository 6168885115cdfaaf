#!lua flags=allow-oom
-- Deletes old entries of both streams. Works while memory is full.
-- KEYS: stream, impressions, floor; ARGV: time in ms up to which events go, the same of slates, time in ms before which
-- neither stream holds anything then, most entries of a stream to delete.
-- Returns the number of events and of slates deleted. `~` is exact here, because a node of a stream holds one entry.
redis.call('SET', KEYS[3], ARGV[3])
local slates = redis.call('XTRIM', KEYS[2], 'MINID', '~', ARGV[2], 'LIMIT', ARGV[4])
return {redis.call('XTRIM', KEYS[1], 'MINID', '~', ARGV[1], 'LIMIT', ARGV[4]), slates}
