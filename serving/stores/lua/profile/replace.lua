-- Replaces a profile that is still the one that was read.
-- KEYS: profile; ARGV: empty header, value as read, new value. Returns 1, or 0 if it changed since.
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[3])
return 1
