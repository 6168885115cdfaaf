"""The calls that compute: each is admitted by its headers, and computed in a thread of the limit of rankings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving.concurrency import ConcurrencyLimit
from serving.errors import ServingError
from serving.services.reception.admission import BATCH, PRIORITY_HEADER, AdmissionControl

_CENTURIES_S = 1e6


@dataclass(frozen=True, slots=True)
class Rankings:
    """The way in which the rankings of a server are admitted and computed.

    Attributes:
        limit: Computes them.
        admission: Decides which ones are taken.
        default_s: Time of a call that sets no deadline, in seconds.
        settle: Called in the thread of a ranking when its answer is on its way, for work that no caller waits for.
    """

    limit: ConcurrencyLimit
    admission: AdmissionControl
    default_s: float
    settle: Callable[[], None] = lambda: None

    def ranking(self, event: Any, kind: str, caller: object) -> RankingCall:
        """Returns the ranking of a call.

        Args:
            event: The call as gRPC has it when its headers have come.
            kind: Name of its method.
            caller: Its connection.
        """
        batch = any(name == PRIORITY_HEADER and value == BATCH for name, value in event.invocation_metadata)
        now, deadline = time.time(), event.call_details.deadline
        # gRPC gives a call without a deadline some centuries.
        return RankingCall(
            self, kind, caller, batch, deadline if deadline < now + _CENTURIES_S else now + self.default_s
        )


@dataclass(frozen=True, slots=True)
class RankingCall:
    """One ranking.

    Attributes:
        rankings: Those of its server.
        kind: Name of its method.
        caller: Its connection.
        batch: It gives way to interactive rankings.
        deadline: Unix time at which its answer must be there, in seconds.
    """

    rankings: Rankings
    kind: str
    caller: object
    batch: bool
    deadline: float

    def refusal(self) -> ServingError | None:
        """Returns the error that it has to end with, as it could not be answered in time; None to take it."""
        return self.rankings.admission.refusal(self.kind, self.deadline - time.time(), self.caller, batch=self.batch)

    def submit(self, run: Callable[[], None]) -> None:
        """Has it computed as soon as there is a slot for it."""
        self.rankings.limit.submit(run, self.kind, self.caller, batch=self.batch)

    def settle(self) -> None:
        """Does what remains when its answer is on its way."""
        self.rankings.settle()
