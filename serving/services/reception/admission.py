"""Admission of rankings: one that could not be answered in time is refused at once, and batches give way first.

How long a new ranking would wait follows from what waits before it and from how long such rankings take, both measured
by `ConcurrencyLimit`. A queue that comes and goes is a burst: it may be as long as its callers' deadlines bear. A queue
that stands means that more comes than can be answered: then it is kept short, so that what is taken is answered early,
and each refusal comes while its caller has time left to do something else (Nichols and Jacobson, Controlling Queue
Delay, 2012).
"""

from __future__ import annotations

import math
from functools import cache

from serving.concurrency import ConcurrencyLimit
from serving.errors import BatchDeferred, Overloaded, ServingError

PRIORITY_HEADER = "penchant-priority"
"""Metadata of a call: `batch`, or `interactive`, which is also what any other value and none mean."""

BATCH = "batch"
STANDING_S = 0.2
"""Time in seconds after which a queue that was never empty stands."""

QUEUED = 16
"""Rankings of a slot that may wait in any case: a few callers that each wait for their answer are no overload."""

BURST = 3
"""Most times the wait in a standing queue that a burst may wait."""

_MARGIN, _BATCH_MARGIN = 1.25, 2.5
"""Most times its predicted time that a ranking takes: others take longer than predicted, and go before a batch."""

_STEP_MS, _LEAST_MS, _MOST_MS, _BATCH_MS = 50, 100, 2000, 1000


class AdmissionControl:
    """Decides which rankings a worker takes; any thread may ask.

    Attributes:
        enabled: False to take all that there is a place for.
    """

    def __init__(self, limit: ConcurrencyLimit, wait_s: float, places: int, *, enabled: bool = True) -> None:
        """Begins without calls.

        Args:
            limit: Computes the rankings.
            wait_s: Longest predicted wait in a queue that stands, and of a batch, in seconds.
            places: Calls that may be in hand; batches take half of them at most.
            enabled: False to take all that there is a place for.
        """
        self._limit, self._wait_s, self._batches, self.enabled = limit, wait_s, max(places // 2, 1), enabled

    def refusal(self, kind: str, left_s: float, caller: object = None, *, batch: bool = False) -> ServingError | None:
        """Returns the error that a new ranking is to end with; None to take it.

        Args:
            kind: Its method.
            left_s: Time until its deadline, in seconds.
            caller: Its caller; one with few rankings waits less than one with many.
            batch: It gives way to others.
        """
        if not self.enabled:
            return None
        limit = self._limit
        wait_s = limit.expected_wait_s(caller, batch=batch)
        if not wait_s:
            return None
        own_s = limit.expected_s(kind)
        crowded, standing_s = limit.crowded_s() > STANDING_S, max(self._wait_s, QUEUED * own_s)
        if batch:
            # Half of it, as interactive calls that come later still go before a batch that waits.
            late = wait_s > standing_s / 2 or (wait_s + own_s) * _BATCH_MARGIN > left_s
            refused = crowded or late or limit.waiting_batch >= self._batches
            return _deferred(_hint(wait_s, _BATCH_MS)) if refused else None
        most_s = standing_s if crowded else standing_s * BURST
        if wait_s > most_s or (wait_s + own_s) * _MARGIN > left_s:
            return _overloaded(_hint(wait_s, _LEAST_MS))
        return None


def _hint(wait_s: float, least_ms: int) -> int:
    """Returns the time after which to try again, in milliseconds: in steps, so that few errors serve all calls."""
    steps = math.ceil(wait_s * 1000 / _STEP_MS)
    return min(max(steps * _STEP_MS, least_ms), _MOST_MS)


# Made once for each hint: under overload there are thousands a second.
@cache
def _overloaded(retry_after_ms: int) -> Overloaded:
    advice = "send less, give the call more time, or retry later"
    return Overloaded(
        f"the rankings that wait take longer than this one can wait: {advice}", retry_after_ms=retry_after_ms
    )


@cache
def _deferred(retry_after_ms: int) -> BatchDeferred:
    return BatchDeferred("batches give way to interactive calls now: retry later", retry_after_ms=retry_after_ms)
