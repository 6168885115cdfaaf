"""The two values that every stage reads: a frozen `Request`, and the `UserState` that the hydrators find.

A candidate is a row number of the catalog; a set of candidates is arrays, never objects.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from features.assemble import History
from features.controls import Controls, Dials, no_controls
from features.linear import NO_SCORES, LinearScores
from features.profile import Profile
from features.transforms import text_tokens
from serving.experiments import UNASSIGNED, Assignment

Rows = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

POPULAR = "popular"
"""Name of the source whose items are safe for any user, also when personal blocks cannot be read."""

NEAREST, NEIGHBORS, SEGMENT = "nearest", "neighbors", "popular_in_segment"
"""Names of the sources of the other tiers of a feed, whose scores the feed's scorer reads."""

WANTED, FRESH = "wanted", "fresh"
"""Names of the sources that compete with any tier of a feed."""

UPSTREAM = "upstream"
"""Name of the source of the caller's own candidates."""

NO_ROWS: Rows = np.empty(0, np.int32)


class Degraded(NamedTuple):
    """One thing an answer gave up: the part, by its name in the contract, and why."""

    part: str
    reason: str


class Unknown(NamedTuple):
    """A candidate of the caller's that the catalog does not know: it keeps the place that the caller gave it.

    Attributes:
        item_id: Its external id.
        place: Its place: before the answer, the number of the request's `rows` that the caller ranks above it; in a
            slate, its position on the page.
        upstream: The caller's score of it; NaN where the caller gives none.
    """

    item_id: str
    place: int
    upstream: float = math.nan


@dataclass(frozen=True, slots=True)
class Request:
    """A caller's request.

    Attributes:
        request_id: The attribution token.
        subject: Key of the user, "" where none is named.
        now_ms: Time of the request, ms.
        deadline: When the answer must be there, on the clock of `time.monotonic`, seconds.
        page_size: Number of items wanted.
        begun: When the request came, on the same clock.
        method: Which method answers: "recommend", "search", "rank" or "similar".
        surface: Where the answer is shown.
        session_id: The visit.
        context: What the caller tells about the request, to be logged with the impression; by column of that table.
        text: The words searched for.
        rows: The caller's candidates, where it brings some.
        unknown: Those that the catalog does not know, in the caller's order.
        upstream: The caller's scores of `rows`.
        upstream_weight: Weight of `upstream` against the personal score.
        seeds: Rows to find neighbors of.
        exclude: Rows never to return.
        exclude_unknown: External ids never to return that the catalog did not know when they were looked up.
        personalize: True where the user's history may be used.
        dials: How this request wants the answer made; each takes the place of the stored dial.
        explain: True where reasons are wanted.
        assignment: The experiment's arm of the subject by its own id.
        min_profile_version: Profile version to wait for, 0 for none.
        min_catalog_version: Catalog version to wait for, 0 for none.
        tokens: The text tokens of `text`, None without words; uint32.
    """

    request_id: str
    subject: str
    now_ms: int
    deadline: float
    page_size: int
    begun: float = field(default_factory=time.monotonic)
    method: str = ""
    surface: str = ""
    session_id: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    rows: Rows | None = None
    unknown: tuple[Unknown, ...] = ()
    upstream: Scores | None = None
    upstream_weight: float = 1.0
    seeds: Rows = field(default_factory=lambda: NO_ROWS)
    exclude: Rows = field(default_factory=lambda: NO_ROWS)
    exclude_unknown: frozenset[str] = frozenset()
    personalize: bool = True
    dials: Dials = field(default_factory=dict)
    explain: bool = False
    assignment: Assignment = UNASSIGNED
    min_profile_version: int = 0
    min_catalog_version: int = 0
    tokens: npt.NDArray[np.uint32] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Here and not in a hydrator: the words find items also where the query encoder fails.
        if self.text:
            object.__setattr__(self, "tokens", text_tokens(self.text))

    def seconds_left(self) -> float:
        """Returns the time until the deadline in seconds; negative when it is over."""
        return self.deadline - time.monotonic()


class UserState(NamedTuple):
    """The knowledge of the user, and of the words searched for; each hydrator returns the next state.

    A named tuple, because it is copied several times a request: copying a frozen dataclass takes ten times as long.

    Attributes:
        profile: The user's profile, None unless it was read and may shape the answer.
        withheld: True where the user does not allow personal answers.
        controls: The blocks, mutes and dials that the user has set; CONTROL [n].
        dials: How the user, or this request, wants the answer made.
        segment: The category the user chooses most, if there is a table of what such users like, else "".
        history: The profile's events as this bundle sees them.
        seen: Rows that the user need not be shown again.
        vector: The user in the embedding space; float32 [D].
        linear: What the history adds to the relevance of items.
        encoded: The inputs of the user encoder: rows and types, two int64 [length].
        query_vector: The words searched for in the embedding space; float32 [D].
        assignment: The experiment's arm that the answer counts for.
        catalog_version: Version of the catalog that the answer is made from.
        blocks_unread: True where the blocks of a named user could not be read, so that only what is safe for any
            user is shown. The runner sets it.
    """

    profile: Profile | None = None
    withheld: bool = False
    controls: Controls = no_controls()
    dials: Dials = MappingProxyType({})
    segment: str = ""
    history: History | None = None
    seen: Rows = NO_ROWS
    vector: Scores | None = None
    linear: LinearScores = NO_SCORES
    encoded: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
    query_vector: Scores | None = None
    assignment: Assignment = UNASSIGNED
    catalog_version: int = 0
    blocks_unread: bool = False
