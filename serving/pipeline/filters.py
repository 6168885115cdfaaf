"""What may stay: a filter keeps its rows out of retrieval, then proves each candidate: true for what may."""

from __future__ import annotations

import numpy as np

from features.catalog import Catalog
from features.controls import ControlKind, blocked_keys
from serving.bundle.bitmap import Bitmap, allowed_count, clear_keys, clear_rows
from serving.pipeline.query import Mask, Query, Rows


class Eligible:
    """Only items that may be shown now. Fails closed: without it there is no answer."""

    name = "eligible"
    required = True

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._counted: tuple[Bitmap, int] | None = None

    def enable(self, query: Query) -> bool:
        """Always."""
        return True

    def bitmap(self, query: Query) -> tuple[Bitmap, int]:
        """The rows that may be shown in this second, as a bitmap of the query's own, and how many may not."""
        bits = self._catalog.eligible_bitmap(query.now_ms)
        counted = self._counted
        if counted is None or counted[0] is not bits:
            size = min(self._catalog.size, 8 * bits.size)
            self._counted = counted = (bits, size - allowed_count(bits, size))
        return bits.copy(), counted[1]

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that are available at the time of the request."""
        return self._catalog.eligible(rows, query.now_ms)


class Seen:
    """Nothing the person has had already."""

    name = "seen"
    required = False

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where the person has had something."""
        return bool(query.seen.size)

    def hold_back(self, query: Query, allowed: Bitmap) -> int:
        """Takes the rows out that the person has had."""
        return int(clear_rows(allowed, query.seen))

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that are new to the person."""
        return absent(rows, query.seen, self._catalog.size)


class Blocked:
    """Nothing that the person's own rules hold back: an item, all of a creator, all of a primary category."""

    name = "blocked"
    required = False

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where the person has rules."""
        return bool(query.rules.size)

    def hold_back(self, query: Query, allowed: Bitmap) -> int:
        """Takes the rows out that a rule holds back at the time of the request: a pass over a column for each kind."""
        columns, now = self._catalog.columns, query.now_ms
        items = self._catalog.rows_of_keys(blocked_keys(query.rules, ControlKind.ITEM, now))
        count = int(clear_rows(allowed, items[items >= 0]))
        count += int(clear_keys(allowed, columns.creator, blocked_keys(query.rules, ControlKind.CREATOR, now)))
        return count + int(clear_keys(allowed, columns.category, blocked_keys(query.rules, ControlKind.CATEGORY, now)))

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that no rule holds back at the time of the request."""
        columns, now = self._catalog.columns, query.now_ms
        items = self._catalog.rows_of_keys(blocked_keys(query.rules, ControlKind.ITEM, now))
        kept = absent(rows, items[items >= 0], self._catalog.size)
        kept &= ~np.isin(columns.creator[rows], blocked_keys(query.rules, ControlKind.CREATOR, now))
        kept &= ~np.isin(columns.category[rows], blocked_keys(query.rules, ControlKind.CATEGORY, now))
        return kept


class Excluded:
    """Nothing the caller asked to leave out, and no seed as its own neighbour."""

    name = "excluded"
    required = True

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where something is to be left out."""
        return bool(query.exclude.size or query.seeds.size)

    def hold_back(self, query: Query, allowed: Bitmap) -> int:
        """Takes the rows out that were named."""
        return int(clear_rows(allowed, np.concatenate([query.exclude, query.seeds])))

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that were not named."""
        return absent(rows, np.concatenate([query.exclude, query.seeds]), self._catalog.size)


def absent(rows: Rows, out: Rows, size: int) -> Mask:
    """Which of `rows` are not among `out`, all below `size`: a byte a row is quicker than sorting; bool [n]."""
    table = np.ones(size, np.bool_)
    table[out] = False
    return table[rows]
