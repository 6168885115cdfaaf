-- Replaces the state by one into which entries of the tail are folded.
-- KEYS: profile; ARGV: empty header, header and end of the state as read, new header with state and controls, ids
-- folded.
-- Returns 1, or 0 if the state or the entries to fold are no longer those that were read.
--! include profile/stored
local head, tail = stored(KEYS[1], ARGV[1])
if not tail or head ~= ARGV[2] then return 0 end
local length = struct.unpack('<I4', head, 9)
-- A rebuild may have put another state of the same version and length, so its checksum has to agree too.
if length > 0 and redis.call('GETRANGE', KEYS[1], HEADER + length - 4, HEADER + length - 1) ~= ARGV[3] then return 0 end
local oh, ol = struct.unpack('>I4I4', head, 17)
local nh, nl = struct.unpack('>I4I4', ARGV[4], 17)
local kept = {ARGV[4]}
for at = 1, #tail, ENTRY do
  local id = string.sub(tail, at, at + 7)
  local h, l = struct.unpack('>I4I4', id)
  if not at_most(h, l, nh, nl) then
    kept[#kept + 1] = string.sub(tail, at, at + ENTRY - 1)
  -- It came after the state was read, and below the new version it would count as folded, which it is not.
  elseif not at_most(h, l, oh, ol) and not holds(ARGV[5], id, 8) then
    return 0
  end
end
redis.call('SET', KEYS[1], table.concat(kept))
return 1
