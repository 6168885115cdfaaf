-- Asks for the profiles of evicted users who have returned.
-- KEYS: returned, erased; ARGV: time in ms after which none of them is waited for; then of each user: subject, keyed
-- hash, time of the return. A user who was erased since is not asked for.
--! include log/entries
for at = 2, #ARGV, 3 do
  if not erased(KEYS[2], ARGV[at + 1], ARGV[at + 2]) then redis.call('SADD', KEYS[1], ARGV[at]) end
end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
