"""What may stay: each filter returns a mask, true for the rows that may."""

from __future__ import annotations

import numpy as np

from features.catalog import Catalog
from serving.pipeline import Mask, Query, Rows


class Eligible:
    """Only items that may be shown now. Fails closed: without it there is no answer."""

    name = "eligible"
    required = True

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Always."""
        return True

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

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that are new to the person."""
        return absent(rows, query.seen, self._catalog.size)


class Excluded:
    """Nothing the caller asked to leave out, and no seed as its own neighbour."""

    name = "excluded"
    required = True

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, query: Query) -> bool:
        """Where something is to be left out."""
        return bool(query.exclude.size or query.seeds.size)

    def keep(self, query: Query, rows: Rows) -> Mask:
        """True for the rows that were not named."""
        return absent(rows, np.concatenate([query.exclude, query.seeds]), self._catalog.size)


def absent(rows: Rows, out: Rows, size: int) -> Mask:
    """Which of `rows` are not among `out`, all below `size`: a byte a row is quicker than sorting; bool [n]."""
    table = np.ones(size, np.bool_)
    table[out] = False
    return table[rows]
