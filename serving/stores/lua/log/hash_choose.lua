#!lua flags=allow-oom
-- Replaces a field of a hash if it has an expected value. Returns the value that it has now.
-- KEYS: hash; ARGV: name, expected value ('' for none), new value ('' removes it).
local now = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if now ~= ARGV[2] then return now end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
return ARGV[3]
