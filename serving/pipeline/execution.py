"""One request on its way through the stages: the user's state, the marks of the answer, and the times."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from serving.errors import DeadlineExceeded, ServingError
from serving.pipeline.request import Degraded, Request, UserState
from serving.pipeline.results import Hydrated
from serving.pipeline.stages import PostFilter, Recorder, Stage

RESERVE = 0.1
"""Share of a request's time that belongs to the stages it cannot do without."""

SOURCE = "SOURCE"
"""The part of an answer that several stages make, so that its reason names the one that failed."""

_BLOCKS_UNREAD = frozenset(("PROFILE_STORE", "PROFILE_CORRUPT"))
_log = logging.getLogger(__name__)
_S = TypeVar("_S", bound=Stage)


class Execution:
    """Times the stages of one request, starts none of them after the deadline, and notes what fails.

    Attributes:
        request: The request.
        user: The user's state as the hydrators left it.
        degraded: What was given up so far.
        timings: Microseconds per stage so far.
        held_back: Number of rows that each filter held back from retrieval.
        dropped: Number of items that each filter held back in all.
        blind: Names of the filters that failed.
    """

    def __init__(self, request: Request, recorder: Recorder) -> None:
        self.request, self._recorder = request, recorder
        self.user = UserState(dials=request.dials, assignment=request.assignment)
        self.degraded: list[Degraded] = []
        self.timings: list[tuple[str, int]] = []
        self.held_back: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.blind: set[str] = set()

    def enabled(self, stages: Sequence[Any]) -> Iterator[Any]:
        """Yields each stage that is enabled and takes the time until it is done with."""
        for stage in stages:
            if stage.enable(self.request, self.user):
                begun = self.begin(stage.name)
                yield stage
                self.end(stage.name, begun)

    def begin(self, name: str) -> float:
        """Starts a stage, unless the deadline has passed; returns the time."""
        begun = time.monotonic()
        if begun > self.request.deadline:
            raise DeadlineExceeded(f"the deadline passed before {name}; give the call more time")
        return begun

    def end(self, name: str, begun: float) -> None:
        """Notes how long a stage took."""
        spent = int((time.monotonic() - begun) * 1e6)
        self.timings.append((name, spent))
        self._recorder.stage(name, spent)

    def optional(self, stages: Sequence[_S]) -> Sequence[_S]:
        """Returns the stages where there is time for them; else none, and marks those that had something to do."""
        request = self.request
        if request.seconds_left() >= RESERVE * (request.deadline - request.begun):
            return stages
        # A stage that would not run anyway costs the answer nothing, so it is not named.
        left_out = [stage.name for stage in stages if stage.enable(request, self.user)]
        if left_out:
            self.degrade("DEADLINE", f"{', '.join(left_out)} left out: less than {RESERVE:.0%} of the time was left")
        return ()

    def hydrated(self, hydrated: Hydrated) -> None:
        """Takes over what a hydrator found."""
        self.user = hydrated.user
        for part, reason in hydrated.degraded:
            self.degrade(part, reason)

    def degrade(self, part: str, reason: str) -> None:
        """Marks the answer: it does without `part` because of `reason`."""
        self.degraded.append(Degraded(part, reason))
        if part in _BLOCKS_UNREAD:
            self.user = self.user._replace(blocks_unread=True)

    def drop(self, name: str, count: int) -> None:
        """Counts items that a filter held back."""
        self.dropped[name] = self.dropped.get(name, 0) + count

    def without(self, stage: Stage, part: str = "") -> _StageGuard:
        """Lets the request go on without a stage that fails; `part` names it in the answer."""
        return _StageGuard(self, stage, part)

    def reading(self, screen: PostFilter) -> _StageGuard:
        """Lets the request go on without a personal filter that fails, the popular pool alone staying."""
        return _StageGuard(self, screen, "PROFILE_STORE", screen)

    def failed(self, stage: Stage, part: str, error: Exception) -> None:
        """Notes that the request goes on without a stage; the deadline itself is never swallowed."""
        if isinstance(error, DeadlineExceeded):
            raise error
        self._recorder.failure(stage.name)
        # A ServingError is an expected trouble, which its origin logs; anything else is a defect and needs its trace.
        if not isinstance(error, ServingError):
            _log.error("stage %s failed; the answer goes on without it", stage.name, exc_info=error)
        if part:
            reason = str(error) or type(error).__name__
            self.degrade(part, f"{stage.name}: {reason}" if part == SOURCE else reason)


class _StageGuard:
    """A `with` block around a stage that may fail; a class, as a generator would cost more than some stages."""

    __slots__ = ("_execution", "_part", "_screen", "_stage")

    def __init__(self, execution: Execution, stage: Stage, part: str, screen: PostFilter | None = None) -> None:
        self._execution, self._stage, self._part, self._screen = execution, stage, part, screen

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        if self._screen is not None:
            # A required filter fails the request: an ineligible or excluded item is never shown.
            if self._screen.required:
                return False
            self._execution.blind.add(self._screen.name)
        self._execution.failed(self._stage, self._part, error)
        return True
