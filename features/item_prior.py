"""The prior of a new item: the statistics of its creator and its category, until it has impressions of its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from features.catalog_columns import CatalogColumns

Firsts = Mapping[str, tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]]
"""By "creator" and "category": the distinct keys, ascending, and the first row that has each; uint64, int32 [n]."""

GROUPS = ("creator", "category")


def firsts_of(creator: npt.NDArray[np.uint64], category: npt.NDArray[np.uint64]) -> Firsts:
    """Returns the first item of each creator and of each category, from the columns of the bundle's items."""
    firsts = {}
    for name, column in zip(GROUPS, (creator, category), strict=True):
        keys, rows = np.unique(column, return_index=True)
        firsts[name] = keys, rows.astype(np.int32)
    return firsts


class ItemPrior:
    """Statistics for items without impressions, from the first item of the same creator and of the same category."""

    def __init__(self, columns: CatalogColumns, firsts: Firsts) -> None:
        """Takes the columns of the bundle's items, and their `firsts_of`; items put later are no basis for a prior."""
        self._statistics, self._first = columns.statistics, firsts

    def statistics(self, category: int, creator: int) -> npt.NDArray[np.float32]:
        """Returns the statistics of a new item, float32 [S]; zeros, which mean unknown, if it shares neither group."""
        out = np.zeros(self._statistics.shape[1], np.float32)
        item, of_creator, of_category = blocks(out)
        like_creator, like_category = self._relative("creator", creator), self._relative("category", category)
        if like_category is not None:
            of_category[:] = blocks(like_category)[2]
            of_creator[:] = item[:] = of_category
        # A creator says more of an item than a category does.
        if like_creator is not None:
            out[1:2] = like_creator[1:2]
            of_creator[:] = item[:] = blocks(like_creator)[1]
        return out

    def rows(self, name: str) -> npt.NDArray[np.int32]:
        """Returns one row of the bundle for each "creator" or "category" that its items have; int32 [n]."""
        keys, rows = self._first[name]
        named: npt.NDArray[np.int32] = rows[keys != 0]
        return named

    def first(self, name: str, key: int) -> int:
        """Returns the first row of the bundle whose "creator" or "category" is `key`; -1 if there is none."""
        keys, rows = self._first[name]
        at = int(np.searchsorted(keys, np.uint64(key)))
        return int(rows[at]) if key and at < keys.size and int(keys[at]) == key else -1

    def _relative(self, name: str, key: int) -> npt.NDArray[np.float32] | None:
        row = self.first(name, key)
        return self._statistics[row] if row >= 0 else None


def blocks(
    statistics: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Returns the parts of statistics `[..., S]` with the rates of item, creator and category, `[..., A]` each."""
    rates = statistics[..., 2:]
    actions = rates.shape[-1] // 3
    return rates[..., :actions], rates[..., actions : 2 * actions], rates[..., 2 * actions :]
