#!lua flags=allow-oom
-- Makes a consumer group that begins with the oldest entry, unless it is there.
-- KEYS: stream; ARGV: group.
local reply = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if reply.err and not string.find(reply.err, 'BUSYGROUP', 1, true) then return reply end
return 1
