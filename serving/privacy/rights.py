"""What people may ask for about themselves: consent, rules, erasure, a copy of everything, one identity, a fresh start.

The log is told first, always: it refuses by what it was told, and whatever fails after that the projector does later,
because what it was told stands among the events as a mark.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from features import controls
from features.clock import now_ms
from features.controls import CONTROL, ControlKind, Dial
from features.errors import PenchantError, ProfileCorrupt
from features.keys import item_key
from features.profile import ENTRY, EVERY_PURPOSE, Profile, Purpose, Retention, StoredProfile, refold
from features.subjects import is_anonymous, partition_of
from serving.errors import ConfigError, ConsentWithheld, FailedPrecondition, NotFound, Unavailable
from serving.experiments import seed_of
from serving.folder_identity import HOST, read_identity
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.ledger import Erasure, Ledger, new_certificate_id
from serving.redis.client import Call, Request
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.event_scripts import EVENT_UNDO, PERSON_MARK
from serving.stores.keys import address_of, log_id, stream_id
from serving.stores.log_codec import decode, reassigned
from serving.stores.log_entries import Entry, LoggedEvent, LoggedImpression, Mark, sound
from serving.stores.log_erasure import LogErasure
from serving.stores.profiles import ProfileStore

Piece = tuple[str, int, bytes]
"""One thing held about a person: "event" or "impression", its log id, and all of it as JSON."""

_KINDS = ("event", "impression")
_SHARED_ARM = "ARM"
_ATTEMPTS = 30
_OF_A_PROFILE = frozenset({"profile_version", "features", "encoder_digest"})
"""Parts of a slate that say which profile it was made from: nobody else's is the same at that version."""


@dataclass(frozen=True, slots=True)
class Consent:
    """What a person allows.

    Attributes:
        purposes: What for their data may be used.
        said_at: Log id at which they said so; 0 where they said nothing and the default holds.
        forgotten: Log id up to which nothing may be in their profile, whatever other stores still hold; 0 for none.
    """

    purposes: Purpose
    said_at: int
    forgotten: int


@dataclass(frozen=True, slots=True)
class Rule:
    """What a person does not want to be shown.

    Attributes:
        kind: What it is about.
        name: External id of the item or the creator, or the name of the category.
        until: When it ends, ms; 0 for never.
    """

    kind: ControlKind
    name: str
    until: int = 0


@dataclass(frozen=True, slots=True)
class Setting:
    """How a person turned a dial.

    Attributes:
        dial: The dial.
        name: External id of the creator, or name of the category that it is about; "" where it is about everything.
        value: How far.
    """

    dial: Dial
    name: str
    value: float


@dataclass(frozen=True, slots=True)
class SharedArm:
    """The arm of experiments that an anonymous user shares with the user they were merged into.

    Attributes:
        seed: As `experiments.seed_of` says of that user.
    """

    seed: int


@dataclass(frozen=True, slots=True)
class Merged:
    """What moved from one identity to the other.

    Attributes:
        events: Number of events that belong to the known person now, those of an earlier try included.
        impressions: Number of slates that do.
        refused: Number of events that the known person's own erasure refuses; they are gone.
        left_behind: Number of events in the visitor's profile that the log no longer held; they are forgotten.
        version: Version of the known person's profile that contains all of it; 0 where nothing moved.
        damaged: True where either profile failed its checks: of a damaged visitor `left_behind` is not known, and the
            known user's profile contains what moved once it is rebuilt.
        rules_left_out: Number of the visitor's rules and dials that do not hold for the known user: there was no room.
    """

    events: int
    impressions: int
    refused: int
    left_behind: int
    version: int
    damaged: bool = False
    rules_left_out: int = 0


class SubjectRights:
    """Does what people ask for, in the log and in the profiles; any thread may call anything."""

    def __init__(
        self,
        log: EventLog,
        store: ProfileStore,
        certificates: Certificates,
        retention: Retention | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Takes the stores.

        Args:
            log: The event log.
            store: The profiles, with a timeout that suits writing.
            certificates: Where erasures are certified.
            retention: How long events stay in a profile that is folded anew.
            ledger: Where erasures are noted beside the stores.
        """
        self._log, self._store, self._certificates, self._ledger = log, store, certificates, ledger
        self._log_erasure = LogErasure(log)
        self._retention = retention or Retention({})

    def consents(self, subjects: Sequence[str]) -> list[Consent]:
        """What each person allows; the one place to ask before data is used for training or for measuring.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return consents(self._log, subjects)

    def set_consent(self, subject: str, purposes: Purpose) -> tuple[int, bool]:
        """Sets what a person allows; without PERSONALISE their profile is emptied, and stays empty.

        Returns:
            The log id from which it holds, and whether the profile knows already.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        withheld = Purpose.PERSONALISE not in purposes
        # Without MEASURE nobody compares arms, and nothing of it may be kept.
        kept = self._arm_of(subject) if Purpose.MEASURE in purposes else []
        return self._mark(subject, purposes, withheld, kept if withheld else None)

    def rules(self, subject: str) -> tuple[list[Rule | Setting], int]:
        """How a person wants their answers made, and the log id at which they said so, 0 where they did not.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        stated, version = self._stated(subject)
        own = [one for one in stated if not isinstance(one, SharedArm)]
        return own, version if own or not stated else 0

    def _stated(self, subject: str) -> tuple[list[Rule | Setting | SharedArm], int]:
        """`rules`, the shared arm among them."""
        return _rules(self._log.nodes.command("HGET", self._log.keys_of(subject).rules, address_of(subject)))

    def set_rules(self, subject: str, rules: Sequence[Rule | Setting]) -> tuple[int, bool]:
        """Sets all that a person does not want to be shown, and all their dials. Returns as `set_consent`.

        Raises:
            ConsentWithheld: The person allows no personal answers, so none of this may be kept.
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        [consent] = self.consents([subject])
        if rules and Purpose.PERSONALISE not in consent.purposes:
            raise ConsentWithheld("this person allows no personal answers, so their rules are not kept")
        return self._mark(subject, None, forget=False, rules=[*rules, *self._arm_of(subject)])

    def reset(self, subject: str) -> tuple[int, bool]:
        """Empties a person's profile: what they did until now shapes no answer any more. Returns as `set_consent`.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
        """
        return self._mark(subject, None, forget=True)

    def undo(self, subject: str, event_id: str, deadline: float = math.inf) -> int:
        """Makes an event count no more: the profile is folded anew without it, the log deletes it.

        Args:
            subject: The user.
            event_id: The event.
            deadline: When to give up, with nothing changed, on the clock of `time.monotonic`, s.

        Returns:
            The version of the profile afterwards, 0 where there is none.

        Raises:
            NotFound: The log holds no such event of this user, or did not get it within `log_hours`.
            DeadlineExceeded: The log holds too much of this user to fold a profile from it in time.
            Unavailable: A Redis does not answer, or the profile is just being made anew; a repeat is safe.
            ProfileCorrupt: The stored profile is damaged; nothing was undone.
        """
        entry = self._found(subject, event_id)
        if entry is None:
            raise NotFound("the log holds no such event of this person; older ones cannot be undone", field="event_id")
        # The profile first: a repeat after a crash finds the event still in the log, and undoes it there.
        profile = self.refold(subject, frozenset((entry.log_id,)), deadline)
        keys = self._log.keys_of(subject)
        call = Call(
            EVENT_UNDO,
            (keys.events, self._log.index_of(subject)),
            (stream_id(entry.log_id), address_of(subject)),
        )
        self._log.nodes.run(call)
        return profile.version if profile else 0

    def refold(self, subject: str, undone: frozenset[int] = frozenset(), deadline: float = math.inf) -> Profile | None:
        """Folds a profile anew: from what the log holds, less what was undone and what is past its retention.

        Returns:
            The new profile; None for somebody who has none.

        Raises:
            Unavailable: A Redis does not answer, or the profile is just being made anew; a repeat is safe.
            ProfileCorrupt: The stored profile is damaged.
        """
        now = now_ms()

        def anew(stored: StoredProfile) -> Profile:
            if stored.evicted:  # what the log still holds is not all of their past
                self._log.call_back({subject: now})
                raise Unavailable("this person was away, and their profile is being made anew", retry_after_ms=1000)
            logged = self._logged(subject, stored.erased_before, deadline)
            return refold(stored, logged, undone, lambda records: self._retention.expired(records, now))

        return self._store.replace(subject, anew)

    def merge(self, visitor: str, known: str) -> Merged:
        """Moves what a visitor did to a known person; the visitor's identity begins anew, in the arm of that person.

        Args:
            visitor: Key of the visitor.
            known: Key of the person.

        Raises:
            FailedPrecondition: The visitor does not allow what the known person does.
            ConsentWithheld: The known person allows nothing to be kept; nothing moved.
            Unavailable: A Redis does not answer; a repeat is safe.
            ResourceExhausted: The log is full; a repeat is safe.
        """
        theirs, own = (consent.purposes for consent in self.consents([visitor, known]))
        if own & ~int(theirs) & int(EVERY_PURPOSE):
            missing = ", ".join(Purpose(own & ~int(theirs) & int(EVERY_PURPOSE)).names)
            raise FailedPrecondition(
                f"the visitor does not allow all that the person does: set their consent: {missing}"
            )
        damaged = self._damaged(visitor) or self._damaged(known)
        remembered = self._remembered(visitor)
        for _ in range(_ATTEMPTS):
            newest = self._log_erasure.newest_of(visitor)
            merged = self._copied(visitor, known, remembered)
            erased = self._log_erasure.start_afresh(visitor, newest)
            if erased:
                self._store.erase(visitor, erased.log_id)
                if Purpose.MEASURE in theirs:
                    # One device asks with either id: both get the answers of one arm.
                    self._mark(visitor, None, forget=False, rules=[SharedArm(seed_of(known))])
                return replace(merged, damaged=damaged)
            # They have done more meanwhile: what was copied is known again, and counts once.
        raise Unavailable("this visitor does more all the time: repeat it", retry_after_ms=1000)

    def _copied(self, visitor: str, known: str, remembered: int) -> Merged:
        """Makes what a visitor did, said and saw the known person's own."""
        moved = refused = version = 0
        for entries in self._log.history(visitor):
            for appended in self._moved(entries, known):
                if isinstance(appended.error, FailedPrecondition):
                    refused += 1
                elif appended.error:
                    raise appended.error
                else:
                    moved, version = moved + 1, max(version, appended.log_id)
        impressions = self._moved_impressions(visitor, known)
        left_out = self._move_rules(visitor, known)
        return Merged(
            moved, impressions, refused, max(0, remembered - moved - refused), version, rules_left_out=left_out
        )

    def erase(self, subject: str) -> Certificate:
        """Forgets a person in every store: the log first, so that nothing can be replayed into the profile.

        Returns:
            What was erased when; its bytes leave the disks later, and the certificate will say when that was.

        Raises:
            Unavailable: A Redis does not answer; a repeat is safe.
        """
        remembered = self._remembered(subject)
        erased = self._log_erasure.erase(subject)
        # The projector, which meets the mark in the log, may have been quicker.
        forgotten = max(self._store.erase(subject, erased.log_id), remembered)
        counts = {"profiles": forgotten, "events": erased.events, "impressions": erased.impressions}
        partition = partition_of(subject, self._log.partitions)
        person, address = self._log.person(subject), address_of(subject)
        erasure = Erasure(new_certificate_id(partition), person, address, erased.log_id)
        certificate = self._certificates.issue(erasure, counts, self._store.store_id())
        if self._ledger:
            self._ledger.note(erasure)
            self._confirm_ledger(certificate)
        return certificate

    def _confirm_ledger(self, certificate: Certificate) -> None:
        """Confirms for the ledger of this host; where its identity cannot be read, the host does so when it can."""
        assert self._ledger is not None
        with contextlib.suppress(ConfigError):
            if host := read_identity(self._ledger.path.parent / HOST):
                self._certificates.confirm_copy(certificate, host.copy_id)

    def held(self, subject: str, kind: str = "event", after: int = 0, deadline: float = math.inf) -> Iterator[Piece]:
        """Everything that the log holds of a person: first the events, then the impressions, each in log order.

        Args:
            subject: The person.
            kind: Where to begin.
            after: Log id of that kind behind which to begin.
            deadline: When to give up, on the clock of `time.monotonic`, s.

        Raises:
            EventLogUnavailable: Redis does not answer.
            DeadlineExceeded: There is more than could be read in time.
        """
        for one in _KINDS[_KINDS.index(kind) :]:
            for entries in self._log.history(subject, impressions=one == "impression", after=after, deadline=deadline):
                for entry in entries:
                    yield one, entry.log_id, entry.payload
            after = 0

    def _remembered(self, subject: str) -> int:
        """Number of events in a profile; 0 where it is damaged."""
        try:
            return self._store.read(subject).count
        except ProfileCorrupt:
            return 0

    def _arm_of(self, subject: str) -> list[SharedArm]:
        """The shared arm, which outlives what the user says of their answers; none for a user who shares none."""
        if not is_anonymous(subject):
            return []
        return [one for one in self._stated(subject)[0] if isinstance(one, SharedArm)]

    def _mark(
        self,
        subject: str,
        purposes: Purpose | None,
        forget: bool,
        rules: Sequence[Rule | Setting | SharedArm] | None = None,
    ) -> tuple[int, bool]:
        address, keys = address_of(subject), self._log.keys_of(subject)
        said = b"" if purposes is None else b"%d" % purposes
        stored = None if rules is None else _stored(rules)
        ruled = () if stored is None else (stored, _in_words(rules or ()))
        call = Call(PERSON_MARK, (keys.events, keys.people, keys.rules), (address, said, int(forget), *ruled))
        mark = Mark(log_id(self._log.nodes.run(call)), address, purposes, forget, stored)
        partition = partition_of(subject, self._log.partitions)
        try:
            self._store.mark(partition, mark)
            if not forget and self._store.damaged([subject]):
                self._store.set_aside(subject)
                self._store.mark_many([(partition, one) for one in self._said_before(subject)])
        except Unavailable:
            return mark.log_id, False
        return mark.log_id, True

    def _damaged(self, subject: str) -> bool:
        """Returns True where the stored profile cannot be read."""
        try:
            self._store.read(subject)
        except ProfileCorrupt:
            return True
        return False

    def _said_before(self, subject: str) -> list[Mark]:
        """All that the log knows the user to have said, for a profile that lost it."""
        address, [consent] = address_of(subject), self.consents([subject])
        found = [Mark(consent.forgotten, address, forget=True)] if consent.forgotten else []
        if consent.said_at:
            found.append(Mark(consent.said_at, address, consent.purposes))
        rules, said_at = self._stated(subject)
        return [*found, Mark(said_at, address, rules=_stored(rules))] if said_at else found

    def _found(self, subject: str, event_id: str) -> Entry | None:
        """The event of this id; its key lasts as long as the log keeps what every reader has."""
        keys = self._log.keys_of(subject)
        place = self._log.nodes.command("GET", self._log.seen_of(subject, event_id))
        if not place:
            return None
        found = self._log.nodes.command("XRANGE", keys.events, place, place)
        return Entry.of(*found[0]) if found else None

    def _logged(self, subject: str, after: int, deadline: float) -> npt.NDArray[np.void]:
        """What the log holds of a person that belongs into the profile; ENTRY [n]."""
        own = [
            entry.log_id.to_bytes(8, "big") + entry.record
            for entries in self._log.history(subject, after=after, deadline=deadline)
            for entry in sound(entries)[0]
        ]
        return np.frombuffer(b"".join(own), ENTRY)

    def _moved(self, entries: Sequence[Entry], known: str) -> list[Any]:
        """Events as the known person's own, in the log and in the profile."""
        events = [
            LoggedEvent(known, entry.event_id, entry.record, reassigned(entry.payload, known), entry.personal)
            for entry in entries
        ]
        appended = self._log.append(events)
        refusal = next((one.error for one in appended if isinstance(one.error, ConsentWithheld)), None)
        if refusal:
            raise refusal
        own = [(one.log_id, one.record) for one in appended if one.record and one.personal]
        try:
            self._store.apply(known, own)
        except PenchantError:
            return list(appended)  # the projector does it later
        return list(appended)

    def _move_rules(self, visitor: str, known: str) -> int:
        """Adds the visitor's rules to the known user's, who keeps all of their own; of two ends the later holds.

        A user who allows no personal answers gets none. Rules that have ended do not move. Where not all have room,
        blocks and mutes go before dials.

        Returns:
            The number of the visitor's rules and dials that had no room.
        """
        theirs, own = self.rules(visitor)[0], self.rules(known)[0]
        if not theirs or Purpose.PERSONALISE not in self.consents([known])[0].purposes:
            return 0
        both = _joined(own, theirs, now_ms())
        self._mark(known, None, forget=False, rules=both[: controls.MAX_CONTROLS])
        return max(0, len(both) - controls.MAX_CONTROLS)

    def _moved_impressions(self, visitor: str, known: str) -> int:
        """Slates as the known person's own, marked as merged; those that an earlier try has moved stay as they are.

        They were shown in the arm of the anonymous id, so who compares arms must be able to tell them apart.
        """
        there = {payload for kind, _, payload in self.held(known, "impression") if kind == "impression"}
        moved = 0
        for entries in self._log.history(visitor, impressions=True):
            own = [reassigned(entry.payload, known, _OF_A_PROFILE, merged=True) for entry in entries]
            new = [LoggedImpression(known, int(decode(one)["timestamp"]), one) for one in own if one not in there]
            self._log.append_impressions(new)
            moved += len(own)
        return moved


def consents(log: EventLog, subjects: Sequence[str]) -> list[Consent]:
    """What each person allows, the log's default where they said nothing.

    Args:
        log: The event log, which is what counts.
        subjects: Keys of people: `features.subjects`.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    wanted: list[Request] = [("HGET", log.keys_of(subject).people, address_of(subject)) for subject in subjects]
    return [_consent(value, log.default) for value in required(log.nodes.run_all(wanted))]


def marks(log: EventLog) -> Iterator[tuple[int, Mark]]:
    """What everybody said, by partition: with it, profiles that were lost know again what they may not hold.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    for partition, keys in enumerate(log.keys):
        for address, value in log.nodes.scan(keys.people):
            consent = _consent(value, log.default)
            if consent.forgotten:
                yield partition, Mark(consent.forgotten, address, forget=True)
            if consent.said_at:
                yield partition, Mark(consent.said_at, address, consent.purposes)
        for address, value in log.nodes.scan(keys.rules):
            rules, said_at = _rules(value)
            yield partition, Mark(said_at, address, rules=_stored(rules))


def _consent(value: bytes | None, default: Purpose) -> Consent:
    if value is None:
        return Consent(default, 0, 0)
    said, at, forgotten = value.split()
    return Consent(default if said == b"-" else Purpose(int(said)), log_id(at), log_id(forgotten))


def _rules(value: bytes | None) -> tuple[list[Rule | Setting | SharedArm], int]:
    """Rules as the log holds them in words, and where it does."""
    if value is None:
        return [], 0
    at, _, words = value.partition(b" ")
    return [_of_words(*words) for words in json.loads(words)], log_id(at)


def _of_words(kind: str, name: str, value: Any) -> Rule | Setting | SharedArm:
    if kind == _SHARED_ARM:
        return SharedArm(int(value))
    return Rule(ControlKind[kind], name, value) if kind in ControlKind.__members__ else Setting(Dial[kind], name, value)


def _words_of(rule: Rule | Setting | SharedArm) -> list[Any]:
    if isinstance(rule, SharedArm):
        return [_SHARED_ARM, "", rule.seed]
    return (
        [rule.kind.name, rule.name, rule.until] if isinstance(rule, Rule) else [rule.dial.name, rule.name, rule.value]
    )


def _in_words(rules: Sequence[Rule | Setting | SharedArm]) -> bytes:
    return json.dumps([_words_of(rule) for rule in rules], ensure_ascii=False).encode()


def _joined(own: Sequence[Rule | Setting], theirs: Sequence[Rule | Setting], now_ms: int) -> list[Rule | Setting]:
    """Returns the rules and dials of two users in one: the own ones first, and of either the rules before the dials."""
    ends: dict[tuple[ControlKind, str], int] = {}
    for rule in (*own, *theirs):
        if isinstance(rule, Rule) and not 0 < rule.until <= now_ms:
            about = (rule.kind, rule.name)
            ends[about] = max(ends.get(about, 0), rule.until or controls.FOR_EVER)
    rules = [Rule(*about, 0 if end == controls.FOR_EVER else end) for about, end in ends.items()]
    turned = {_about(one): one for one in (*theirs, *own) if isinstance(one, Setting)}
    settled = {_about(one) for one in own}
    return sorted([*rules, *turned.values()], key=lambda one: (_about(one) not in settled, isinstance(one, Setting)))


def _about(rule: Rule | Setting) -> tuple[int, str]:
    return (rule.kind if isinstance(rule, Rule) else rule.dial), rule.name


def _stored(rules: Sequence[Rule | Setting | SharedArm]) -> bytes:
    """Rules as a profile holds them."""
    hidden = [(item_key(rule.name), rule.until, rule.kind) for rule in rules if isinstance(rule, Rule)]
    turned = [(one.dial, item_key(one.name), one.value) for one in rules if isinstance(one, Setting)]
    shared = [controls.arm_control(one.seed) for one in rules if isinstance(one, SharedArm)]
    return controls.encode(np.concatenate([np.array(hidden, CONTROL), controls.dial_controls(turned), *shared]))
