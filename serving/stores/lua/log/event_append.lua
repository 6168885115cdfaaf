-- Appends events; an event that is there already is found by its key and appended no second time.
-- KEYS: stream, erased, floor, consents, then seen and index of each event.
-- ARGV: time in ms for which an index stays, default purposes, most entries of a user; then of each event: keyed hash
-- of the user, time, subject, event id, record, payload, time in ms for which retries are recognised, address, and '0'
-- if it enters no profile in any case.
-- Returns for each event: {0, stream id, 1 or 0 for whether it may enter the profile}; {1, stream id, record, the same}
-- of the first one for a retry; {2} if the user was erased after it; {3} if its user allows no purpose; {4} if the log
-- holds too much of the user; {5, error} if Redis refused it.
-- Several events in one step, because each step is a write to disk; each by itself, so that a refused one keeps no
-- other out.
--! include log/entries
local floor = tonumber(redis.call('GET', KEYS[3]) or 0)
local again = {}
local function append(seen, index, subject_hash, at, subject, event, record, payload, window, address, personal)
  local first = redis.call('GET', seen)
  if first then
    again[#again + 1] = seen
    local entry = redis.call('XRANGE', KEYS[1], first, first)[1]
    return {1, first, entry and entry[2][6] or '', entry and entry[2][9] and 0 or 1}
  end
  if erased(KEYS[2], subject_hash, at) then return {2} end
  local allowed = purposes(KEYS[4], address, ARGV[2])
  if allowed == 0 then return {3} end
  forget(index, floor)
  if redis.call('LLEN', index) >= tonumber(ARGV[3]) then return {4} end
  local fields = {'s', subject, 'e', event, 'r', record, 'p', payload}
  local enters = personal == '0' and 0 or allowed % 2
  if enters == 0 then fields[9], fields[10] = 'n', '1' end
  local id = add(KEYS[1], unpack(fields))
  redis.call('SET', seen, id, 'PX', window)
  note(index, 'e', id, ARGV[1])
  return {0, id, enters}
end
local replies = {}
for n = 1, (#KEYS - 4) / 2 do
  local done, reply = pcall(append, KEYS[2 * n + 3], KEYS[2 * n + 4], unpack(ARGV, 9 * n - 5, 9 * n + 3))
  if not done then  -- Redis raises a table, Valkey a text that begins with the place
    reply = {5, type(reply) == 'table' and reply.err or (string.gsub(reply, '^user_script:%d+: ', ''))}
  end
  replies[n] = reply
end
-- The reply to a retry is a promise as well: a write makes Redis sync the file that holds the first one. It comes last,
-- because a script that has written once is no longer refused for want of memory.
for _, seen in ipairs(again) do redis.call('PEXPIRE', seen, redis.call('PTTL', seen)) end
return replies
