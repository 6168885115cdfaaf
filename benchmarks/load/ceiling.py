"""The search for the highest rate at which a service keeps its promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

_GROWTH, _SHRINK = 1.4, 2.5
_FAR_OFF = 3.0
"""A window this many times above the limit is not tried again."""
_LEAST_RATE = 1.0


@dataclass(frozen=True)
class Trial:
    """A window of the search.

    Attributes:
        rate: Calls a second.
        p99_ms: The 99th percentile of the latency, infinite if nothing was answered.
        errors: Share of the calls that failed.
        gave_up: True if the window was ended because the service fell behind.
        lag_p99_ms: The 99th percentile of how late the generator itself was.
    """

    rate: float
    p99_ms: float
    errors: float
    gave_up: bool = False
    lag_p99_ms: float = 0.0


@dataclass(frozen=True)
class Promise:
    """The promise of a service.

    Attributes:
        p99_ms: Limit of the 99th percentile of the latency, in milliseconds.
        errors: Limit of the share of failed calls.
    """

    p99_ms: float
    errors: float = 0.0

    def holds(self, trial: Trial) -> bool:
        """Returns True if a window kept it."""
        return not trial.gave_up and trial.p99_ms <= self.p99_ms and trial.errors <= self.errors

    def is_far_off(self, trial: Trial) -> bool:
        """Returns True if bad luck alone cannot explain the window."""
        return trial.gave_up or trial.p99_ms > _FAR_OFF * self.p99_ms


@dataclass
class Search:
    """A search and its outcome.

    Attributes:
        promise: What has to hold.
        measure: Measures one window at a rate.
        trials: The windows so far.
    """

    promise: Promise
    measure: Callable[[float], Trial]
    trials: list[Trial] = field(default_factory=list)

    def highest(self, start: float, precision: float = 0.03) -> float:
        """Returns the highest rate that holds, 0 if none does.

        The rate grows or shrinks until one holds and a higher one does not, and halves the gap until it is small. A
        window that fails is tried once more, because one stall of the machine is not the service's limit. In the end
        the rate has to hold again: the search has looked at several, and the luckiest of them would win.

        Args:
            start: A guess, in calls a second.
            precision: The gap at the end, as a share of the rate.
        """
        low, high, rate = 0.0, math.inf, start
        while high == math.inf or (low == 0 and high > _LEAST_RATE):
            if self._holds(rate):
                low = rate
            else:
                high = rate
            rate = low * _GROWTH if high == math.inf else high / _SHRINK if low == 0 else rate
        while low and high / low > 1 + precision:
            middle = math.sqrt(low * high)
            if self._holds(middle):
                low = middle
            else:
                high = middle
        while low > _LEAST_RATE and not self._holds(low):
            low /= 1 + precision
        return low if low > _LEAST_RATE else 0.0

    def _holds(self, rate: float) -> bool:
        for _ in range(2):
            trial = self.measure(rate)
            self.trials.append(trial)
            if self.promise.holds(trial):
                return True
            if self.promise.is_far_off(trial):
                return False
        return False
