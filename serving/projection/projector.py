"""From the log to the profiles: applies what `Ingest` could not, and folds tails that have grown long.

The log is the truth and applying is idempotent, so the projector simply applies every event again. Profiles are synced
to disk once a second, so a crash of their Redis may take its last moments along. Therefore an event is acknowledged,
and may be folded, only some seconds after it was applied; whatever restarts, the events of those seconds are applied
again first. That everything up to an acknowledged event is applied and on disk is what makes folding safe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from features.errors import ProfileCorrupt, TablesError
from serving.errors import ConfigError, ProfileStoreUnavailable, ResourceExhausted, ServingError, Unavailable
from serving.folder_identity import FolderIdentity, new_id
from serving.log_retention import PROFILES_GROUP
from serving.observability.outages import Outage
from serving.observability.telemetry import Telemetry
from serving.privacy.certificates import Certificates
from serving.privacy.purge import Purger
from serving.redis.client import connect, printable
from serving.restart import Report, Trouble, described, keep_running
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.log_entries import Entry, sound
from serving.stores.meta import awaited_partitions
from serving.stores.profiles import TAIL_CAP, Applied, ProfileStore, TailFull
from serving.stores.registry import Copy, Heartbeat, Registry

COMPACT_AFTER = 64
"""Entries in a tail above which it is folded."""

SETTLE_S = 5.0
"""Time after which an applied event is surely on disk: Redis syncs every second and is at most two seconds late."""

PURGE_S = 12 * 3600.0
"""Pause between two rounds in which the bytes of what was erased leave the disks: half of what is promised."""

FAR_BEHIND = 50_000
"""Events that are not applied and settled above which the projector counts as behind: minutes of a busy service."""

_LAG_S = 5.0
_PAUSE_S = 0.1
"""Pause between two looks at a log that has less than a batch: new events wait behind every look."""
_RETRY_S = 0.5
_TRIM_S = 60.0
_SWEEP_S = 3600.0
_CALLED_S = 1.0
"""Pause between two looks for those who came back and have done nothing yet."""
_OTHER_S = 2.0
"""Pause between two looks whether the profiles of a log are still in another store."""
_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


class _Batch(NamedTuple):
    """Entries of one partition that were applied, and whose tails grew long by it."""

    applied_at: float
    partition: int
    log_ids: list[int]
    long: list[str]


@dataclass(frozen=True, slots=True)
class Idle:
    """When a profile is dropped, and how it is made anew when the person comes back.

    Attributes:
        days: Days without an event.
        rehydrate: Makes the states of people anew and returns how many, as `rebuild.rehydrate` of a warehouse.
    """

    days: float
    rehydrate: Callable[[Sequence[str], ProfileStore, EventLog], int]


class Projector:
    """Projects the partitions it can get; run as many as you like, each partition has one owner at a time."""

    def __init__(
        self,
        log: EventLog,
        profiles: ProfileStore,
        *,
        compact_after: int = COMPACT_AFTER,
        settle_s: float = SETTLE_S,
        lease_ms: int = 10_000,
        batch: int = 500,
        idle: Idle | None = None,
        telemetry: Telemetry | None = None,
        require_own: Callable[[], None] = lambda: None,
    ) -> None:
        """Says what to project; `run` does it.

        Args:
            log: Where events come from.
            profiles: Where they go.
            compact_after: Entries in a tail above which it is folded.
            settle_s: Time after which an applied event counts as being on disk.
            lease_ms: How long a partition stays with a projector that is gone.
            batch: Most events per partition and step.
            idle: When profiles are dropped, and how they are made anew; None keeps them.
            telemetry: Counts `events_projected`, `events_damaged`, `profiles_compacted`, `profiles_dropped` and
                `profiles_returned`.
            require_own: Raises once the profiles of the log are elsewhere; `run` asks regularly, and first of all after
                it has stood still for as long as a projector may before another one takes its place.
        """
        self._require_own, self._owned = require_own, time.monotonic()
        self._idle, self._returned, self._swept, self._called = idle, dict[str, None](), -_SWEEP_S, -_CALLED_S
        # The past of a few people may be spread over a large warehouse: events do not wait for it.
        self._aside = ThreadPoolExecutor(1, "rehydrate")
        self._welcomed: Future[None] | None = None
        self._log = log
        self._profiles = profiles
        self._consumer = Consumer(log, PROFILES_GROUP, f"{os.getpid()}-{uuid.uuid4().hex}", lease_ms)
        self._compact_after = compact_after
        self._settle_s = settle_s
        self._batch = batch
        self._telemetry = telemetry or Telemetry()
        self._run_ids = [""] * log.partitions
        self._trimmed = self._looked = 0.0
        self._late = ""
        self._settling: deque[_Batch] = deque()
        self._after: list[int | None] = []
        self._start_over()

    def open(self) -> None:
        """Joins the consumer group.

        Raises:
            EventLogUnavailable: The events Redis does not answer.
            ConfigError: The log has another number of partitions.
        """
        self._consumer.open()

    def step(self) -> int:
        """Applies the next batch of every partition it owns and settles old ones; returns the number of entries seen.

        Raises:
            Unavailable: A Redis does not answer; nothing is lost, step again later.
            ResourceExhausted: The profiles Redis is full, or a person's tail; step again later.
        """
        try:
            with contextlib.suppress(ProfileStoreUnavailable):  # `run_ids` knows of which partitions
                self._profiles.check_safety()
            run_ids = self._profiles.run_ids()
            for partition, (before, now) in enumerate(zip(self._run_ids, run_ids, strict=True)):
                if before != now:
                    self._forget(partition)
            self._run_ids = run_ids
            self._settle()
            seen = self._advance()
            self._welcome()
            return seen
        except ServingError:
            self._start_over()
            raise

    def run(self, stop: threading.Event, report: Report = lambda _: None) -> None:
        """Steps until `stop` is set, then gives up its partitions; a Redis that is away is waited for.

        Args:
            stop: Ends it.
            report: Told what it waits for, and "" while it waits for nothing.

        Raises:
            PenchantError: What waiting does not help; its threads have ended and its partitions are given up.
        """
        outage = Outage(_log, "the projector waits")
        try:
            while not stop.is_set():
                try:
                    self.open()
                    while not stop.is_set():
                        if time.monotonic() - self._owned >= _OTHER_S:
                            self._require_own()
                            self._owned = time.monotonic()
                        seen = self.step()
                        outage.works()
                        self._trim()
                        self._sweep()
                        report(self._behind())
                        if seen < self._batch:
                            stop.wait(_PAUSE_S)
                except (Unavailable, ResourceExhausted) as error:
                    if not isinstance(error, Unavailable):  # of which each call to Redis speaks
                        outage.failed(error)
                    report(f"waits: {described(error)}")
                    stop.wait(_RETRY_S)
        except BaseException:
            self._aside.shutdown(cancel_futures=True)
            self._release()
            raise
        self.close()

    def close(self) -> None:
        """Makes the last states anew and gives up its partitions; where that cannot be said, their leases run out."""
        if self._welcomed:
            self._welcomed.result()
        self._rehydrate(list(self._returned))
        self._aside.shutdown()
        self._release()

    def _release(self) -> None:
        try:
            self._consumer.release()
        except ServingError as error:
            _log.warning("the leases of the projector run out by themselves: %s", error)

    def _behind(self) -> str:
        """Returns how far it is behind, from time to time, where that is far."""
        now = time.monotonic()
        if now - self._looked >= _LAG_S:
            self._looked = now
            lag = sum(self.lag())
            self._late = f"is {lag:,} events behind" if lag > FAR_BEHIND else ""
        return self._late

    def lag(self) -> list[int]:
        """Number of events per partition that are not acknowledged yet, those of the last seconds included.

        Raises:
            EventLogUnavailable: The events Redis does not answer.
        """
        return self._consumer.lag()

    def _start_over(self) -> None:
        """Forgets how far it was: everything that is not acknowledged will be applied again."""
        self._settling.clear()
        self._after = [0] * self._log.partitions

    def _forget(self, partition: int) -> None:
        """Starts over with one partition."""
        self._settling = deque(batch for batch in self._settling if batch.partition != partition)
        self._after[partition] = 0

    def _settle(self) -> None:
        """Acknowledges what was applied long enough ago, and folds the long tails of it."""
        now = time.monotonic()
        while self._settling and now - self._settling[0].applied_at >= self._settle_s:
            batch = self._settling.popleft()
            for subject in batch.long:
                self._compact(subject, batch.log_ids[-1], self._compact_after // 2)
            self._consumer.acknowledge(batch.partition, batch.log_ids)

    def _advance(self) -> int:
        """Applies what is next in each partition; those whose profiles are away do not keep the others waiting."""
        seen = 0
        away: ProfileStoreUnavailable | None = None
        for partition, entries in enumerate(self._consumer.claim(self._after, self._batch)):
            if entries is None:
                self._forget(partition)
            elif entries:
                try:
                    long = self._apply(partition, entries)
                except ProfileStoreUnavailable as error:
                    self._forget(partition)
                    away = error
                    continue
                log_ids = [entry.log_id for entry in entries]
                self._settling.append(_Batch(time.monotonic(), partition, log_ids, long))
                if self._after[partition] is not None:
                    self._after[partition] = log_ids[-1]
                seen += len(entries)
            else:
                self._after[partition] = None
        if away and not seen:
            raise away
        return seen

    def _apply(self, partition: int, entries: Sequence[Entry]) -> list[str]:
        """Applies a batch of one partition; returns whose tails are long."""
        # First the marks: what comes behind one that grants must not be refused, what comes before is by its place.
        for entry in entries:
            if entry.mark:
                self._profiles.mark(partition, entry.mark)
        grouped: dict[str, list[tuple[int, bytes]]] = {}
        events, damaged = sound(entries)
        self._telemetry.count("events_damaged", damaged)
        for entry in events:
            grouped.setdefault(entry.subject, []).append((entry.log_id, entry.record))
        batch = list(grouped.items())
        long = []
        for (subject, own), reply in zip(batch, self._profiles.apply_many(batch), strict=True):
            if isinstance(reply, TailFull):
                self._make_room(subject, own[0][0])
                reply = self._profiles.apply(subject, own)
            if isinstance(reply, Applied):
                self._telemetry.count("events_projected", reply.inserted)
                if reply.tail > self._compact_after:
                    long.append(subject)
                if reply.away and self._idle:
                    self._returned[subject] = None
            elif not isinstance(reply, ProfileCorrupt):  # which is counted; a rebuild mends it
                raise reply
        return long

    def _make_room(self, subject: str, log_id: int) -> None:
        """Folds all before an event at once: there is no time to wait for the disk."""
        self._rehydrate([subject])
        self._compact(subject, log_id - 1)
        # Whose past cannot be had now gets it later, with all that would have to be folded without it.
        if self._idle is not None:
            self._profiles.leave_again(subject)

    def _compact(self, subject: str, up_to: int, at_least: int = 1) -> None:
        try:
            if self._profiles.compact(subject, up_to, at_least, dropped_too=self._idle is None):
                self._telemetry.count("profiles_compacted")
        except ProfileCorrupt as error:
            _log.error("%s", error)

    def _welcome(self) -> None:
        """Has the states of those made anew who came back since the last ones were."""
        if self._welcomed:
            if not self._welcomed.done():
                return
            self._welcomed.result()
        if self._idle is None:
            return
        if time.monotonic() - self._called >= _CALLED_S:
            self._called = time.monotonic()
            self._returned |= dict.fromkeys(self._log.called_back())
        if self._returned:
            self._welcomed = self._aside.submit(self._rehydrate, list(self._returned))
            self._returned = {}

    def _rehydrate(self, returned: Sequence[str]) -> None:
        """Makes states anew; what fails is tried again when these people do or ask more."""
        if self._idle is None or not returned:
            return
        try:
            back = self._idle.rehydrate(returned, self._profiles, self._log)
            self._telemetry.count("profiles_returned", back)
        except (TablesError, ServingError, OSError) as error:
            _log.error("%d people came back, and their past cannot be had: %s", len(returned), error)

    def _sweep(self) -> None:
        """Drops the states of those who stayed away for long."""
        if self._idle is None or time.monotonic() - self._swept < _SWEEP_S:
            return
        self._swept = time.monotonic()
        before_ms = self._log.now_ms() - int(self._idle.days * 86_400_000)
        self._telemetry.count("profiles_dropped", self._profiles.leave(before_ms))

    def _trim(self) -> None:
        if time.monotonic() - self._trimmed < _TRIM_S:
            return
        self._trimmed = time.monotonic()
        for partition, after in enumerate(self._after):
            if after is None:
                self._log.trim(partition)


def run(
    redis_url: str,
    events_redis_url: str,
    partitions: int | None = None,
    stop: threading.Event | None = None,
    *,
    purge_s: float = PURGE_S,
    idle: Idle | None = None,
    ready: Callable[[dict[str, Any]], None] = lambda _: None,
    telemetry: Telemetry | None = None,
    trouble: Trouble | None = None,
    unsafe: bool = False,
) -> int:
    """The projector as a process: runs until SIGTERM or SIGINT, or until `stop` is set; returns the exit status.

    It also has the bytes of what was erased removed from the disks, every `purge_s` seconds. Without a number of
    partitions it waits for the log to tell its own. `ready` is told `pid` and `partitions`. `telemetry` counts what a
    `Projector` counts. With `trouble`, what ends in an error is started again, and a projector of this log that fills
    another profile store is waited for; `trouble` is told meanwhile, and the bytes of erasures leave the disks. While a
    Redis could lose what it holds, nothing is applied and nothing acknowledged, unless `unsafe`.

    Raises:
        OtherStore: A projector of this log fills another profile store.
        ConfigError: A URL is wrong, or the log has another number of partitions.
    """
    patient, trouble = trouble is not None, trouble or Trouble(lambda _: None)
    stop = stop or threading.Event()
    if threading.current_thread() is threading.main_thread() and not patient:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
    with connect(redis_url, _TIMEOUT_S) as profiles, connect(events_redis_url, _TIMEOUT_S) as events:
        partitions = awaited_partitions(events, partitions, stop)
        ready({"pid": os.getpid(), "partitions": partitions})
        # More room than those who serve allow: a late event must find a place in a tail that they have filled.
        store = ProfileStore(profiles, partitions, tail_cap=2 * TAIL_CAP, guarded=not unsafe)
        log = EventLog(events, partitions, unsafe=unsafe)
        purger = Purger(Certificates(log), events, profiles, purge_s)
        heartbeat, ended = Heartbeat(Registry(log)), threading.Event()

        def project(report: Report) -> None:
            if _own_store(log, store, printable(redis_url), heartbeat, stop, report, patient=patient):
                own = partial(_require_own, log, store, printable(redis_url))
                Projector(log, store, idle=idle, telemetry=telemetry, require_own=own).run(stop, report)

        def purge() -> None:
            keep_running("purge", lambda _: purger.run(ended), ended, trouble.reporter("purge"), patient=True)

        purging = threading.Thread(target=purge, name="purge")
        purging.start()
        try:
            keep_running("projector", project, stop, trouble.reporter("projector"), patient=patient)
        finally:
            ended.set()
            purging.join()
            heartbeat.end()
    return 0


class OtherStore(ConfigError):
    """A projector of this log fills another profile store."""


def _own_store(
    log: EventLog,
    store: ProfileStore,
    place: str,
    heartbeat: Heartbeat,
    stop: threading.Event,
    report: Report,
    *,
    patient: bool,
) -> bool:
    """Waits until the profile store is the log's own; returns False if a stop was asked for first.

    Raises:
        OtherStore: A projector fills another one, and this one is not to be patient.
    """
    registry, identity = Registry(log), FolderIdentity("", f"{new_id()}.0")
    standing = Outage(_log, "no events are brought into profiles by this host")
    while not stop.is_set():
        try:
            log.open()
            identity = replace(identity, copy_id=store.store_id())
            other = _in_the_way(registry, identity.copy_id, place)
            if other is None:
                heartbeat.say(None, identity, "projecting")
                standing.works()
                return True
            if not patient:
                raise other
            standing.failed(other)
            report(f"stands by: {other}")
            stop.wait(_OTHER_S)
        except (Unavailable, ResourceExhausted) as error:
            report(f"waits: {described(error)}")
            stop.wait(_RETRY_S)
    return False


def _in_the_way(registry: Registry, copy_id: str, place: str) -> OtherStore | None:
    """Makes a profile store the log's own unless a projector fills another one; returns the refusal then."""
    known = registry.get(copy_id)
    if known is None or known.retired_at:
        registry.register("profiles", copy_id, place)
    own = registry.own("profiles")
    if own is None or own.copy_id == copy_id:
        registry.choose("profiles", copy_id)
        return None
    if own.alive(registry.now_ms()):
        return _other_store(own, place)
    _log.warning("the profiles of this log were in %s, where no projector runs; now they are in %s", own.named(), place)
    registry.choose("profiles", copy_id, instead_of=own.copy_id)
    return None


def _require_own(log: EventLog, store: ProfileStore, place: str) -> None:
    """Refuses to go on where another projector has taken the place of this one meanwhile, with another store.

    Raises:
        OtherStore: One has.
        Unavailable: A Redis does not answer.
    """
    own = Registry(log).own("profiles")
    if own is not None and own.copy_id != store.store_id():
        raise _other_store(own, place)


def _other_store(own: Copy, place: str) -> OtherStore:
    return OtherStore(
        f"the profiles of this log are in {own.named()}, and {place} is another Redis: one log fills one. Give the "
        "same redis on every host, or set projector: false here"
    )
