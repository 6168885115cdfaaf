"""The projector as a process: projects until it is stopped, and has the bytes of what was erased leave the disks."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from serving.observability.telemetry import Telemetry
from serving.privacy.certificates import Certificates
from serving.privacy.purge import Purger
from serving.projection.eviction import Eviction
from serving.projection.projector import Projector
from serving.projection.store_owner import StoreOwner
from serving.redis.client import connect, printable
from serving.restart import Report, Trouble, keep_running, stop_on_signals
from serving.stores.event_log import EventLog
from serving.stores.meta import awaited_partitions
from serving.stores.profile_access import TAIL_CAP
from serving.stores.profiles import ProfileStore
from serving.stores.registry import Heartbeat, Registry

PURGE_S = 12 * 3600.0
"""Pause between two rounds in which the bytes of what was erased leave the disks: half of what is promised."""

_TIMEOUT_S = 5.0


def run(
    redis_url: str,
    events_redis_url: str,
    partitions: int | None = None,
    stop: threading.Event | None = None,
    *,
    purge_s: float = PURGE_S,
    eviction: Eviction | None = None,
    ready: Callable[[dict[str, Any]], None] = lambda _: None,
    telemetry: Telemetry | None = None,
    trouble: Trouble | None = None,
    unsafe: bool = False,
) -> int:
    """Runs until SIGTERM or SIGINT, or until `stop` is set; returns the exit status.

    Args:
        redis_url: The profiles Redis.
        events_redis_url: The events Redis.
        partitions: Partitions of the event log; None: as the log says, which is waited for.
        stop: Ends it.
        purge_s: Pause between two rounds of purging.
        eviction: When profiles are evicted, and how they are restored; None keeps them.
        ready: Told `pid` and `partitions` when it begins.
        telemetry: Counts what a `Projector` counts.
        trouble: Told what it waits for. With it, what ends in an error is started again, and a projector of this log
            that fills another profile store is waited for.
        unsafe: Apply and acknowledge also while a Redis could lose what it holds.

    Raises:
        OtherStore: A projector of this log fills another profile store.
        ConfigError: A URL is wrong, or the log has another number of partitions.
    """
    patient, trouble = trouble is not None, trouble or Trouble(lambda _: None)
    stop = stop or threading.Event()
    if not patient:
        stop_on_signals(stop)
    with connect(redis_url, _TIMEOUT_S) as profiles, connect(events_redis_url, _TIMEOUT_S) as events:
        partitions = awaited_partitions(events, partitions, stop)
        ready({"pid": os.getpid(), "partitions": partitions})
        # More room than the workers allow: a late event must find a place in a tail that they have filled.
        store = ProfileStore(profiles, partitions, tail_cap=2 * TAIL_CAP, guarded=not unsafe)
        log = EventLog(events, partitions, unsafe=unsafe)
        owner, heartbeat = StoreOwner(log, store, printable(redis_url)), Heartbeat(Registry(log))

        def project(report: Report) -> None:
            if owner.wait(heartbeat, stop, report, patient=patient):
                projector = Projector(log, store, eviction=eviction, telemetry=telemetry, require_own=owner.require)
                projector.run(stop, report)

        try:
            with _purging(Purger(Certificates(log), events, profiles, purge_s), trouble.reporter("purge")):
                keep_running("projector", project, stop, trouble.reporter("projector"), patient=patient)
        finally:
            heartbeat.end()
    return 0


@contextlib.contextmanager
def _purging(purger: Purger, report: Report) -> Iterator[None]:
    """Purges in a thread of its own while the block runs, also while the projector waits or is refused."""
    ended = threading.Event()

    def purge() -> None:
        keep_running("purge", lambda _: purger.run(ended), ended, report, patient=True)

    thread = threading.Thread(target=purge, name="purge")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
