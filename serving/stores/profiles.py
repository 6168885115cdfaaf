"""Profiles on Redis: one round trip to read one, one idempotent insert to apply an event.

A person is one string, laid out in `features/profile.py`: `header | state | rules | tail`. Applying an event appends it
to the tail unless it is there, is folded already or was erased; only compaction moves entries from the tail into the
state.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal, TypeVar

import redis
from redis.exceptions import ResponseError

from features.controls import CONTROL, MAX_CONTROLS
from features.decayed_counts import MAX_STATE_SIZE
from features.errors import PenchantError, ProfileCorrupt, ProfileNewer
from features.profile import OLDER_ITEMS_CAP, RING, Profile, Purpose, StoredProfile, empty, fold
from features.profile_codec import HEADER_SIZE, REPAIR, decode, decode_consent, encode, encode_consent, is_newer, split
from features.records import ENTRY, EVENT, RECORD
from features.subjects import partition_of
from serving.errors import ProfileStoreUnavailable, ResourceExhausted, Unavailable
from serving.observability.telemetry import Telemetry
from serving.redis.client import Client
from serving.redis.connection import Request, Script, ScriptCall
from serving.redis.errors import serving_error
from serving.redis.router import RedisRouter, required
from serving.stores.keys import LIVE, META, SEQUENCE_BITS, address_of, partition_prefix
from serving.stores.log_entries import Mark
from serving.stores.meta import fixed_value, require_partitions
from serving.stores.scripts import (
    PROFILE_APPLY,
    PROFILE_COMPACT,
    PROFILE_EVICT,
    PROFILE_MARK,
    PROFILE_PUT,
    PROFILE_REPLACE,
)

TAIL_CAP = 4096
"""Entries a tail may hold before it has been folded; who produces more is not a person."""

T = TypeVar("T")
_ATTEMPTS = 3
_PATIENT_ATTEMPTS = 30
_CHUNK = 256
_EMPTY = encode(empty())
_NEWER = "a later version of Penchant wrote this profile, and this one leaves it alone; upgrade this process too"
_NEWER_PAUSE_MS = 1000
_NEVER = 1 << 52  # later than anything, ms
_EVERYBODY = b"penchant:{p*}:profile:*"
_AWAY = 5  # where in a header it stands that the state was dropped
_FOLDED = slice(16, 24)  # where in a header it stands up to which log id the state goes
_ERASED = slice(24, 32)  # where in a header it stands up to which log id events are refused
_LARGEST_STATE = RING * EVENT.itemsize + OLDER_ITEMS_CAP * 8 + MAX_STATE_SIZE + MAX_CONTROLS * CONTROL.itemsize + 64
_FRONT = HEADER_SIZE + 24  # what tells of the last event: the header, and the newest time in the state or a log id


class TailFull(ResourceExhausted):
    """A person produces events faster than they are folded; slow that person down."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of the entries of one person.

    Attributes:
        inserted: Number that are new; the others were there already or refused.
        refused: Number that belong to an erased past, or to a person who allows no personal answers.
        tail: Number of entries in the tail afterwards.
        away: Whether their state was dropped because they stayed away, and is to be made anew.
    """

    inserted: int
    refused: int
    tail: int
    away: bool = False


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
    """The profiles of everybody, in one Redis or cluster; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        partitions: int = 16,
        *,
        tail_cap: int = TAIL_CAP,
        cooldown_s: float = 0.5,
        telemetry: Telemetry | None = None,
        guarded: bool = False,
        beside: ProfileStore | None = None,
    ) -> None:
        """Takes a client of `redis_client.connect`; its timeout is the most that a dead Redis costs a request.

        Args:
            client: The profiles Redis.
            partitions: Partitions of the event log.
            tail_cap: Entries a tail may hold.
            cooldown_s: Longest pause between looks at a failed Redis; personal answers are back that long after it is.
            telemetry: Counts `profiles_corrupt`.
            guarded: Reads and writes nothing while a server could evict profiles; `look` has to be called regularly.
            beside: A store of the same Redis through other connections; one `look` is enough for both.
        """
        role: Literal["", "profiles"] = "profiles" if guarded else ""
        others: RedisRouter | None = beside._nodes if beside else None
        self.client = client
        self._nodes: RedisRouter = RedisRouter(
            client, ProfileStoreUnavailable, cooldown_s, self._refusal, guarded=role, beside=others
        )
        self._tail_cap, self._id = tail_cap, ""
        self._telemetry = telemetry or Telemetry()
        self._prefixes = [partition_prefix(partition) + b"profile:" for partition in range(partitions)]
        self._giant = HEADER_SIZE + _LARGEST_STATE + 2 * TAIL_CAP * ENTRY.itemsize

    def open(self) -> None:
        """Checks that the profiles there are spread over as many partitions, and remembers their number in new ones.

        Raises:
            ConfigError: They are not.
            ProfileStoreUnavailable: Redis does not answer.
        """
        require_partitions(self._nodes, len(self._prefixes))

    def check_safety(self) -> None:
        """Looks at the settings of every server, if the store is guarded.

        Raises:
            ProfileStoreUnavailable: A server does not answer, or is unsafe.
        """
        self._nodes.check_safety([META, *self._prefixes])

    def store_id(self) -> str:
        """The id of this store among the copies of the log; made when it is first asked for.

        A store that loses its data while it is in use keeps its id.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        self._id = fixed_value(self._nodes, "profiles_id", self._id or uuid.uuid4().hex).decode()
        return self._id

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
            self._telemetry.count("profiles_corrupt")
            raise

    def apply(self, subject: str, entries: Entries) -> Applied:
        """Inserts events of one person, each (log id, RECORD bytes), in any order; what is there already is left alone.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; some may have been inserted, a repeat is safe.
            TailFull: The person has too many events that are not folded yet.
            ResourceExhausted: Redis is full.
            ProfileCorrupt: What is stored is damaged; nothing was inserted.
        """
        return _applied(self._nodes.run(self._application(subject, entries)))

    def apply_many(self, batch: Sequence[tuple[str, Entries]]) -> list[Applied | PenchantError]:
        """`apply` for many people in one round trip; an error that concerns some of them stands in their place.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; some may have been inserted, a repeat is safe.
        """
        replies = self._nodes.run_all([self._application(subject, entries) for subject, entries in batch])
        return [reply if isinstance(reply, PenchantError) else _applied(reply) for reply in replies]

    def compact(self, subject: str, up_to: int, at_least: int = 1, *, dropped_too: bool = True) -> int:
        """Folds the entries of a tail with log ids up to `up_to` into the state; only the projector may call it.

        Args:
            subject: The person.
            up_to: Every event of the person's partition up to here has been applied: none may come late.
            at_least: Number of entries below which it is not worth it.
            dropped_too: Whether to fold also where the state was dropped and not made anew; it never is then.

        Returns:
            The number folded; 0 where there are too few, or others kept changing the profile.

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
            if due.size < at_least or (stored.evicted and not dropped_too):
                return 0
            folded = fold(stored.state, due["record"], int(due["log_id"][-1]))
            end = HEADER_SIZE + int.from_bytes(blob[8:12], "little")
            new = encode(folded, *stored.versions)
            seen = (blob[:HEADER_SIZE], blob[end - 4 : end])
            if self._nodes.run(self._call(PROFILE_COMPACT, subject, *seen, new, due["log_id"].tobytes())):
                return int(due.size)
        return 0

    def erase(self, subject: str, before: int) -> int:
        """Forgets the person's events up to a log id and refuses them for ever; later ones in the tail stay.

        Returns:
            The number of events forgotten.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        mark = Mark(before, address_of(subject), forget=True, rules=b"")
        return self.mark(partition_of(subject, len(self._prefixes)), mark)

    def mark(self, partition: int, mark: Mark) -> int:
        """Brings a mark of the log into a profile; in any order, a repeat is safe.

        Returns:
            The number of events forgotten by it.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        return self.mark_many([(partition, mark)])[0]

    def mark_many(self, marks: Sequence[tuple[int, Mark]]) -> list[int]:
        """`mark` for many, each with its partition, in few round trips.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        forgotten: list[int] = []
        for chunk in _chunks(marks, _CHUNK):
            calls = [self._marking(partition, mark) for partition, mark in chunk]
            forgotten += map(int, required(self._nodes.run_all(calls)))
        return forgotten

    def replace(self, subject: str, change: Callable[[StoredProfile], Profile]) -> Profile | None:
        """Puts a changed profile, with everything folded, in the place of the one there is.

        Args:
            subject: The person.
            change: Makes the new profile of the old; is asked again where others changed the old one meanwhile.

        Returns:
            The new one; None for nobody.

        Raises:
            ProfileStoreUnavailable: Redis does not answer, or others will not stop changing it; a repeat is safe.
            ProfileCorrupt: What is stored is damaged.
        """
        for _ in range(_PATIENT_ATTEMPTS):
            blob = self._blob(subject)
            if not blob:
                return None
            stored = split(blob)
            profile = change(stored)
            new = encode(profile, *stored.versions)
            if self._nodes.run(self._call(PROFILE_REPLACE, subject, blob, new)):
                return profile
        raise ProfileStoreUnavailable("this profile keeps changing; try again", retry_after_ms=1000)

    def erased_before(self, subjects: Sequence[str]) -> list[int]:
        """For each person the log id up to which events are refused, 0 where nothing was erased.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        return [int.from_bytes(head[_ERASED], "big") for head in self._heads(subjects)]

    def dropped(self, subjects: Sequence[str]) -> dict[str, int]:
        """Those whose state was dropped because they stayed away, with the log id up to which it went.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        heads = dict(zip(subjects, self._heads(subjects), strict=True))
        away = {subject: head for subject, head in heads.items() if len(head) == HEADER_SIZE and head[_AWAY] == 1}
        return {subject: int.from_bytes(head[_FOLDED], "big") for subject, head in away.items()}

    def _heads(self, subjects: Sequence[str]) -> Sequence[bytes]:
        """The header of each person's profile, nothing for nobody."""
        wanted: list[Request] = [("GETRANGE", self.key_of(subject), 0, HEADER_SIZE - 1) for subject in subjects]
        return required([b"" if isinstance(reply, ProfileCorrupt) else reply for reply in self._nodes.run_all(wanted)])

    def put_states(self, states: Iterable[tuple[str, Profile]]) -> Loaded:
        """Stores states made elsewhere, many in a round trip; entries of tails that they do not contain stay.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
            ResourceExhausted: Redis is full.
        """
        written = total = 0
        for chunk in _chunks(states, _CHUNK):
            calls = [self._call(PROFILE_PUT, subject, encode(profile)) for subject, profile in chunk]
            for (subject, profile), reply in zip(chunk, required(self._nodes.run_all(calls)), strict=True):
                written += reply or self._mend(subject, profile)
            total += len(calls)
        return Loaded(written, total - written)

    def _mend(self, subject: str, profile: Profile) -> int:
        """Replaces a profile that was kept although it is damaged; 1 where it was, else 0."""
        blob = self._nodes.command("GET", self.key_of(subject)) or b""
        if is_newer(blob):
            raise ProfileStoreUnavailable(_NEWER, retry_after_ms=_NEWER_PAUSE_MS)
        try:
            split(blob)
        except ProfileCorrupt:
            consent = _consent(blob)
            kept = profile if consent is None or Purpose.PERSONALISE in consent else replace(empty(), lost=profile.lost)
            new = encode(replace(kept, consent=consent), *_marks(blob))
            return int(self._nodes.run(self._call(PROFILE_REPLACE, subject, blob, new)))
        return 0

    def set_aside(self, subject: str) -> bool:
        """Puts a profile whose past is lost in the place of a damaged one, so that what the user says next holds.

        It keeps what the damaged header says of consent, and up to where it forgets.

        Returns:
            True where it was damaged.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        return bool(self._mend(subject, replace(empty(), lost=True)))

    def damaged(self, subjects: Sequence[str]) -> list[str]:
        """Those whose profile cannot be read, or has lost its past.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        wanted: list[Request] = [("GETRANGE", self.key_of(subject), 0, self._giant) for subject in subjects]
        replies = self._nodes.run_all(wanted)
        broken = [isinstance(reply, ProfileCorrupt) for reply in replies]
        required([reply for reply, bad in zip(replies, broken, strict=True) if not bad])
        return [
            subject
            for subject, bad, blob in zip(subjects, broken, replies, strict=True)
            if bad or (blob and _is_damaged(blob))
        ]

    def start_over(self, subject: str) -> None:
        """Leaves of a damaged profile what can be read and has lost nothing, so that the rest can be applied again.

        That is its state, or else nothing but consent; marks of the log bring the rest of what the user said.

        Raises:
            ProfileStoreUnavailable: Redis does not answer, or others will not stop changing it; a repeat is safe.
        """
        # A mark of nothing: a value that is no profile at all gives way to one whose past is lost.
        self.mark(partition_of(subject, len(self._prefixes)), Mark(0, address_of(subject)))
        for _ in range(_PATIENT_ATTEMPTS):
            blob = self._blob(subject)
            if self._nodes.run(self._call(PROFILE_REPLACE, subject, blob, _readable(blob))):
                return
        raise ProfileStoreUnavailable("this profile keeps changing; try again", retry_after_ms=1000)

    def leave(self, before_ms: int) -> int:
        """Drops the events of everybody whose newest one is from before a time; what they allow and want stays.

        Who allows personal answers and nothing else is in no warehouse, from which they could come back: they stay.

        Args:
            before_ms: The time, ms: of arrival for what came live, of the event itself for what was imported.

        Returns:
            The number of profiles dropped; those of a Redis that is away wait for the next time.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        dropped: list[int] = []

        def sweep(client: redis.Redis) -> None:
            for keys in _chunks(client.scan_iter(_EVERYBODY, count=1000), _CHUNK):
                dropped.append(self._leave(keys, before_ms))

        self._nodes.at_each(self._prefixes, sweep)
        return sum(dropped)

    def _leave(self, keys: Sequence[bytes], before_ms: int) -> int:
        wanted: list[Request] = [("GETRANGE", key, 0, _FRONT - 1) for key in keys]
        idle = [
            ScriptCall(PROFILE_EVICT, (key,), (_EMPTY, front[:HEADER_SIZE], before_ms))
            for key, front in zip(keys, self._nodes.run_all(wanted), strict=True)
            if isinstance(front, bytes) and len(front) == _FRONT and not is_newer(front)
            if _last_seen(front) < before_ms and _elsewhere(front)
        ]
        return sum(reply == 1 for reply in self._nodes.run_all(idle)) if idle else 0

    def leave_again(self, subject: str) -> bool:
        """Drops also what came since from somebody whose state was dropped, to be made anew with it; whether it did.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        [head] = self._heads([subject])
        if len(head) < HEADER_SIZE or head[_AWAY] != 1:
            return False
        return bool(self._nodes.run(self._call(PROFILE_EVICT, subject, head, _NEVER)))

    def run_ids(self) -> list[str]:
        """Per partition, what changes when its Redis was started again, and so may have lost its last two seconds.

        Empty where it is away.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        found = self._nodes.at_each(self._prefixes, lambda node: str(node.info("server")["run_id"]))
        return ["" if isinstance(one, Unavailable) else one for one in found]

    def _blob(self, subject: str) -> bytes:
        blob: bytes = self._nodes.command("GETRANGE", self.key_of(subject), 0, self._giant)
        if is_newer(blob):
            raise ProfileStoreUnavailable(_NEWER, retry_after_ms=_NEWER_PAUSE_MS)
        if len(blob) > self._giant:
            self._telemetry.count("profiles_corrupt")
            raise ProfileCorrupt(f"a stored profile has more than {self._giant} bytes, which none can have; {REPAIR}")
        return blob

    def _application(self, subject: str, entries: Entries) -> ScriptCall:
        packed = b"".join(log_id.to_bytes(8, "big") + record for log_id, record in entries)
        if len(packed) != len(entries) * ENTRY.itemsize:
            raise ValueError(f"a record has {RECORD.itemsize} bytes")
        return self._call(PROFILE_APPLY, subject, packed, self._tail_cap)

    def _marking(self, partition: int, mark: Mark) -> ScriptCall:
        consent = b"" if mark.consent is None else encode_consent(mark.consent)
        rules = (0, b"") if mark.rules is None else (1, mark.rules)
        arguments = (_EMPTY, mark.log_id.to_bytes(8, "big"), consent, int(mark.forget), *rules)
        return ScriptCall(PROFILE_MARK, (self._prefixes[partition] + mark.address,), arguments)

    def _call(self, script: Script, subject: str, *arguments: bytes | int) -> ScriptCall:
        return ScriptCall(script, (self.key_of(subject),), (_EMPTY, *arguments))

    def key_of(self, subject: str) -> bytes:
        """The key of a person's profile; it names nobody."""
        return self._prefixes[partition_of(subject, len(self._prefixes))] + address_of(subject)

    def _refusal(self, error: ResponseError) -> PenchantError:
        """What an error reply about one person means."""
        message = str(error)
        if "NEWER" in message:
            return ProfileStoreUnavailable(_NEWER, retry_after_ms=_NEWER_PAUSE_MS)
        if "CORRUPT" in message or "WRONGTYPE" in message:
            self._telemetry.count("profiles_corrupt")
            return ProfileCorrupt(f"the stored profile is damaged ({message}); {REPAIR}")
        if "TAILFULL" in message:
            reason = "this person sends events faster than they are folded; slow down"
            return TailFull(reason, field="subject", retry_after_ms=1000)
        return serving_error(error, ProfileStoreUnavailable)


def _is_damaged(blob: bytes) -> bool:
    try:
        return split(blob).state.lost
    except ProfileNewer:
        return False
    except ProfileCorrupt:
        return True


def _readable(blob: bytes) -> bytes:
    """A stored profile without its tail, and without a state that is damaged or has lost its past."""
    end = HEADER_SIZE + int.from_bytes(blob[8:12], "little") + int.from_bytes(blob[12:16], "little")
    try:
        stored = split(blob[:end])
    except ProfileCorrupt:
        return encode(replace(empty(), consent=_consent(blob)), *_marks(blob))
    state = stored.state
    kept = replace(empty(), consent=state.consent, controls=state.controls) if state.lost else state
    return encode(kept, *stored.versions)


def _consent(blob: bytes) -> Purpose | None:
    """What the header of a damaged profile still says of consent: nothing is allowed where that is damaged too."""
    try:
        return decode_consent(blob[6:8])
    except ProfileCorrupt:
        return Purpose(0)


def _marks(blob: bytes) -> tuple[int, int]:
    """Up to where a damaged profile forgets, and when the person said what they allow."""
    return int.from_bytes(blob[_ERASED], "big"), int.from_bytes(blob[_ERASED.stop : _ERASED.stop + 8], "big")


def _last_seen(front: bytes) -> int:
    """When the newest event of a state came, ms; without one, when the first of the tail did, 0 where rules hide it."""
    if not int.from_bytes(front[8:12], "little"):
        hidden = int.from_bytes(front[12:16], "little")
        return 0 if hidden else int.from_bytes(front[HEADER_SIZE : HEADER_SIZE + 8], "big") >> SEQUENCE_BITS
    version = int.from_bytes(front[_FOLDED], "big")
    newest = int.from_bytes(front[HEADER_SIZE + 16 : _FRONT], "little", signed=True)
    return version >> SEQUENCE_BITS if version >= LIVE else newest


def _elsewhere(front: bytes) -> bool:
    """Whether the person lets anybody but the profile keep their events."""
    consent = _consent(front)
    return consent is None or bool(consent & (Purpose.TRAIN | Purpose.MEASURE))


def _applied(reply: Sequence[int]) -> Applied:
    inserted, refused, tail, away = reply
    return Applied(inserted, refused, tail, bool(away))


def _chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk
