-- Appends slates.
-- KEYS: stream, erased, floor, consents, then the index of each slate.
-- ARGV: time in ms for which an index stays, default purposes; then of each slate: keyed hash of the user, time,
-- subject, payload, address.
-- Returns for each its stream id, or false if its user was erased after it, or allows neither training nor measuring.
--! include log/entries
local floor = tonumber(redis.call('GET', KEYS[3]) or 0)
local function append(index, subject_hash, at, subject, payload, address)
  if erased(KEYS[2], subject_hash, at) or purposes(KEYS[4], address, ARGV[2]) < 2 then return false end
  local id = add(KEYS[1], 's', subject, 'p', payload)
  forget(index, floor)
  note(index, 'i', id, ARGV[1])
  return id
end
local replies = {}
for n = 1, #KEYS - 4 do
  replies[n] = append(KEYS[n + 4], unpack(ARGV, 5 * n - 2, 5 * n + 2))
end
return replies
