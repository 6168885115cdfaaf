"""Evicts the profiles of users without events for long, and restores them from the warehouse when users return."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from features.errors import TablesError
from serving.errors import ServingError
from serving.observability.telemetry import Telemetry
from serving.stores.event_log import EventLog
from serving.stores.profile_eviction import Evictions
from serving.stores.profiles import ProfileStore
from serving.stores.restore_requests import RestoreRequests

_SWEEP_S = 3600.0
_REQUESTS_S = 1.0
"""Pause between two looks for users who have returned and have done nothing yet."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Eviction:
    """When a profile is evicted, and how it is restored.

    Attributes:
        days: Days without an event after which a profile is evicted.
        restore: Restores the profiles of users and returns how many, as `restore_profiles` of a warehouse does.
    """

    days: float
    restore: Callable[[Sequence[str], ProfileStore, EventLog], int]


class Evictor:
    """Evicts and restores profiles for a projector, whose thread calls it."""

    def __init__(self, eviction: Eviction, log: EventLog, profiles: ProfileStore, telemetry: Telemetry) -> None:
        """Takes the stores; counts `profiles_evicted` and `profiles_restored`."""
        self._eviction, self._log, self._profiles, self._telemetry = eviction, log, profiles, telemetry
        # A dict keeps the order in which users returned, each once.
        self._returned: dict[str, None] = {}
        # Before any time of a monotonic clock, which may begin at 0, so that the first look is never put off.
        self._swept, self._requests_read = -_SWEEP_S, -_REQUESTS_S
        # The past of a few users may be spread over a large warehouse: events do not wait for it.
        self._thread = ThreadPoolExecutor(1, "restore")
        self._round: Future[None] | None = None

    def add(self, subject: str) -> None:
        """Notes a user with an evicted profile who has returned."""
        self._returned[subject] = None

    def restore_returned(self) -> None:
        """Restores the evicted profiles of users who have returned since the last round, in a thread of its own."""
        if self._round:
            if not self._round.done():
                return
            # Raises what ended the round: `_restore` takes care of the errors that a later round may not meet.
            self._round.result()
        if time.monotonic() - self._requests_read >= _REQUESTS_S:
            self._requests_read = time.monotonic()
            self._returned |= dict.fromkeys(RestoreRequests(self._log).take())
        if self._returned:
            self._round = self._thread.submit(self._restore, list(self._returned))
            self._returned = {}

    def make_room(self, subject: str, fold: Callable[[], None]) -> None:
        """Makes room in the tail of a user whose profile may be evicted.

        Args:
            subject: The user.
            fold: Folds the tail, unless the profile is still evicted: a state without its past would replace it.
        """
        self._restore([subject])
        fold()
        # A past that cannot be restored now is restored later, together with all that would have been folded here.
        Evictions(self._profiles).evict_again(subject)

    def sweep(self) -> None:
        """Evicts the profiles of users without events for long, once an hour."""
        if time.monotonic() - self._swept < _SWEEP_S:
            return
        self._swept = time.monotonic()
        before_ms = self._log.now_ms() - int(self._eviction.days * 86_400_000)
        self._telemetry.count(("projector_profiles", "evicted"), Evictions(self._profiles).evict(before_ms))

    def close(self) -> None:
        """Restores the last profiles and ends the thread."""
        if self._round:
            self._round.result()
        self._restore(list(self._returned))
        self._thread.shutdown()

    def cancel(self) -> None:
        """Ends the thread after the profiles it is restoring now."""
        self._thread.shutdown(cancel_futures=True)

    def _restore(self, returned: Sequence[str]) -> None:
        """Restores profiles; what fails is tried again when their users do or ask more."""
        if not returned:
            return
        try:
            restored = self._eviction.restore(returned, self._profiles, self._log)
            self._telemetry.count(("projector_profiles", "restored"), restored)
        except (TablesError, ServingError, OSError) as error:
            _log.error("the evicted profiles of %d users cannot be restored: %s", len(returned), error)
