#!lua flags=allow-oom
-- Gives a sign of life of a worker, and forgets the workers that gave none for long.
-- KEYS: workers; ARGV: worker, the version that it has applied, time in ms after which a worker is forgotten.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%s:%.0f', ARGV[2], now))
local all = redis.call('HGETALL', KEYS[1])
for at = 1, #all, 2 do
  local seen = tonumber(string.match(all[at + 1], ':(%d+)'))
  if now - seen > tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], all[at]) end
end
return 1
