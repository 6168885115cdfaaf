"""The filters: each keeps its rows out of retrieval, and afterwards proves each candidate."""

from __future__ import annotations

import numpy as np

from features.catalog import Catalog
from features.controls import ControlKind, blocked_keys
from serving.bundle.bitmap import Bitmap
from serving.pipeline.request import Mask, Request, Rows, UserState
from serving.pipeline.results import HeldBack


class EligibilityFilter:
    """Keeps only items that may be shown now. Fails closed: without it there is no answer."""

    name = "eligible"
    required = True

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True: every request needs it."""
        return True

    def bitmap(self, request: Request) -> tuple[Bitmap, int]:
        """Returns the rows that may be shown now, as a bitmap of the caller's own, and how many may not."""
        bits, count = self._catalog.eligible_rows(request.now_ms)
        return bits.copy(), min(self._catalog.size, 8 * bits.size) - count

    def keep(self, request: Request, user: UserState, rows: Rows) -> Mask:
        """Returns True for the rows that are available at the time of the request."""
        return self._catalog.eligible(rows, request.now_ms)


class SeenFilter:
    """Drops items that the user has had already."""

    name = "seen"
    required = False

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the user has had some."""
        return bool(user.seen.size)

    def hold_back(self, request: Request, user: UserState) -> HeldBack:
        """Returns the rows that the user has had."""
        return HeldBack(user.seen)

    def keep(self, request: Request, user: UserState, rows: Rows) -> Mask:
        """Returns True for the rows that are new to the user."""
        return absent(rows, user.seen, self._catalog.size)


class BlockedFilter:
    """Drops items that the user's blocks cover: an item, all of a creator, all of a primary category."""

    name = "blocked"
    required = False

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the user has blocks."""
        return bool(user.controls.size)

    def hold_back(self, request: Request, user: UserState) -> HeldBack:
        """Returns the rows that a block covers at the time of the request."""
        columns, now = self._catalog.columns, request.now_ms
        items = self._catalog.rows_of_keys(blocked_keys(user.controls, ControlKind.ITEM, now))
        creators = blocked_keys(user.controls, ControlKind.CREATOR, now)
        categories = blocked_keys(user.controls, ControlKind.CATEGORY, now)
        return HeldBack(items[items >= 0], ((columns.creator, creators), (columns.category, categories)))

    def keep(self, request: Request, user: UserState, rows: Rows) -> Mask:
        """Returns True for the rows that no block covers at the time of the request."""
        columns, now = self._catalog.columns, request.now_ms
        items = self._catalog.rows_of_keys(blocked_keys(user.controls, ControlKind.ITEM, now))
        # The same blocks by other means than `hold_back`, so that a defect in one of the two is caught by the other.
        kept = absent(rows, items[items >= 0], self._catalog.size)
        kept &= ~np.isin(columns.creator[rows], blocked_keys(user.controls, ControlKind.CREATOR, now))
        kept &= ~np.isin(columns.category[rows], blocked_keys(user.controls, ControlKind.CATEGORY, now))
        return kept


class ExcludedFilter:
    """Drops items that the caller excludes, and each seed as its own neighbour."""

    name = "excluded"
    required = True

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if there are some."""
        return bool(request.exclude.size or request.seeds.size or request.exclude_unknown)

    def hold_back(self, request: Request, user: UserState) -> HeldBack:
        """Returns the rows that were named."""
        return HeldBack(self._named(request))

    def keep(self, request: Request, user: UserState, rows: Rows) -> Mask:
        """Returns True for the rows that were not named."""
        return absent(rows, self._named(request), self._catalog.size)

    def _named(self, request: Request) -> Rows:
        named = np.concatenate([request.exclude, request.seeds])
        if not request.exclude_unknown:
            return named
        # An item that was unknown when its id was looked up may have been put since.
        put = self._catalog.rows(list(request.exclude_unknown))
        return np.concatenate([named, put[put >= 0]])


def absent(rows: Rows, out: Rows, size: int) -> Mask:
    """Returns True for those of `rows` that are not among `out`, all below `size`; bool [n]."""
    # A byte for each row of the catalogue is quicker than sorting, which np.isin does.
    table = np.ones(size, np.bool_)
    table[out] = False
    return table[rows]
