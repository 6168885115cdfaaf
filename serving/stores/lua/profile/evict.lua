-- Evicts a profile: drops state and tail, and remembers that, and up to which log id they went.
-- KEYS: profile; ARGV: empty header, header as read, time in ms.
-- Returns 1, or 0 if the header changed, an event came since that time, or there is nothing to drop.
--! include profile/stored
--! constant SEQUENCE_BITS
local head, tail = stored(KEYS[1], ARGV[1])
if not tail or head ~= ARGV[2] then return 0 end
local length = struct.unpack('<I4', head, 9)
if length == 0 and tail == '' then return 0 end
local vh, vl = struct.unpack('>I4I4', head, 17)
for at = 1, #tail, ENTRY do
  local h, l = struct.unpack('>I4I4', tail, at)
  if h * 2 ^ (32 - SEQUENCE_BITS) + math.floor(l / 2 ^ SEQUENCE_BITS) >= tonumber(ARGV[3]) then return 0 end
  -- The tail goes too, so its newest entry is the version: what the log delivers again must be known.
  if not at_most(h, l, vh, vl) then vh, vl = h, l end
end
local parts = {string.sub(head, 1, 5), '\1', string.sub(head, 7, 8), string.sub(ARGV[1], 9, 12)}
parts[#parts + 1] = string.sub(head, 13, 16) .. struct.pack('>I4I4', vh, vl) .. string.sub(head, 25, HEADER)
parts[#parts + 1] = controls_of(KEYS[1], head)
redis.call('SET', KEYS[1], table.concat(parts))
return 1
