-- Adds to the streams of the log and to what stands with them. Included by the scripts that write to the log.
--! constant SEQUENCES

-- Adds under an id whose sequence number fits a log id: past it, the next millisecond is used up early.
local function add(stream, ...)
  local id = redis.call('XADD', stream, '*', ...)
  local dash = string.find(id, '-', 1, true)
  if tonumber(string.sub(id, dash + 1)) >= SEQUENCES then
    redis.call('XDEL', stream, id)
    id = redis.call('XADD', stream, string.format('%.0f-0', tonumber(string.sub(id, 1, dash - 1)) + 1), ...)
  end
  return id
end

-- A user's index forgets what the stream has forgotten. Four at a time: it shrinks faster than it grows, and no append
-- pays for all of it.
local function forget(index, floor)
  for _ = 1, 4 do
    local oldest = redis.call('LINDEX', index, 0)
    if not oldest or tonumber(string.match(oldest, '%d+')) >= floor then break end
    redis.call('LPOP', index)
  end
end

-- Notes an entry in the index of its user, which expires by itself if nothing follows.
local function note(index, kind, id, ttl)
  redis.call('RPUSH', index, kind .. id)
  if redis.call('PTTL', index) < tonumber(ttl) then redis.call('PEXPIRE', index, ttl) end
end

-- Returns true if a user's erasure refuses what they did at a time.
local function erased(hash, subject_hash, at)
  local past = redis.call('HGET', hash, subject_hash)
  return past and tonumber(at) <= tonumber(past)
end

-- Returns the consent of a user: purposes, the id at which they set them, the id up to which profiles forget; '-' and
-- '0-0' stand for never.
local function consent_of(consents, address)
  return string.match(redis.call('HGET', consents, address) or '- 0-0 0-0', '(%S+) (%S+) (%S+)')
end

local function purposes(consents, address, default)
  return tonumber((consent_of(consents, address))) or tonumber(default)
end
