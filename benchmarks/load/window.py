"""A window of a measurement: the calls that it was to make, and what became of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.load.hpack import decode
from benchmarks.load.wire import OK, STATUS

UNSENT, OPEN = 255, 254
"""Statuses of calls that were not sent, and that have no answer yet."""


@dataclass(frozen=True)
class CallPlan:
    """The calls of a window.

    Attributes:
        moments: Seconds from the beginning of the window, ascending; float64 [N].
        heads: Header block of each call.
        messages: Message of each call, serialised.
        kinds: Index into `names` of each call; int8 [N].
        names: Names of the kinds of calls.
        timeout_s: Deadline of each call, in seconds.
    """

    moments: npt.NDArray[np.float64]
    heads: Sequence[bytes]
    messages: Sequence[bytes]
    kinds: npt.NDArray[np.int8]
    names: Sequence[str]
    timeout_s: float

    @property
    def rate(self) -> float:
        """The calls a second on average."""
        return len(self.messages) / max(float(self.moments[-1]), 1e-9) if len(self.messages) else 0.0


@dataclass
class Window:
    """The outcome of a window; a call that was never sent has status `UNSENT`.

    Attributes:
        plan: Its calls.
        latency_s: Seconds from the intended start to the answer or error of each call, NaN without; float64 [N].
        lag_s: Seconds from the intended start to the sending of each call, NaN without; float64 [N].
        status: Number of the gRPC status of each call; uint8 [N].
        answers: Message of each answered call, serialised.
        blocks: Last headers of each call that was refused, by its number.
        seconds: Length of the window up to the last answer.
        gave_up: True if the service fell so far behind that the window was ended early.
        busy_s: Processor time of the generator.
    """

    plan: CallPlan
    latency_s: npt.NDArray[np.float64]
    lag_s: npt.NDArray[np.float64]
    status: npt.NDArray[np.uint8]
    answers: list[bytes]
    blocks: dict[int, bytes] = field(default_factory=dict)
    seconds: float = 0.0
    gave_up: bool = False
    busy_s: float = 0.0

    @property
    def answered(self) -> npt.NDArray[np.bool_]:
        """The calls that were answered without an error; bool [N]."""
        is_answered: npt.NDArray[np.bool_] = self.status == OK
        return is_answered

    @property
    def sent(self) -> npt.NDArray[np.bool_]:
        """The calls that were sent; bool [N]."""
        is_sent: npt.NDArray[np.bool_] = self.status != UNSENT
        return is_sent

    def errors(self) -> dict[str, int]:
        """Returns the number of failed calls by the name of their status."""
        failed = self.status[self.sent & ~self.answered].tolist()
        return {STATUS[number]: count for number, count in sorted(Counter(failed).items())}

    def latencies_ms(self) -> npt.NDArray[np.float64]:
        """Returns the latencies of the answered calls in milliseconds, in the order of their calls."""
        return self.latency_s[self.answered] * 1000


def empty_window(plan: CallPlan) -> Window:
    """Returns a window of which nothing is sent yet."""
    count = len(plan.messages)
    unknown = np.full(count, np.nan)
    return Window(plan, unknown.copy(), unknown.copy(), np.full(count, UNSENT, np.uint8), [b""] * count)


def refusals(window: Window) -> dict[str, dict[str, Any]]:
    """Returns, by the status of the failed calls, how many there are and how many carry a hint when to retry."""
    hints: dict[str, dict[str, Any]] = {}
    for name, count in window.errors().items():
        hints[name] = {"calls": count, "with_hint": 0}
    for key, block in window.blocks.items():
        hints[STATUS[window.status[key]]]["with_hint"] += "grpc-retry-pushback-ms" in decode(block)
    return hints
