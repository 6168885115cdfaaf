-- Returns the number of live workers, and the lowest version that one of them has applied or false.
-- KEYS: workers; ARGV: time in ms since its last sign of life for which a worker counts.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count, lowest = 0, false
for _, sign in ipairs(redis.call('HVALS', KEYS[1])) do
  local version, at = string.match(sign, '(%d+):(%d+)')
  if now - tonumber(at) <= tonumber(ARGV[1]) then
    count, lowest = count + 1, math.min(lowest or tonumber(version), tonumber(version))
  end
end
return {count, lowest}
