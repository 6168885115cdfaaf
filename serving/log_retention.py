"""For how long the log keeps what every reader has: hours, as memory is what it is kept in.

The service says so once, in the log itself, and whoever trims goes by that: the projector and the warehouse beside it,
or elsewhere. Slates are three times as large as events and nobody asks for them again once they are in Parquet, so they
go first. Where no warehouse reads the log, the log is the only copy, and is kept for a week unless the service says
otherwise; that and `maxmemory`, of which it takes no more than nine tenths, bound it then.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

PROFILES_GROUP = "profiles"
"""The group that brings events into profiles; every other group of the log keeps a copy of its own."""

HOUR_MS = 3_600_000
EVENTS_MS = 24 * HOUR_MS
"""As long as a retry of an event is recognised, and so as long as one can be undone."""

SLATES_MS = 2 * HOUR_MS
ALONE_MS = 7 * 24 * HOUR_MS
"""For how long entries stay that nobody keeps a copy of."""


@dataclass(frozen=True, slots=True)
class LogRetention:
    """For how long entries stay that every reader has.

    Attributes:
        events_ms: Of events; None: a day where a warehouse reads them, else a week.
        slates_ms: Of slates; None: two hours where a warehouse reads them, else a week; never longer than events.
        copied: Whether a warehouse is known to come: the index of users then need not last for a week.
    """

    events_ms: int | None = None
    slates_ms: int | None = None
    copied: bool = False

    @classmethod
    def of(cls, log_hours: float | None, slate_log_hours: float | None, copied: bool) -> LogRetention:
        """From the settings, in hours."""
        events, slates = (None if hours is None else int(hours * HOUR_MS) for hours in (log_hours, slate_log_hours))
        return cls(events, slates, copied)

    @classmethod
    def read(cls, stored: bytes | None) -> LogRetention:
        """As the log holds them; nothing was said where it holds none."""
        events, _, slates = (stored or b"").partition(b" ")
        events_ms, slates_ms = (int(one) if one.isdigit() else None for one in (events, slates))
        return cls(events_ms, slates_ms)

    @property
    def stored(self) -> bytes:
        """As the log holds them."""
        return b" ".join(b"-" if one is None else b"%d" % one for one in (self.events_ms, self.slates_ms))

    @property
    def index_ms(self) -> int:
        """For how long the index of a user without news is kept: twice as long as what it names, or longer."""
        usual = EVENTS_MS if self.copied else ALONE_MS
        return 2 * (usual if self.events_ms is None else self.events_ms)

    def kept(self, events_read_by: Collection[str], slates_read_by: Collection[str]) -> tuple[int, int]:
        """For how long events and slates stay, ms.

        Args:
            events_read_by: The consumer groups of the events.
            slates_read_by: Those of the slates.
        """
        # Before the projector has joined, nobody would know what it has not applied yet.
        copied = PROFILES_GROUP in events_read_by and len(events_read_by) > 1
        events = (EVENTS_MS if copied else ALONE_MS) if self.events_ms is None else self.events_ms
        slates = (SLATES_MS if slates_read_by else ALONE_MS) if self.slates_ms is None else self.slates_ms
        return events, min(events, slates)
