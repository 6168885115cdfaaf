"""From the log to the profiles: applies the events that `Ingest` could not, and folds tails that have grown long.

The log is the truth and applying is idempotent, so the projector simply applies every event again. Profiles are synced
to disk once a second, so a crash of their Redis may lose its last moments. Therefore an event is acknowledged, and may
be folded, only some seconds after it was applied; whatever restarts, the events of those seconds are applied again
first. That everything up to an acknowledged event is applied and on disk is what makes folding safe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from features.errors import ProfileCorrupt
from serving.errors import ProfileStoreUnavailable, ResourceExhausted, ServingError, Unavailable
from serving.log_retention import PROFILES_GROUP
from serving.observability.outages import Outage
from serving.observability.telemetry import Telemetry
from serving.projection.eviction import Eviction, Evictor
from serving.restart import Report, described
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.log_entries import Entry, sound
from serving.stores.profile_access import TailFull
from serving.stores.profiles import Applied, ProfileStore

COMPACT_AFTER = 64
"""Entries in a tail above which it is folded."""

SETTLE_S = 5.0
"""Time after which an applied event is surely on disk: Redis syncs every second and is at most two seconds late."""

FAR_BEHIND = 50_000
"""Events that are not applied and settled above which the projector counts as behind: minutes of a busy service."""

_LAG_S = 5.0
_PAUSE_S = 0.1
"""Pause between two looks at a log that has less than a batch: new events wait behind every look."""
_RETRY_S = 0.5
_TRIM_S = 60.0
_OWNER_S = 2.0
"""Pause between two looks whether the profiles of the log are still in this store."""
_log = logging.getLogger(__name__)


class _Batch(NamedTuple):
    """Entries of one partition that were applied, and the users whose tails grew long by it."""

    applied_at: float
    partition: int
    log_ids: list[int]
    long_tails: list[str]


class Projector:
    """Projects the partitions it can get; of any number of projectors, each partition has one owner at a time."""

    def __init__(
        self,
        log: EventLog,
        profiles: ProfileStore,
        *,
        compact_after: int = COMPACT_AFTER,
        settle_s: float = SETTLE_S,
        lease_ms: int = 10_000,
        batch: int = 500,
        eviction: Eviction | None = None,
        telemetry: Telemetry | None = None,
        require_own: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes the stores; `run` does the work.

        Args:
            log: Source of the events.
            profiles: Store of the profiles.
            compact_after: Entries in a tail above which it is folded.
            settle_s: Time after which an applied event counts as being on disk.
            lease_ms: Time for which a partition stays with a projector that is gone.
            batch: Most events per partition and step.
            eviction: When profiles are evicted, and how they are restored; None keeps them.
            telemetry: Counts `projector_events`, `projector_damaged` and `projector_profiles`.
            require_own: Raises once the profiles of the log are elsewhere. `run` calls it regularly, and first of all
                after it has stood still for so long that another projector may have taken its place.
        """
        self._log, self._profiles = log, profiles
        self._require_own, self._owned = require_own, time.monotonic()
        self._telemetry = telemetry or Telemetry()
        self._evictor = Evictor(eviction, log, profiles, self._telemetry) if eviction else None
        self._consumer = Consumer(log, PROFILES_GROUP, f"{os.getpid()}-{uuid.uuid4().hex}", lease_ms)
        self._compact_after, self._settle_s, self._batch = compact_after, settle_s, batch
        self._run_ids = [""] * log.partitions
        self._trimmed = self._lag_read = 0.0
        self._lag_report = ""
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
        """Applies the next batch of every partition it owns and settles old ones; returns the number of entries read.

        Raises:
            Unavailable: A Redis does not answer; nothing is lost, step again later.
            ResourceExhausted: The profiles Redis is full, or a user's tail; step again later.
        """
        try:
            with contextlib.suppress(ProfileStoreUnavailable):  # `run_ids` knows of which partitions
                self._profiles.check_safety()
            run_ids = self._profiles.run_ids()
            for partition, (before, now) in enumerate(zip(self._run_ids, run_ids, strict=True)):
                # A Redis that was started again may have lost the events of its last seconds.
                if before != now:
                    self._forget(partition)
            self._run_ids = run_ids
            # Only after the run ids were compared: what a restart may have lost must not be acknowledged.
            self._settle()
            entries = self._advance()
            if self._evictor:
                self._evictor.restore_returned()
            return entries
        except ServingError:
            self._start_over()
            raise

    def run(self, stop: threading.Event, report: Report = lambda _: None) -> None:
        """Steps until `stop` is set, then gives up its partitions; an unreachable Redis is waited for.

        Args:
            stop: Ends it.
            report: Told what it waits for, and "" while it waits for nothing.

        Raises:
            PenchantError: An error that waiting does not help; its threads have ended and its partitions are given up.
        """
        outage = Outage(_log, "the projector waits")
        try:
            while not stop.is_set():
                try:
                    self._run_steps(stop, outage, report)
                except (Unavailable, ResourceExhausted) as error:
                    if not isinstance(error, Unavailable):  # each call to Redis logs its own outage
                        outage.failed(error)
                    report(f"waits: {described(error)}")
                    stop.wait(_RETRY_S)
        except BaseException:
            if self._evictor:
                # Not `close`, which would restore profiles first: a store may be what failed.
                self._evictor.cancel()
            self._release()
            raise
        self.close()

    def close(self) -> None:
        """Restores the last profiles and gives up its partitions; if that fails, their leases run out."""
        if self._evictor:
            self._evictor.close()
        self._release()

    def lag(self) -> list[int]:
        """Returns the number of events per partition that are not acknowledged yet, those of the last seconds included.

        Raises:
            EventLogUnavailable: The events Redis does not answer.
        """
        return self._consumer.lag()

    def _run_steps(self, stop: threading.Event, outage: Outage, report: Report) -> None:
        self.open()
        while not stop.is_set():
            if time.monotonic() - self._owned >= _OWNER_S:
                self._require_own()
                self._owned = time.monotonic()
            entries = self.step()
            outage.works()
            self._trim()
            if self._evictor:
                self._evictor.sweep()
            report(self._behind())
            if entries < self._batch:
                stop.wait(_PAUSE_S)

    def _release(self) -> None:
        try:
            self._consumer.release()
        except ServingError as error:
            _log.warning("the leases of the projector run out by themselves: %s", error)

    def _behind(self) -> str:
        """Returns how far it is behind, if that is far; reads it from time to time."""
        now = time.monotonic()
        if now - self._lag_read >= _LAG_S:
            self._lag_read = now
            lag = sum(self.lag())
            self._lag_report = f"is {lag:,} events behind" if lag > FAR_BEHIND else ""
        return self._lag_report

    def _start_over(self) -> None:
        """Forgets how far it was: everything that is not acknowledged is applied again."""
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
            for subject in batch.long_tails:
                # Not before half a tail has come together: each fold rewrites the whole profile. But before the batch
                # is acknowledged: after a crash in between, it comes again and its tails are found to be long again.
                with _damage_logged():
                    self._fold(subject, batch.log_ids[-1], self._compact_after // 2)
            self._consumer.acknowledge(batch.partition, batch.log_ids)

    def _advance(self) -> int:
        """Applies what is next in each partition; one whose profiles are unreachable does not hold up the others."""
        applied = 0
        unreachable: ProfileStoreUnavailable | None = None
        for partition, entries in enumerate(self._consumer.claim(self._after, self._batch)):
            if entries is None:  # another projector owns it
                self._forget(partition)
            elif entries:
                try:
                    long_tails = self._apply(partition, entries)
                except ProfileStoreUnavailable as error:
                    self._forget(partition)
                    unreachable = error
                    continue
                log_ids = [entry.log_id for entry in entries]
                self._settling.append(_Batch(time.monotonic(), partition, log_ids, long_tails))
                if self._after[partition] is not None:
                    self._after[partition] = log_ids[-1]
                applied += len(entries)
            else:  # all that was pending is applied: from now on only new entries
                self._after[partition] = None
        if unreachable and not applied:
            raise unreachable
        return applied

    def _apply(self, partition: int, entries: Sequence[Entry]) -> list[str]:
        """Applies a batch of one partition; returns the users whose tails are long."""
        # The marks first: events after one that grants consent must not be refused. Events before a mark are judged by
        # their log ids, so for them the order does not matter.
        for entry in entries:
            if entry.mark:
                self._profiles.mark(partition, entry.mark)
        events, damaged = sound(entries)
        self._telemetry.count("projector_damaged", damaged)
        by_subject: dict[str, list[tuple[int, bytes]]] = {}
        for entry in events:
            by_subject.setdefault(entry.subject, []).append((entry.log_id, entry.record))
        batch = list(by_subject.items())
        long_tails = []
        for (subject, records), reply in zip(batch, self._profiles.apply_many(batch), strict=True):
            if isinstance(reply, TailFull):
                reply = self._apply_with_room(subject, records)
            if isinstance(reply, Applied):
                self._telemetry.count("projector_events", reply.inserted)
                if reply.tail > self._compact_after:
                    long_tails.append(subject)
                if reply.evicted and self._evictor:
                    self._evictor.add(subject)
            elif not isinstance(reply, ProfileCorrupt):  # the store counts damaged profiles, and a rebuild repairs them
                raise reply
        return long_tails

    def _apply_with_room(self, subject: str, records: Sequence[tuple[int, bytes]]) -> Applied | ProfileCorrupt:
        """Applies events after folding all before them at once: the tail is full, so there is no time for the disk."""
        fold = partial(self._fold, subject, records[0][0] - 1)
        try:
            if self._evictor:
                self._evictor.make_room(subject, fold)
            else:
                fold()
            return self._profiles.apply(subject, records)
        except ProfileCorrupt as error:  # a tail that cannot be folded stays full: the events of others go on
            _log.error("%s", error)
            return error

    def _fold(self, subject: str, up_to: int, at_least: int = 1) -> None:
        # An evicted profile is folded only if nothing will restore it: its tail has to wait for its past.
        if self._profiles.compact(subject, up_to, at_least, evicted_too=self._evictor is None):
            self._telemetry.count(("projector_profiles", "compacted"))

    def _trim(self) -> None:
        if time.monotonic() - self._trimmed < _TRIM_S:
            return
        self._trimmed = time.monotonic()
        # Only partitions that are read to their end: the others have enough to do.
        for partition, after in enumerate(self._after):
            if after is None:
                self._log.trim(partition)


@contextlib.contextmanager
def _damage_logged() -> Iterator[None]:
    """Passes a damaged profile, which a rebuild repairs."""
    try:
        yield
    except ProfileCorrupt as error:
        _log.error("%s", error)
