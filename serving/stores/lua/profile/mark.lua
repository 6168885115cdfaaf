#!lua flags=allow-oom
-- Brings a mark of the log into a profile. An older mark never undoes a newer one, so marks may come in any order and
-- again. Works while memory is full.
-- KEYS: profile; ARGV: empty header, log id of the mark, consent ('' leaves it as it is), '1' to forget what came up to
-- the mark, '1' if controls follow, the controls.
-- Returns the number of events forgotten.
--! include profile/stored
local read, head, tail = pcall(stored, KEYS[1], ARGV[1])
local found = read and head and tail
if not found then head, tail = salvaged(read, head, ARGV[1]), '' end
local mh, ml = struct.unpack('>I4I4', ARGV[2])
local eh, el, ch, cl, rh, rl = struct.unpack('>I4I4I4I4I4I4', head, 25)
local length = struct.unpack('<I4', head, 9)
local controls, changed = found and controls_of(KEYS[1], head) or '', false
if ARGV[3] ~= '' and not at_most(mh, ml, ch, cl) then
  head = string.sub(head, 1, 6) .. ARGV[3] .. string.sub(head, 9, 32) .. ARGV[2] .. string.sub(head, 41, HEADER)
end
if ARGV[5] == '1' and not at_most(mh, ml, rh, rl) then
  controls, changed = ARGV[6], true
  head = string.sub(head, 1, 12) .. struct.pack('<I4', #controls) .. string.sub(head, 17, 40) .. ARGV[2]
end
if ARGV[4] ~= '1' or at_most(mh, ml, eh, el) then
  if not found then
    redis.call('SET', KEYS[1], head .. controls)
  elseif changed then
    local state = length > 0 and redis.call('GETRANGE', KEYS[1], HEADER, HEADER + length - 1) or ''
    redis.call('SET', KEYS[1], head .. state .. controls .. tail)
  else
    redis.call('SETRANGE', KEYS[1], 0, head)
  end
  return 0
end
local forgotten = 0
if length > 0 then
  forgotten = struct.unpack('<I4', redis.call('GETRANGE', KEYS[1], HEADER, HEADER + 3))
end
local kept = {string.sub(ARGV[1], 1, 6), string.sub(head, 7, 8), string.sub(ARGV[1], 9, 12), string.sub(head, 13, 16)}
kept[#kept + 1] = string.sub(ARGV[1], 17, 24) .. ARGV[2] .. string.sub(head, 33, HEADER) .. controls
for at = 1, #tail, ENTRY do
  local h, l = struct.unpack('>I4I4', tail, at)
  if at_most(h, l, mh, ml) then
    forgotten = forgotten + 1
  else
    kept[#kept + 1] = string.sub(tail, at, at + ENTRY - 1)
  end
end
redis.call('SET', KEYS[1], table.concat(kept))
return forgotten
