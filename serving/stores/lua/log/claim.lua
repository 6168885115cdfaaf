#!lua flags=allow-oom
-- Takes or keeps a partition and reads on. Returns false while another reader owns it.
-- KEYS: stream, lease; ARGV: owner, lease in ms, group, count, from.
-- Reading under the lease in one step is what makes "everything before this batch was applied" true: an owner that
-- slept past its lease reads nothing more, and as all owners are one consumer, what it did read is pending for the next
-- one.
-- A full memory is no reason to stop reading: only reading empties it.
local owner = redis.call('GET', KEYS[2])
if owner and owner ~= ARGV[1] then return false end
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[2]) / 2 then redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2]) end
local read = redis.call('XREADGROUP', 'GROUP', ARGV[3], 'owner', 'COUNT', ARGV[4], 'STREAMS', KEYS[1], ARGV[5])
return read and read[1][2] or {}
