-- Reads a stored profile: `header | state | controls | tail`, laid out in features/profile.py. Included by the scripts
-- of profiles, whose KEYS[1] is the profile and ARGV[1] the empty header.
--! constant ENTRY HEADER STATE OLDEST_FORMAT FIRST_LATER_FORMAT LAST_LATER_FORMAT

-- A later version wrote this profile: nothing of it may be read wrongly, or lost.
local front = redis.pcall('GETRANGE', KEYS[1], 0, 4)
if type(front) == 'string' and #front == 5 and string.sub(front, 1, 4) == string.sub(ARGV[1], 1, 4)
    and string.byte(front, 5) >= FIRST_LATER_FORMAT and string.byte(front, 5) <= LAST_LATER_FORMAT then
  return redis.error_reply('NEWER ' .. string.byte(front, 5))
end

-- Log ids have 64 bits and the numbers of Lua 53, so they are compared as two halves; Lua compares strings by locale.
local function at_most(h1, l1, h2, l2) return h1 < h2 or (h1 == h2 and l1 <= l2) end

local function ours(head, blank)
  return #head >= HEADER and string.sub(head, 1, 4) == string.sub(blank, 1, 4)
    and string.byte(head, 5) >= OLDEST_FORMAT and string.byte(head, 5) <= string.byte(blank, 5)
end

-- Returns the header to go on from: a blank one if there is no profile. Of a damaged profile it says that its past is
-- lost and keeps, as far as the header can be read, the user's consent and the log id up to which events are refused.
local function salvaged(read, head, blank)
  if read and not head then return blank end
  blank = string.sub(blank, 1, 5) .. '\2' .. string.sub(blank, 7)
  if not read or not ours(head, blank) then return blank end
  return string.sub(blank, 1, 6) .. string.sub(head, 7, 8) .. string.sub(blank, 9, 24) .. string.sub(head, 25, 40)
    .. string.sub(blank, 41, HEADER)
end

-- Returns true if the user allows personal answers: nothing was said, or PERSONALISE, the lowest bit, is set.
local function personal(head)
  local consent = string.byte(head, 7)
  return consent == 0 or consent % 2 == 1
end

-- Returns the place of an id in a string of entries or ids that are `width` bytes wide; a match across two is none.
local function holds(ids, id, width)
  local at = string.find(ids, id, 1, true)
  while at and (at - 1) % width ~= 0 do at = string.find(ids, id, at + 1, true) end
  return at
end

-- Returns header and tail; nil and an empty tail if there is no profile, no tail if it is damaged.
local function stored(key, blank)
  local head = redis.call('GETRANGE', key, 0, HEADER - 1)
  if head == '' then return nil, '' end
  if not ours(head, blank) then return head, nil end
  local state, controls = struct.unpack('<I4I4', head, 9)
  local rest = redis.call('STRLEN', key) - HEADER - state - controls
  if rest < 0 or rest % ENTRY ~= 0 or (state > 0 and state < STATE) then return head, nil end
  local tail = redis.call('GETRANGE', key, HEADER + state + controls, -1)
  return head, tail
end

-- Returns the controls in a profile that is not damaged.
local function controls_of(key, head)
  local state, controls = struct.unpack('<I4I4', head, 9)
  return controls > 0 and redis.call('GETRANGE', key, HEADER + state, HEADER + state + controls - 1) or ''
end
