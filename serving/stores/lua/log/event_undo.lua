#!lua flags=allow-oom
-- Deletes an event, and adds a mark that tells consumers which one it was. Works while memory is full.
-- KEYS: stream, index; ARGV: stream id of the event, address of its user. Returns the number deleted.
--! include log/entries
add(KEYS[1], 'k', ARGV[2], 'u', ARGV[1])
redis.call('LREM', KEYS[2], 0, 'e' .. ARGV[1])
return redis.call('XDEL', KEYS[1], ARGV[1])
