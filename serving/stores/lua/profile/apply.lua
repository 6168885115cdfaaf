-- Inserts events into the tail of a profile, unless they are there, are folded already or were erased.
-- KEYS: profile; ARGV: empty header, entries, most entries of a tail.
-- Returns {inserted, refused, entries in the tail, 1 if the profile is evicted and its state is to be restored}.
--! include profile/stored
local head, tail = stored(KEYS[1], ARGV[1])
if not tail then return redis.error_reply('CORRUPT not a stored profile') end
local vh, vl, eh, el = 0, 0, 0, 0
if head then
  if not personal(head) then return {0, #ARGV[2] / ENTRY, #tail / ENTRY, 0} end
  vh, vl, eh, el = struct.unpack('>I4I4I4I4', head, 17)
end
local new, refused = {}, 0
for at = 1, #ARGV[2], ENTRY do
  local id = string.sub(ARGV[2], at, at + 7)
  local h, l = struct.unpack('>I4I4', id)
  if at_most(h, l, eh, el) then
    refused = refused + 1
  elseif not at_most(h, l, vh, vl) and not holds(tail, id, ENTRY) then
    local entry = string.sub(ARGV[2], at, at + ENTRY - 1)
    new[#new + 1] = entry
    tail = tail .. entry
  end
end
if #new > 0 then
  -- Before anything is written: a full tail takes all of these entries or none.
  if #tail > ARGV[3] * ENTRY then return redis.error_reply('TAILFULL') end
  if head then
    redis.call('APPEND', KEYS[1], table.concat(new))
    -- APPEND reserves as much again. Storing the same bytes once more frees that; no replica or file needs to know.
    redis.set_repl(redis.REPL_NONE)
    redis.call('SET', KEYS[1], redis.call('GET', KEYS[1]))
  else
    redis.call('SET', KEYS[1], ARGV[1] .. tail)
  end
end
return {#new, refused, #tail / ENTRY, head and string.byte(head, 6) or 0}
