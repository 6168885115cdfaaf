#!lua flags=allow-oom
-- Stores a certificate and lists it as open.
-- KEYS: certificate, open certificates; ARGV: id of the certificate, names and values of its fields.
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return redis.call('SADD', KEYS[2], ARGV[1])
