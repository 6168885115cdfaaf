"""What runs inside Redis: each script is one atomic step on the keys of one partition.

Everything an id touches is opaque bytes. Log ids do not fit the numbers of Lua, so they travel as 8 big-endian bytes
and are compared as two halves of 32 bits (Lua compares strings by locale).
"""

from __future__ import annotations

from features.profile import ENTRY, HEADER_SIZE, LATER_FORMATS, OLDEST_FORMAT, SMALLEST_STATE
from serving.redis.client import Script
from serving.stores.keys import LIVE, SEQUENCE_BITS

_TAIL = f"""
-- A later version wrote this profile: nothing of it may be read wrongly, or lost.
local front = redis.pcall('GETRANGE', KEYS[1], 0, 4)
if type(front) == 'string' and #front == 5 and string.sub(front, 1, 4) == string.sub(ARGV[1], 1, 4)
    and string.byte(front, 5) >= {LATER_FORMATS[0]} and string.byte(front, 5) <= {LATER_FORMATS[-1]} then
  return redis.error_reply('NEWER ' .. string.byte(front, 5))
end
local ENTRY, HEADER, STATE = {ENTRY.itemsize}, {HEADER_SIZE}, {SMALLEST_STATE}
local function at_most(h1, l1, h2, l2) return h1 < h2 or (h1 == h2 and l1 <= l2) end
local function ours(head, blank)
  return #head >= HEADER and string.sub(head, 1, 4) == string.sub(blank, 1, 4)
    and string.byte(head, 5) >= {OLDEST_FORMAT} and string.byte(head, 5) <= string.byte(blank, 5)
end
-- Of a damaged profile: that its past is lost and, as far as its header can be read, what the user allows and up to
-- where it forgets. Of none: a blank one.
local function salvaged(read, head, blank)
  if read and not head then return blank end
  blank = string.sub(blank, 1, 5) .. '\\2' .. string.sub(blank, 7)
  if not read or not ours(head, blank) then return blank end
  return string.sub(blank, 1, 6) .. string.sub(head, 7, 8) .. string.sub(blank, 9, 24) .. string.sub(head, 25, 40)
    .. string.sub(blank, 41, HEADER)
end
local function personal(head)
  local said = string.byte(head, 7)
  return said == 0 or said % 2 == 1
end
local function holds(ids, id, width)
  local found = string.find(ids, id, 1, true)
  while found and (found - 1) % width ~= 0 do found = string.find(ids, id, found + 1, true) end
  return found
end
local function stored(key, blank)
  local head = redis.call('GETRANGE', key, 0, HEADER - 1)
  if head == '' then return nil, '' end
  if not ours(head, blank) then return head, nil end
  local state, rules = struct.unpack('<I4I4', head, 9)
  local rest = redis.call('STRLEN', key) - HEADER - state - rules
  if rest < 0 or rest % ENTRY ~= 0 or (state > 0 and state < STATE) then return head, nil end
  local tail = redis.call('GETRANGE', key, HEADER + state + rules, -1)
  return head, tail
end
-- The rules in a profile that is not damaged.
local function rules_of(key, head)
  local state, rules = struct.unpack('<I4I4', head, 9)
  return rules > 0 and redis.call('GETRANGE', key, HEADER + state, HEADER + state + rules - 1) or ''
end
"""

# KEYS: person; ARGV: empty header, entries, cap. Returns {inserted, refused, entries in the tail, 1 where the person
# stayed away so long that their state is to be made anew}.
PROFILE_APPLY = Script.of(
    _TAIL
    + """
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
  if #tail > ARGV[3] * ENTRY then return redis.error_reply('TAILFULL') end
  if head then
    redis.call('APPEND', KEYS[1], table.concat(new))
    -- APPEND reserves as much again. Storing the same bytes anew gives that back; no replica or file needs to know.
    redis.set_repl(redis.REPL_NONE)
    redis.call('SET', KEYS[1], redis.call('GET', KEYS[1]))
  else
    redis.call('SET', KEYS[1], ARGV[1] .. tail)
  end
end
return {#new, refused, #tail / ENTRY, head and string.byte(head, 6) or 0}
"""
)

# KEYS: person; ARGV: empty header, header and end of the state as read, new header, state and rules, ids folded into
# it. Returns 1, or 0 where the state or the entries to fold are no longer those that were read.
PROFILE_COMPACT = Script.of(
    _TAIL
    + """
local head, tail = stored(KEYS[1], ARGV[1])
if not tail or head ~= ARGV[2] then return 0 end
local length = struct.unpack('<I4', head, 9)
if length > 0 and redis.call('GETRANGE', KEYS[1], HEADER + length - 4, HEADER + length - 1) ~= ARGV[3] then return 0 end
local oh, ol = struct.unpack('>I4I4', head, 17)
local nh, nl = struct.unpack('>I4I4', ARGV[4], 17)
local kept = {ARGV[4]}
for at = 1, #tail, ENTRY do
  local id = string.sub(tail, at, at + 7)
  local h, l = struct.unpack('>I4I4', id)
  if not at_most(h, l, nh, nl) then
    kept[#kept + 1] = string.sub(tail, at, at + ENTRY - 1)
  elseif not at_most(h, l, oh, ol) and not holds(ARGV[5], id, 8) then
    return 0
  end
end
redis.call('SET', KEYS[1], table.concat(kept))
return 1
"""
)

# KEYS: person; ARGV: empty header, header and state. Returns 1, or 0 where it would undo what is there.
# A state of live events gives way only to one that goes as far; an erased past stays erased; damage is overwritten; who
# allows no personal answers gets no state.
PROFILE_PUT = Script.of(
    _TAIL
    + f"local LIVE = {LIVE >> 32}"
    + """
local read, head, tail = pcall(stored, KEYS[1], ARGV[1])
local found = read and head and tail
if not found then head, tail = salvaged(read, head, ARGV[1]), '' end
if not personal(head) then return 0 end
local nh, nl = struct.unpack('>I4I4', ARGV[2], 17)
local vh, vl, eh, el = struct.unpack('>I4I4I4I4', head, 17)
if (eh > 0 or el > 0) and at_most(nh, nl, eh, el) then return 0 end
local whole = found and string.byte(head, 6) ~= 2
if whole and vh >= LIVE and not at_most(vh, vl, nh, nl) then return 0 end
local new, rules = ARGV[2], found and rules_of(KEYS[1], head) or ''
local parts = {string.sub(new, 1, 6), string.sub(head, 7, 8), string.sub(new, 9, 12), string.sub(head, 13, 16)}
parts[#parts + 1] = string.sub(new, 17, 24) .. string.sub(head, 25, HEADER)
parts[#parts + 1] = string.sub(new, HEADER + 1) .. rules
for at = 1, #tail, ENTRY do
  local h, l = struct.unpack('>I4I4', tail, at)
  if not at_most(h, l, nh, nl) then parts[#parts + 1] = string.sub(tail, at, at + ENTRY - 1) end
end
redis.call('SET', KEYS[1], table.concat(parts))
return 1
"""
)

# KEYS: person; ARGV: empty header, value as read, new value. Returns 1, or 0 where it changed since.
PROFILE_REPLACE = Script.of(
    """
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[3])
return 1
"""
)

# KEYS: person; ARGV: empty header, header as read, time in ms. Drops all that is known of somebody who stayed away, and
# remembers that, and up to where it went. Returns 1, or 0 where the header changed, an event came since that time, or
# nothing is there.
PROFILE_LEAVE = Script.of(
    _TAIL
    + f"local BITS = {SEQUENCE_BITS}"
    + """
local head, tail = stored(KEYS[1], ARGV[1])
if not tail or head ~= ARGV[2] then return 0 end
local length = struct.unpack('<I4', head, 9)
if length == 0 and tail == '' then return 0 end
local vh, vl = struct.unpack('>I4I4', head, 17)
for at = 1, #tail, ENTRY do
  local h, l = struct.unpack('>I4I4', tail, at)
  if h * 2 ^ (32 - BITS) + math.floor(l / 2 ^ BITS) >= tonumber(ARGV[3]) then return 0 end
  if not at_most(h, l, vh, vl) then vh, vl = h, l end
end
local parts = {string.sub(head, 1, 5), '\\1', string.sub(head, 7, 8), string.sub(ARGV[1], 9, 12)}
parts[#parts + 1] = string.sub(head, 13, 16) .. struct.pack('>I4I4', vh, vl) .. string.sub(head, 25, HEADER)
parts[#parts + 1] = rules_of(KEYS[1], head)
redis.call('SET', KEYS[1], table.concat(parts))
return 1
"""
)

# KEYS: person; ARGV: empty header, log id of the mark, what the person allows ('' where that stays as it is), '1' where
# what came up to the mark is forgotten, '1' where the rules that follow are theirs from now on. Returns the number of
# events forgotten. Works while memory is full.
# An older mark never undoes a newer one, so marks may come in any order and again.
PROFILE_MARK = Script.of(
    "#!lua flags=allow-oom\n"
    + _TAIL
    + """
local read, head, tail = pcall(stored, KEYS[1], ARGV[1])
local found = read and head and tail
if not found then head, tail = salvaged(read, head, ARGV[1]), '' end
local mh, ml = struct.unpack('>I4I4', ARGV[2])
local eh, el, ch, cl, rh, rl = struct.unpack('>I4I4I4I4I4I4', head, 25)
local length = struct.unpack('<I4', head, 9)
local rules, ruled = found and rules_of(KEYS[1], head) or '', false
if ARGV[3] ~= '' and not at_most(mh, ml, ch, cl) then
  head = string.sub(head, 1, 6) .. ARGV[3] .. string.sub(head, 9, 32) .. ARGV[2] .. string.sub(head, 41, HEADER)
end
if ARGV[5] == '1' and not at_most(mh, ml, rh, rl) then
  rules, ruled = ARGV[6], true
  head = string.sub(head, 1, 12) .. struct.pack('<I4', #rules) .. string.sub(head, 17, 40) .. ARGV[2]
end
if ARGV[4] ~= '1' or at_most(mh, ml, eh, el) then
  if not found then
    redis.call('SET', KEYS[1], head .. rules)
  elseif ruled then
    local state = length > 0 and redis.call('GETRANGE', KEYS[1], HEADER, HEADER + length - 1) or ''
    redis.call('SET', KEYS[1], head .. state .. rules .. tail)
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
kept[#kept + 1] = string.sub(ARGV[1], 17, 24) .. ARGV[2] .. string.sub(head, 33, HEADER) .. rules
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
"""
)

# Adds to a stream under an id whose sequence number fits a log id: past it, the next millisecond is used up early.
# A person's index forgets what the stream has forgotten (four at a time), and itself when nothing came for long.
_ADD = f"""
local function add(stream, ...)
  local id = redis.call('XADD', stream, '*', ...)
  local dash = string.find(id, '-', 1, true)
  if tonumber(string.sub(id, dash + 1)) >= {1 << SEQUENCE_BITS} then
    redis.call('XDEL', stream, id)
    id = redis.call('XADD', stream, string.format('%.0f-0', tonumber(string.sub(id, 1, dash - 1)) + 1), ...)
  end
  return id
end
local function forget(index, floor)
  for _ = 1, 4 do
    local oldest = redis.call('LINDEX', index, 0)
    if not oldest or tonumber(string.match(oldest, '%d+')) >= floor then break end
    redis.call('LPOP', index)
  end
end
local function note(index, kind, id, ttl)
  redis.call('RPUSH', index, kind .. id)
  if redis.call('PTTL', index) < tonumber(ttl) then redis.call('PEXPIRE', index, ttl) end
end
local function erased(hash, person, at)
  local past = redis.call('HGET', hash, person)
  return past and tonumber(at) <= tonumber(past)
end
-- What a person said, as 'purposes id-of-that id-up-to-which-profiles-forget', '-' and '0-0' for nothing yet.
local function said(people, address)
  return string.match(redis.call('HGET', people, address) or '- 0-0 0-0', '(%S+) (%S+) (%S+)')
end
local function purposes(people, address, default)
  return tonumber((said(people, address))) or tonumber(default)
end
"""

# KEYS: stream, erased, floor, people, then seen and index of each event; ARGV: index TTL, what those allow who said
# nothing, the most that the log may hold of a person, then of each event person, time, subject, event id, record,
# payload, window, address and '0' where it enters no profile in any case. Returns for each {0, stream id, 1 or 0 for
# whether it may enter the profile}, {1, stream id of the first, its record, the same of it}, {2} for an erased past,
# {3} where nothing is allowed, {4} where it is too much or {5, why} where Redis refused it.
# Several in one step, for each step is a write to disk, and each by itself: one that is refused keeps none away.
EVENT_APPEND = Script.of(
    _ADD
    + """
local floor = tonumber(redis.call('GET', KEYS[3]) or 0)
local again = {}
local function append(seen, index, person, at, subject, event, record, payload, window, address, personal)
  local first = redis.call('GET', seen)
  if first then
    again[#again + 1] = seen
    local entry = redis.call('XRANGE', KEYS[1], first, first)[1]
    return {1, first, entry and entry[2][6] or '', entry and entry[2][9] and 0 or 1}
  end
  if erased(KEYS[2], person, at) then return {2} end
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
-- What is answered to a retry is a promise as well: a write makes Redis sync the file that the first one is in. At the
-- end, for a script that has written is asked no more whether there is memory.
for _, seen in ipairs(again) do redis.call('PEXPIRE', seen, redis.call('PTTL', seen)) end
return replies
""",
    durable=True,
)

# KEYS: stream, erased, floor, people, then the index of each slate; ARGV: index TTL, what those allow who said nothing,
# then of each slate person, time, subject, payload and address. Returns for each the stream id, or false for an erased
# past and where slates serve no purpose that is allowed.
IMPRESSION_APPEND = Script.of(
    _ADD
    + """
local floor = tonumber(redis.call('GET', KEYS[3]) or 0)
local function append(index, person, at, subject, payload, address)
  if erased(KEYS[2], person, at) or purposes(KEYS[4], address, ARGV[2]) < 2 then return false end
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
"""
)

# KEYS: stream, people, rules; ARGV: address, what the person allows ('' where that stays as it is), '1' where profiles
# forget what came before; and where their rules change the new ones, for profiles and in words ('' for none). Returns
# the id of the marker, by which consumers meet it in order. Works while memory is full.
PERSON_MARK = Script.of(
    "#!lua flags=allow-oom\n"
    + _ADD
    + """
local fields = {'k', ARGV[1], 'c', ARGV[2], 'f', ARGV[3]}
if ARGV[4] then fields[7], fields[8] = 'b', ARGV[4] end
local mark = add(KEYS[1], unpack(fields))
if ARGV[4] then redis.call('HSET', KEYS[3], ARGV[1], mark .. ' ' .. ARGV[5]) end
local allowed, at, forgotten = said(KEYS[2], ARGV[1])
if ARGV[2] ~= '' then allowed, at = ARGV[2], mark end
if ARGV[3] == '1' then forgotten = mark end
redis.call('HSET', KEYS[2], ARGV[1], allowed .. ' ' .. at .. ' ' .. forgotten)
return mark
""",
    durable=True,
)

# KEYS: stream, index; ARGV: stream id of an event, address. Deletes the event, and tells consumers which it was.
EVENT_UNDO = Script.of(
    "#!lua flags=allow-oom\n"
    + _ADD
    + """
add(KEYS[1], 'k', ARGV[2], 'u', ARGV[1])
redis.call('LREM', KEYS[2], 0, 'e' .. ARGV[1])
return redis.call('XDEL', KEYS[1], ARGV[1])
""",
    durable=True,
)

# KEYS: stream, impressions, index, erased, people, rules; ARGV: person, address, '1' where what they did before now is
# refused from now on; and where nothing newer may be there, the newest of their index as it was read. Returns {id of
# the marker, events, impressions deleted}, or false where there is something newer. The marker makes consumers meet the
# erasure in order. Many are deleted at a time, for everybody on this server waits. Works while memory is full.
EVENT_ERASE = Script.of(
    "#!lua flags=allow-oom\n"
    + _ADD
    + """
if ARGV[4] and (redis.call('LINDEX', KEYS[3], -1) or '') ~= ARGV[4] then return false end
local marker = add(KEYS[1], 'x', ARGV[1], 'k', ARGV[2], 'f', '1', 'b', '')
redis.call('HDEL', KEYS[6], ARGV[2])
if ARGV[3] == '1' then
  redis.call('HSET', KEYS[4], ARGV[1], string.match(marker, '%d+'))
else
  local allowed, at = said(KEYS[5], ARGV[2])
  redis.call('HSET', KEYS[5], ARGV[2], allowed .. ' ' .. at .. ' ' .. marker)
end
local noted, deleted = {e = {}, i = {}}, {e = 0, i = 0}
for _, name in ipairs(redis.call('LRANGE', KEYS[3], 0, -1)) do
  local ids = noted[string.sub(name, 1, 1)]
  ids[#ids + 1] = string.sub(name, 2)
end
for kind, ids in pairs(noted) do
  for at = 1, #ids, 1000 do
    local gone = redis.call('XDEL', kind == 'e' and KEYS[1] or KEYS[2], unpack(ids, at, math.min(at + 999, #ids)))
    deleted[kind] = deleted[kind] + gone
  end
end
redis.call('DEL', KEYS[3])
return {marker, deleted.e, deleted.i}
""",
    durable=True,
)

# KEYS: returned, erased; ARGV: time in ms after which nobody is waited for any more, then of each who is back their
# name, person and the time of that. An erased name waits nowhere.
PERSON_RETURN = Script.of(
    _ADD
    + """
for at = 2, #ARGV, 3 do
  if not erased(KEYS[2], ARGV[at + 1], ARGV[at + 2]) then redis.call('SADD', KEYS[1], ARGV[at]) end
end
return redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)

# KEYS: stream; ARGV: group. Makes the group, from the oldest entry on, unless it is there.
LOG_JOIN = Script.of("""#!lua flags=allow-oom
local made = redis.pcall('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
if made.err and not string.find(made.err, 'BUSYGROUP', 1, true) then return made end
return 1
""")

# KEYS: stream, lease; ARGV: owner, lease in ms, group, count, from. Returns false while another owns the partition.
# Reading under the lease in one step is what makes "everything before this batch was applied" true: an owner that slept
# past its lease reads nothing more, and as all owners are one consumer, what it did read is pending for the next one.
# A full memory is no reason to stop reading: only that empties it.
LOG_CLAIM = Script.of("""#!lua flags=allow-oom
local owner = redis.call('GET', KEYS[2])
if owner and owner ~= ARGV[1] then return false end
if redis.call('PTTL', KEYS[2]) < tonumber(ARGV[2]) / 2 then redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2]) end
local read = redis.call('XREADGROUP', 'GROUP', ARGV[3], 'owner', 'COUNT', ARGV[4], 'STREAMS', KEYS[1], ARGV[5])
return read and read[1][2] or {}
""")

# KEYS: lease; ARGV: owner.
LOG_RELEASE = Script.of("if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0")

# KEYS: stream, impressions, floor; ARGV: time in ms up to which events go, the same of slates, the time of what no
# index need tell of, most entries of a stream to delete. Returns the number of events and of slates deleted. Works
# while memory is full. `~` is exact: a node holds one entry.
LOG_TRIM = Script.of("""#!lua flags=allow-oom
redis.call('SET', KEYS[3], ARGV[3])
local slates = redis.call('XTRIM', KEYS[2], 'MINID', '~', ARGV[2], 'LIMIT', ARGV[4])
return {redis.call('XTRIM', KEYS[1], 'MINID', '~', ARGV[1], 'LIMIT', ARGV[4]), slates}
""")

# KEYS: meta; ARGV: for how long entries stay, time in ms for which the index of a user is kept. Of the latter the
# shortest that ever was is remembered, for an index may have expired by it.
LOG_TIMES = Script.of("""#!lua flags=allow-oom
local shortest = redis.call('HGET', KEYS[1], 'index_ms')
if not shortest or tonumber(shortest) > tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], 'index_ms', ARGV[2]) end
return redis.call('HSET', KEYS[1], 'times', ARGV[1])
""")

# KEYS: certificate, certificates that lack a date; ARGV: name of the certificate, names and values of its fields.
CERTIFICATE_ISSUE = Script.of(
    """#!lua flags=allow-oom
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
return redis.call('SADD', KEYS[2], ARGV[1])
""",
    durable=True,
)

# KEYS: hash; ARGV: names and values. A full Redis takes them too: they are what lets it become less full.
HASH_SET = Script.of("""#!lua flags=allow-oom
return redis.call('HSET', KEYS[1], unpack(ARGV))
""")

# KEYS: hash; ARGV: name, value that may be replaced ('' for none), new value ('' removes it). Returns the value now.
HASH_CHOOSE = Script.of("""#!lua flags=allow-oom
local now = redis.call('HGET', KEYS[1], ARGV[1]) or ''
if now ~= ARGV[2] then return now end
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end
return ARGV[3]
""")

# KEYS: certificate; ARGV: log id it must be of, name, value. Does nothing to one that was issued again meanwhile.
CERTIFICATE_DATE = Script.of("""#!lua flags=allow-oom
if redis.call('HGET', KEYS[1], 'log_id') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 1
""")

# KEYS: version, items, stream; ARGV: length of the stream, then kind, item and payload of each change.
# Returns the version, and the places of changes that are not made. What changed stands in the hash, the latest only,
# one field per item and kind: a put or a delete is the whole truth of an item, an availability or a patch adds to it,
# but to no deleted item. A patch is `name:version-place:size:value` of each of its fields, the newest of each.
# The stream only names the fields of the hash that a version changed.
CATALOG_PUT = Script.of(
    """
local function merged(stored, change, stamp)
  local fields = {}
  local function read(text, from, new)
    while from <= #text do
      local _, colon, name, old, size = string.find(text, '^([%w_]+):([%d-]+):(%d+):', from)
      from = colon + 1 + size
      fields[name] = (new or old) .. ':' .. size .. ':' .. string.sub(text, colon + 1, from - 1)
    end
  end
  if stored then read(stored, string.find(stored, ':', 1, true) + 1) end
  read(change, 1, stamp)
  local out = {}
  for name, field in pairs(fields) do out[#out + 1] = name .. ':' .. field end
  return table.concat(out)
end
local version, names, refused = false, {}, {}
for at = 2, #ARGV, 3 do
  local kind, item, payload = ARGV[at], ':' .. ARGV[at + 1], ARGV[at + 2]
  local place = (at - 2) / 3
  local adds = kind == 'availability' or kind == 'patch'
  if adds and redis.call('HEXISTS', KEYS[2], 'delete' .. item) == 1 then
    refused[#refused + 1] = place
  else
    version = version or redis.call('INCR', KEYS[1])
    if not adds then
      redis.call('HDEL', KEYS[2], 'put' .. item, 'delete' .. item, 'availability' .. item, 'patch' .. item)
    end
    local stamp = string.format('%d-%d', version, place)
    if kind == 'patch' then payload = merged(redis.call('HGET', KEYS[2], 'patch' .. item), payload, stamp) end
    redis.call('HSET', KEYS[2], kind .. item, stamp .. ':' .. payload)
    names[#names + 1] = kind .. item
    names[#names + 1] = ''
  end
end
if version then redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[1], version .. '-0', unpack(names)) end
return {version or redis.call('GET', KEYS[1]) or 0, refused}
""",
    durable=True,
)

# KEYS: workers; ARGV: worker, version, time in ms after which it is forgotten.
CATALOG_APPLIED = Script.of("""#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%s:%.0f', ARGV[2], now))
local all = redis.call('HGETALL', KEYS[1])
for at = 1, #all, 2 do
  local seen = tonumber(string.match(all[at + 1], ':(%d+)'))
  if now - seen > tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], all[at]) end
end
return 1
""")

# KEYS: workers; ARGV: time in ms since its last sign for which a worker counts. Returns how many count, and the lowest
# version of these or false.
CATALOG_LOWEST = Script.of("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local count, lowest = 0, false
for _, said in ipairs(redis.call('HVALS', KEYS[1])) do
  local version, at = string.match(said, '(%d+):(%d+)')
  if now - tonumber(at) <= tonumber(ARGV[1]) then
    count, lowest = count + 1, math.min(lowest or tonumber(version), tonumber(version))
  end
end
return {count, lowest}
""")
