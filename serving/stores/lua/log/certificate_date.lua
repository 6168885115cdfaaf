#!lua flags=allow-oom
-- Sets a field of a certificate, unless it was issued again meanwhile.
-- KEYS: certificate; ARGV: log id that the certificate must be of, name, value. Returns 1, or 0 if it was not set.
if redis.call('HGET', KEYS[1], 'log_id') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 1
