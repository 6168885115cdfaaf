-- Stores a state made elsewhere. A state of live events gives way only to one that goes as far; an erased past stays
-- erased; damage is overwritten; a user who allows no personal answers gets no state.
-- KEYS: profile; ARGV: empty header, header and state. Returns 1, or 0 if it would undo what is there.
--! include profile/stored
--! constant LIVE_HIGH
local read, head, tail = pcall(stored, KEYS[1], ARGV[1])
local found = read and head and tail
if not found then head, tail = salvaged(read, head, ARGV[1]), '' end
if not personal(head) then return 0 end
local nh, nl = struct.unpack('>I4I4', ARGV[2], 17)
local vh, vl, eh, el = struct.unpack('>I4I4I4I4', head, 17)
if (eh > 0 or el > 0) and at_most(nh, nl, eh, el) then return 0 end
local whole = found and string.byte(head, 6) ~= 2
if whole and vh >= LIVE_HIGH and not at_most(vh, vl, nh, nl) then return 0 end
local new, controls = ARGV[2], found and controls_of(KEYS[1], head) or ''
local parts = {string.sub(new, 1, 6), string.sub(head, 7, 8), string.sub(new, 9, 12), string.sub(head, 13, 16)}
parts[#parts + 1] = string.sub(new, 17, 24) .. string.sub(head, 25, HEADER)
parts[#parts + 1] = string.sub(new, HEADER + 1) .. controls
for at = 1, #tail, ENTRY do
  local h, l = struct.unpack('>I4I4', tail, at)
  if not at_most(h, l, nh, nl) then parts[#parts + 1] = string.sub(tail, at, at + ENTRY - 1) end
end
redis.call('SET', KEYS[1], table.concat(parts))
return 1
