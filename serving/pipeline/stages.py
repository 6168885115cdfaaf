"""The contracts of the stages: each reads the request and the user's state, and returns a value.

A stage changes nothing that it is given; what it returns, the runner applies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from serving.bundle.bitmap import Bitmap
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import Mask, Request, Rows, Scores, UserState
from serving.pipeline.results import Adjusted, HeldBack, Hydrated, Reason, Scored, Selected, Slate


class Stage(Protocol):
    """The common part of every stage; `name` is that of its timings, counters and marks."""

    name: str

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the stage has anything to do for this request."""
        ...


class Hydrator(Stage, Protocol):
    """Finds out something about the user; `part` names it in the answer that has to do without."""

    part: str

    def hydrate(self, request: Request, user: UserState) -> Hydrated:
        """Returns the user state with what the hydrator finds."""
        ...


class Source(Stage, Protocol):
    """Proposes candidates; if `user.blocks_unread`, in a feed only those that are safe for any user."""

    def retrieve(self, request: Request, user: UserState, allowed: Bitmap) -> tuple[Rows, Scores]:
        """Returns rows among those `allowed`, each once, and their scores, best first."""
        ...


class PostFilter(Stage, Protocol):
    """Proves candidates after retrieval; `required` if a request without it must fail."""

    required: bool

    def keep(self, request: Request, user: UserState, rows: Rows) -> Mask:
        """Returns True for the rows that may stay."""
        ...


class Filter(PostFilter, Protocol):
    """Holds rows back from retrieval, and proves afterwards that none came through."""

    def hold_back(self, request: Request, user: UserState) -> HeldBack:
        """Returns the rows that sources may not name."""
        ...


class Eligibility(PostFilter, Protocol):
    """The filter that no pipeline goes without: the items that may be shown at all."""

    def bitmap(self, request: Request) -> tuple[Bitmap, int]:
        """Returns the rows that may be shown, as a bitmap of the caller's own, and how many of the catalog may not."""
        ...


class Scorer(Stage, Protocol):
    """Scores candidates; a candidate's score never depends on the others."""

    def score(self, request: Request, user: UserState, candidates: Candidates) -> Scored:
        """Returns one score per candidate, higher is better; one that is not finite sinks to the end."""
        ...


class Adjuster(Stage, Protocol):
    """Moves scores; it may look at all the candidates together."""

    part: str

    def adjust(self, request: Request, user: UserState, candidates: Candidates, scores: Scores) -> Adjusted:
        """Returns the moved scores; one that is not finite sinks to the end."""
        ...


class Selector(Stage, Protocol):
    """Chooses and orders the slate."""

    def select(self, request: Request, user: UserState, candidates: Candidates, scores: Scores) -> Selected:
        """Returns positions among the candidates, best first, and the probability of each choice."""
        ...


class Explainer(Stage, Protocol):
    """Finds the reasons of a slate."""

    def explain(self, request: Request, slate: Slate) -> list[list[Reason]]:
        """Returns the reasons of each item of the slate."""
        ...


class SideEffect(Stage, Protocol):
    """Acts on the finished slate, without making the caller wait."""

    def apply(self, request: Request, slate: Slate) -> None:
        """Takes note of the slate; must return at once."""
        ...


class Recorder(Protocol):
    """Takes the measurements of the runner."""

    def stage(self, name: str, microseconds: int) -> None:
        """Notes how long a stage took."""
        ...

    def failure(self, name: str) -> None:
        """Notes that a stage failed and the request went on without it."""
        ...


class Tier(NamedTuple):
    """The sources of one level of personalisation.

    Attributes:
        rung: The level; "" where every user's candidates are the same and the user's vector, if any, only orders them.
        sources: Its sources.
    """

    rung: str
    sources: Sequence[Source]
