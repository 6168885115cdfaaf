"""The evidence that the checks of `features.tables.validate` look at, and a finding of theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.clock import now_ms
from features.tables.conform import Intake, Rejected

SPARED = 0.01
"""The share that some findings allow, whatever the limit of their check."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The tables that are checked, and their circumstances.

    Attributes:
        events: `EVENTS`, in the order in which they were written.
        items: Ids of the catalogue's items; None if it is not known.
        impressions: `IMPRESSIONS`; None if there are none.
        rejected: Rows that are not in the tables because they are malformed.
        now_ms: The time now.
        intakes: The fate of the rows of each table, by its name, for the cells that could not be read.
        empty: Descriptions of the tables that exist and hold no row.
        place: Names an event by its row in `events`.
        warehouse: The folder, if it is a warehouse that a service writes.
        partitions: Partitions of the log of that warehouse.
    """

    events: pa.Table
    items: pa.Array[Any] | pa.ChunkedArray[Any] | None = None
    impressions: pa.Table | None = None
    rejected: list[Rejected] = field(default_factory=list)
    now_ms: int = field(default_factory=now_ms)
    intakes: Mapping[str, Intake] = field(default_factory=dict)
    empty: Sequence[str] = ()
    place: Callable[[int], str] = "row {}".format
    warehouse: Path | None = None
    partitions: int = 0


@dataclass(frozen=True, slots=True)
class Finding:
    """A result of a check: the number of wrong rows among those looked at, the description, and the remedy."""

    wrong: int
    of: int
    what: str
    remedy: str
    certain: bool = False
    """True if the check fails whatever the share, because the finding is about the whole."""
    spared: float = 0.0
    """The share that is allowed if the limit of the check is smaller."""

    def fails(self, limit: float) -> bool:
        """Returns True if more is wrong than is allowed."""
        return self.certain or bool(self.of and self.wrong / self.of > max(limit, self.spared))
