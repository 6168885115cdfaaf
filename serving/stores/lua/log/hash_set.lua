#!lua flags=allow-oom
-- Sets fields of a hash, even of a full Redis: they are notes by which readers go on, and reading makes room.
-- KEYS: hash; ARGV: names and values.
return redis.call('HSET', KEYS[1], unpack(ARGV))
