"""Profiles on Redis: one round trip to read one, one idempotent insert to apply an event.

A person is one string, laid out in `features/profile.py`: `header | state | tail`. Applying an event appends it to the
tail unless it is there, is folded already or was erased; only compaction moves entries from the tail into the state.
Log ids do not fit the numbers of Lua, so scripts compare them as two halves of 32 bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import redis
from redis.exceptions import ResponseError

from features.errors import PenchantError, ProfileCorrupt
from features.profile import (
    ENTRY,
    EVICTED_CAP,
    HEADER_SIZE,
    RECORD,
    RING,
    Profile,
    decode,
    empty,
    encode_state,
    fold,
    header,
    split,
)
from serving.errors import ProfileStoreUnavailable, ResourceExhausted
from serving.redis_client import Breaker, Call, Script, command, partition_prefix, run, run_all, serving_error
from serving.telemetry import Telemetry

TAIL_CAP = 4096
"""Entries a tail may hold before it has been folded; who produces more is not a person."""

LIVE = 1 << 40
"""Log ids from here on come from the live log; bulk import counts from 1."""

T = TypeVar("T")
_ATTEMPTS = 3
_CHUNK = 256
_EMPTY = header(0, 0)
_LARGEST_STATE = RING * RECORD.itemsize + EVICTED_CAP * 8 + 64

_WORDS = f"""
local ENTRY, HEADER = {ENTRY.itemsize}, {HEADER_SIZE}
local function at_most(h1, l1, h2, l2) return h1 < h2 or (h1 == h2 and l1 <= l2) end
local function holds(ids, id, width)
  local found = string.find(ids, id, 1, true)
  while found and (found - 1) % width ~= 0 do found = string.find(ids, id, found + 1, true) end
  return found
end
local function stored(key, blank)
  local head = redis.call('GETRANGE', key, 0, HEADER - 1)
  if head == '' then return nil, '' end
  if #head < HEADER or string.sub(head, 1, 6) ~= string.sub(blank, 1, 6) then return head, nil end
  local tail = redis.call('GETRANGE', key, HEADER + struct.unpack('<I4', head, 9), -1)
  if #tail % ENTRY ~= 0 then return head, nil end
  return head, tail
end
"""

# KEYS: person; ARGV: empty header, entries, cap. Returns {inserted, refused, entries in the tail}.
_APPLY = Script.of(
    _WORDS
    + """
local head, tail = stored(KEYS[1], ARGV[1])
if not tail then return redis.error_reply('CORRUPT not a stored profile') end
local vh, vl, eh, el = 0, 0, 0, 0
if head then vh, vl, eh, el = struct.unpack('>I4I4I4I4', head, 17) end
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
  if head then redis.call('APPEND', KEYS[1], table.concat(new)) else redis.call('SET', KEYS[1], ARGV[1] .. tail) end
end
return {#new, refused, #tail / ENTRY}
"""
)

# KEYS: person; ARGV: empty header, header and end of the state as read, new header and state, ids folded into it.
# Returns 1, or 0 where the state or the entries to fold are no longer those that were read.
_COMPACT = Script.of(
    _WORDS
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
# A state of live events gives way only to one that goes as far; an erased past stays erased; damage is overwritten.
_PUT = Script.of(
    _WORDS
    + f"local LIVE = {LIVE >> 32}"
    + """
local read, head, tail = pcall(stored, KEYS[1], ARGV[1])
if not read or not head or not tail then
  redis.call('SET', KEYS[1], ARGV[2])
  return 1
end
local nh, nl = struct.unpack('>I4I4', ARGV[2], 17)
local vh, vl, eh, el = struct.unpack('>I4I4I4I4', head, 17)
if (eh > 0 or el > 0) and at_most(nh, nl, eh, el) then return 0 end
if vh >= LIVE and not at_most(vh, vl, nh, nl) then return 0 end
local parts = {string.sub(ARGV[2], 1, 24), string.sub(head, 25, HEADER), string.sub(ARGV[2], HEADER + 1)}
for at = 1, #tail, ENTRY do
  local h, l = struct.unpack('>I4I4', tail, at)
  if not at_most(h, l, nh, nl) then parts[#parts + 1] = string.sub(tail, at, at + ENTRY - 1) end
end
redis.call('SET', KEYS[1], table.concat(parts))
return 1
"""
)

# KEYS: person; ARGV: empty header, tombstone. Returns the number of events forgotten. Works while memory is full.
_ERASE = Script.of(
    "#!lua flags=allow-oom\n"
    + _WORDS
    + """
local read, head, tail = pcall(stored, KEYS[1], ARGV[1])
if not read or not head or not tail then
  redis.call('SET', KEYS[1], ARGV[2])
  return 0
end
local eh, el = struct.unpack('>I4I4', head, 25)
local nh, nl = struct.unpack('>I4I4', ARGV[2], 25)
if at_most(nh, nl, eh, el) then return 0 end
local forgotten = 0
if struct.unpack('<I4', head, 9) > 0 then
  forgotten = struct.unpack('<I4', redis.call('GETRANGE', KEYS[1], HEADER, HEADER + 3))
end
local kept = {ARGV[2]}
for at = 1, #tail, ENTRY do
  local h, l = struct.unpack('>I4I4', tail, at)
  if at_most(h, l, nh, nl) then
    forgotten = forgotten + 1
  else
    kept[#kept + 1] = string.sub(tail, at, at + ENTRY - 1)
  end
end
redis.call('SET', KEYS[1], table.concat(kept))
return forgotten
"""
)


class TailFull(ResourceExhausted):
    """A person produces events faster than they are folded; slow that person down."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of the entries of one person.

    Attributes:
        inserted: Number that are new; the others were there already or refused.
        refused: Number that belong to an erased past.
        tail: Number of entries in the tail afterwards.
    """

    inserted: int
    refused: int
    tail: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of states that were loaded in bulk.

    Attributes:
        written: Number stored.
        kept: Number not stored, because the person has newer live events or erased their past.
    """

    written: int
    kept: int


Entries = Sequence[tuple[int, bytes]]


class ProfileStore:
    """The profiles of everybody, in one Redis; any thread may call anything."""

    def __init__(
        self,
        client: redis.Redis,
        partitions: int = 16,
        *,
        tail_cap: int = TAIL_CAP,
        cooldown_s: float = 0.5,
        telemetry: Telemetry | None = None,
    ) -> None:
        """Takes a client of `redis_client.connect`; its timeout is the most that a dead Redis costs a request.

        Args:
            client: The profiles Redis.
            partitions: Partitions of the event log.
            tail_cap: Entries a tail may hold.
            cooldown_s: Pause between looks at a failed Redis; personal answers are back that long after it is.
            telemetry: Counts `profile_corrupt`.
        """
        self._client = client
        self._tail_cap = tail_cap
        self._breaker = Breaker(ProfileStoreUnavailable, cooldown_s)
        self._telemetry = telemetry or Telemetry()
        self._prefixes = [partition_prefix(partition) + b"profile:" for partition in range(partitions)]
        self._giant = HEADER_SIZE + _LARGEST_STATE + tail_cap * ENTRY.itemsize

    def read(self, subject: str) -> Profile:
        """The profile of a person, with every applied event; the empty one for nobody. One round trip.

        Raises:
            ProfileStoreUnavailable: Redis does not answer in time, or did not a moment ago.
            ProfileCorrupt: What is stored is damaged or far too large; the person counts as new.
        """
        blob = self._blob(subject)
        if not blob:
            return empty()
        try:
            return decode(blob)
        except ProfileCorrupt:
            self._telemetry.count("profile_corrupt")
            raise

    def apply(self, subject: str, entries: Entries) -> Applied:
        """Inserts events of one person, each (log id, RECORD bytes), in any order; what is there already is left alone.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; some may have been inserted, a repeat is safe.
            TailFull: The person has too many events that are not folded yet.
            ResourceExhausted: Redis is full.
            ProfileCorrupt: What is stored is damaged; nothing was inserted.
        """
        with self._breaker:
            try:
                return Applied(*run(self._client, self._application(subject, entries)))
            except ResponseError as error:
                raise self._refusal(error) from error

    def apply_many(self, batch: Sequence[tuple[str, Entries]]) -> list[Applied | PenchantError]:
        """`apply` for many people in one round trip; an error that concerns one person stands in their place.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; some may have been inserted, a repeat is safe.
        """
        with self._breaker:
            replies = run_all(self._client, [self._application(subject, entries) for subject, entries in batch])
        return [self._refusal(reply) if isinstance(reply, ResponseError) else Applied(*reply) for reply in replies]

    def compact(self, subject: str, up_to: int) -> int:
        """Folds the entries of a tail with log ids up to `up_to` into the state; only the projector may call it.

        Args:
            subject: The person.
            up_to: Every event of the person's partition up to here has been applied: none may come late.

        Returns:
            The number folded; 0 also where others kept changing the profile meanwhile.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
            ProfileCorrupt: What is stored is damaged.
        """
        for _ in range(_ATTEMPTS):
            blob = self._blob(subject)
            if not blob:
                return 0
            stored = split(blob)
            due = stored.tail[stored.tail["log_id"] <= up_to]
            if not due.size:
                return 0
            folded = fold(stored.state, due["record"], int(due["log_id"][-1]))
            state = encode_state(folded)
            end = HEADER_SIZE + int.from_bytes(blob[8:12], "little")
            new = header(len(state), folded.version, stored.erased_before) + state
            seen = (blob[:HEADER_SIZE], blob[end - 4 : end])
            with self._breaker:
                if run(self._client, self._call(_COMPACT, subject, *seen, new, due["log_id"].tobytes())):
                    return int(due.size)
        return 0

    def erase(self, subject: str, before: int) -> int:
        """Forgets the person's events up to a log id and refuses them for ever; later ones in the tail stay.

        Returns:
            The number of events forgotten.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        with self._breaker:
            return int(run(self._client, self._call(_ERASE, subject, header(0, 0, before))))

    def erased_before(self, subjects: Sequence[str]) -> list[int]:
        """For each person the log id up to which events are refused, 0 where nothing was erased.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        with self._breaker, self._client.pipeline(transaction=False) as pipeline:
            for subject in subjects:
                command(pipeline, "GETRANGE", self._key(subject), HEADER_SIZE - 8, HEADER_SIZE - 1)
            replies = pipeline.execute(raise_on_error=False)
        return [int.from_bytes(reply, "big") if isinstance(reply, bytes) else 0 for reply in replies]

    def put_states(self, states: Iterable[tuple[str, Profile]]) -> Loaded:
        """Stores states made elsewhere, many in a round trip; entries of tails that they do not contain stay.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
            ResourceExhausted: Redis is full.
        """
        written = total = 0
        for chunk in _chunks(states, _CHUNK):
            calls = []
            for subject, profile in chunk:
                state = encode_state(profile)
                calls.append(self._call(_PUT, subject, header(len(state), profile.version) + state))
            with self._breaker:
                replies = run_all(self._client, calls)
            for reply in replies:
                if isinstance(reply, ResponseError):
                    raise serving_error(reply, ProfileStoreUnavailable) from reply
                written += reply
            total += len(calls)
        return Loaded(written, total - written)

    def run_id(self) -> str:
        """Changes when Redis was started again, and so may have lost its last two seconds.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        with self._breaker:
            return str(self._client.info("server")["run_id"])

    def _blob(self, subject: str) -> bytes:
        with self._breaker:
            try:
                blob: bytes = command(self._client, "GETRANGE", self._key(subject), 0, self._giant)
            except ResponseError as error:
                raise self._refusal(error) from error
        if len(blob) > self._giant:
            self._telemetry.count("profile_corrupt")
            raise ProfileCorrupt(f"a stored profile has more than {self._giant} bytes, which none can have")
        return blob

    def _application(self, subject: str, entries: Entries) -> Call:
        packed = b"".join(log_id.to_bytes(8, "big") + record for log_id, record in entries)
        if len(packed) != len(entries) * ENTRY.itemsize:
            raise ValueError(f"a record has {RECORD.itemsize} bytes")
        return self._call(_APPLY, subject, packed, self._tail_cap)

    def _call(self, script: Script, subject: str, *arguments: bytes | int) -> Call:
        return Call(script, (self._key(subject),), (_EMPTY, *arguments))

    def _key(self, subject: str) -> bytes:
        name = subject.encode()
        return self._prefixes[zlib.crc32(name) % len(self._prefixes)] + name

    def _refusal(self, error: ResponseError) -> PenchantError:
        """What an error reply about one person means."""
        message = str(error)
        if "CORRUPT" in message or "WRONGTYPE" in message:
            self._telemetry.count("profile_corrupt")
            return ProfileCorrupt(f"the stored profile is damaged ({message}); rebuild it: penchant profiles rebuild")
        if "TAILFULL" in message:
            return TailFull("this person sends events faster than they are folded; slow down", retry_after_ms=1000)
        return serving_error(error, ProfileStoreUnavailable)


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk
