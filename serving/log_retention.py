"""The retention of the log: the hours for which it keeps, in memory, entries that every reader has.

The service writes its settings into the log itself, so that every process that trims uses the same ones, on any host.
Slates are three times as large as events and are not read again once they are in Parquet, so they go first. Without a
warehouse the log is the only copy, and keeps entries for a week unless the settings say otherwise; these and
`maxmemory`, of which it takes no more than nine tenths, bound it then.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

PROFILES_GROUP = "profiles"
"""Group of the projector, which applies events to profiles; every other group of the log keeps a copy."""

HOUR_MS = 3_600_000
EVENTS_MS = 24 * HOUR_MS
"""Also the time in which a retry of an event is recognised, and in which an event can be undone."""

SLATES_MS = 2 * HOUR_MS
ALONE_MS = 7 * 24 * HOUR_MS
"""Retention of entries without a copy elsewhere."""


@dataclass(frozen=True, slots=True)
class LogRetention:
    """The retention of entries that every reader has.

    Attributes:
        events_ms: Of events; None: a day where a warehouse reads them, else a week.
        slates_ms: Of slates; None: two hours where a warehouse reads them, else a week; never longer than events.
        copied: A warehouse is known to come, so the index of users need not last for a week.
    """

    events_ms: int | None = None
    slates_ms: int | None = None
    copied: bool = False

    @classmethod
    def of(cls, log_hours: float | None, slate_log_hours: float | None, copied: bool) -> LogRetention:
        """Returns the retention of the settings, which are in hours."""
        events, slates = (None if hours is None else int(hours * HOUR_MS) for hours in (log_hours, slate_log_hours))
        return cls(events, slates, copied)

    @classmethod
    def read(cls, stored: bytes | None) -> LogRetention:
        """Parses the retention that a log holds; without any, nothing is set."""
        events, _, slates = (stored or b"").partition(b" ")
        events_ms, slates_ms = (int(text) if text.isdigit() else None for text in (events, slates))
        return cls(events_ms, slates_ms)

    @property
    def stored(self) -> bytes:
        """The bytes that a log holds."""
        return b" ".join(b"-" if ms is None else b"%d" % ms for ms in (self.events_ms, self.slates_ms))

    @property
    def index_ms(self) -> int:
        """Retention of the index of a user without new entries: twice that of the entries it names, or longer."""
        usual = EVENTS_MS if self.copied else ALONE_MS
        return 2 * (usual if self.events_ms is None else self.events_ms)

    def kept(self, events_read_by: Collection[str], slates_read_by: Collection[str]) -> tuple[int, int]:
        """Returns the retention of events and of slates, in ms.

        Args:
            events_read_by: Consumer groups of the events.
            slates_read_by: Consumer groups of the slates.
        """
        # Before the projector has joined, its group cannot tell which events it still needs.
        copied = PROFILES_GROUP in events_read_by and len(events_read_by) > 1
        events = (EVENTS_MS if copied else ALONE_MS) if self.events_ms is None else self.events_ms
        slates = (SLATES_MS if slates_read_by else ALONE_MS) if self.slates_ms is None else self.slates_ms
        return events, min(events, slates)
