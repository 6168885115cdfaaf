"""Items that share words with a query, by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009).

A word is the 32-bit key that `features.transforms.text_tokens` makes of it. The items of the bundle are one set of
postings; what is put since then lies in a few more, of sizes that grow by steps: a change adds a small one, and those
of about a size are merged (O'Neil et al., "The log-structured merge-tree", 1996). So a change costs what it changes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from serving.bundle.postings import (
    K1,
    Postings,
    Words,
    accumulate,
    build_postings,
    count_holders,
    look_up,
    merge_postings,
)

MAX_QUERY_TOKENS = 32
"""Distinct words of a query that count; a longer text costs no more than this."""

STEP = 2
"""Two neighbouring sets of postings are merged unless the older is at least this many times as large."""

AT_ONCE = 20_000
"""Most entries that a change merges itself, some milliseconds; more are merged by a thread of their own meanwhile."""

_U32 = npt.NDArray[np.uint32]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]
_BITMAP = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One state of the index, which a search reads throughout.

    Attributes:
        base: Postings of the bundle's items.
        live: Postings of the items put since then, the oldest first.
        moment: Number of changes so far.
        size: One more than the last row.
        items: Number of items that count.
    """

    base: Postings
    live: tuple[Postings, ...]
    moment: int
    size: int
    items: int


class LexicalIndex:
    """BM25 over the words of the items; one thread writes, many read."""

    def __init__(self, offsets: _I64, tokens: _U32) -> None:
        """Takes the words of the items of the bundle.

        Args:
            offsets: Place at which the words of each row begin; int64 [N + 1].
            tokens: The words of all rows, in order and with repeats; uint32 [offsets[-1]].

        Raises:
            ValueError: The two do not fit.
        """
        self._begin(*base_postings(offsets, tokens))

    @classmethod
    def of(cls, base: Postings, average: float) -> LexicalIndex:
        """Returns an index of what `base_postings` made, which processes may share but for `retired`."""
        index = cls.__new__(cls)
        index._begin(base, average)
        return index

    def _begin(self, base: Postings, average: float) -> None:
        self._average = average
        self._now = _Snapshot(base, (), 0, base.retired.size, base.retired.size)
        self._lock = threading.Lock()
        self._merger: threading.Thread | None = None
        self._merging: tuple[Postings, ...] = ()

    def put(self, rows: Sequence[int], tokens: Sequence[_U32]) -> None:
        """Puts items, new or changed; their former words no longer count.

        Args:
            rows: Rows of the items.
            tokens: The words of each.
        """
        words = dict(zip(map(int, rows), tokens, strict=True))
        items = np.array(sorted(words), np.int32)
        lengths = np.array([words[row].size for row in items.tolist()], np.int64)
        flat = np.concatenate([np.empty(0, np.uint32), *(words[row] for row in items.tolist())])
        members = np.repeat(np.arange(items.size, dtype=np.int32), lengths)
        fresh = build_postings(members, flat, lengths, self._average)._replace(items=items)
        with self._lock:
            now = self._retired(items)
            size = max(now.size, 1 + int(items.max(initial=-1)))
            self._now = replace(now, live=(*now.live, fresh), size=size, items=now.items + items.size)
            self._merge_small()
            self._merge_large()

    def remove(self, rows: Sequence[int]) -> None:
        """Removes the words of items."""
        with self._lock:
            self._now = self._retired(np.unique(np.array(rows, np.int32)))

    def search(self, tokens: _U32, k: int, allowed: _BITMAP | None = None) -> tuple[_I32, _F32]:
        """Returns the best `k` items that hold at least one word of a query, best first, ties by row.

        Args:
            tokens: The words of the query; uint32 [n].
            k: Number of items to return, at least 1; fewer if fewer match.
            allowed: Rows that may be returned, one bit a row, lowest bit first; None allows every row.

        Returns:
            Rows int32 [<= k] and scores float32 [<= k] in (0, 1]: the share of the most that any item could score,
            so a score does not depend on which other items match.

        Raises:
            ValueError: `k` is less than 1.
        """
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        now = self._now
        # `touched` spares a pass over the sums of all items: a query meets few of them.
        sums, touched = np.zeros(now.size, np.float32), np.empty(now.size, np.int32)
        count = 0
        for postings, words in weigh(now, tokens):
            count = accumulate(postings, words, now.moment, sums, touched, count)
        rows = touched[:count]
        if allowed is not None:
            rows = rows[_bits(allowed, rows)]
        scores = sums[rows]
        if k < rows.size:
            keep = np.flatnonzero(scores >= np.partition(scores, rows.size - k)[rows.size - k])
            rows, scores = rows[keep], scores[keep]
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]

    def score(self, tokens: _U32, rows: _I32) -> _F32:
        """Returns the score of each of `rows` int32 [n], as `search` gives it, 0 if no word is shared; float32 [n]."""
        now = self._now
        rows, out = np.ascontiguousarray(rows, np.int32), np.zeros(len(rows), np.float32)
        for postings, words in weigh(now, tokens):
            look_up(postings, words, now.moment, rows, out)
        return out

    def _retired(self, rows: _I32) -> _Snapshot:
        """Retires distinct rows wherever they count, and returns the state at the moment from which they do not."""
        now = self._now
        moment = now.moment + 1
        gone = sum(postings.retire(rows, moment) for postings in (now.base, *now.live))
        return replace(now, moment=moment, items=now.items - gone)

    def _merge_small(self) -> None:
        """Merges the newest postings while they are as large as those before them, if that is soon done."""
        now = self._now
        while _due(now.live) == len(now.live) - 2 >= 0 and sum(part.cost for part in now.live[-2:]) <= AT_ONCE:
            pair = now.live[-2:]
            if any(part is other for part in pair for other in self._merging):
                return
            merged = merge_postings(pair, [part.retired == 0 for part in pair])
            self._now = now = replace(now, live=(*now.live[:-2], merged))

    def _merge_large(self) -> None:
        """Starts a thread that merges what is left to merge, unless one is at work."""
        if _due(self._now.live) >= 0 and self._merger is None:
            self._merger = threading.Thread(target=self._merge, name="words", daemon=True)
            self._merger.start()

    def _merge(self) -> None:
        """Merges pairs as long as one is due; changes go on meanwhile."""
        try:
            while pair := self._next_pair():
                counts = [part.retired == 0 for part in pair]
                merged = merge_postings(pair, counts)
                with self._lock:
                    for part, keep in zip(pair, counts, strict=True):
                        # Those that were retired meanwhile.
                        members = np.searchsorted(merged.items, part.items[keep])
                        merged.retired[members] = part.retired[keep]
                    live = self._now.live
                    at = next(place for place, part in enumerate(live) if part is pair[0])
                    self._now = replace(self._now, live=(*live[:at], merged, *live[at + 2 :]))
        finally:
            with self._lock:
                self._merger, self._merging = None, ()

    def _next_pair(self) -> tuple[Postings, ...]:
        """Returns the next two postings to merge, which no change merges meanwhile; none if none are due."""
        with self._lock:
            at = _due(self._now.live)
            self._merging = self._now.live[at : at + 2] if at >= 0 else ()
            return self._merging


def _due(live: tuple[Postings, ...]) -> int:
    """Returns the place of the last two neighbours that are to be merged, -1 if there are none."""
    costs = [part.cost for part in live]
    return next((at for at in range(len(costs) - 2, -1, -1) if costs[at] < STEP * costs[at + 1]), -1)


def base_postings(offsets: _I64, tokens: _U32) -> tuple[Postings, float]:
    """Returns the postings of the items of a bundle, and the average number of words of an item.

    Args:
        offsets: Place at which the words of each row begin; int64 [N + 1].
        tokens: The words of all rows, in order and with repeats; uint32 [offsets[-1]].

    Raises:
        ValueError: The two do not fit.
    """
    lengths = np.diff(offsets)
    if not offsets.size or offsets[0] != 0 or offsets[-1] != tokens.size or (lengths < 0).any():
        raise ValueError("token_offsets do not fit tokens; export the bundle again")
    # Of the bundle alone: with an average that moves, each item put would change the weights of all others.
    average = float(lengths.mean()) if tokens.size else 1.0
    members = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
    return build_postings(members, tokens, lengths, average), average


def weigh(now: _Snapshot, tokens: _U32) -> list[tuple[Postings, Words]]:
    """Returns the first `MAX_QUERY_TOKENS` distinct words of a query, against each set of postings that holds one."""
    distinct = np.array(list(dict.fromkeys(tokens.tolist()))[:MAX_QUERY_TOKENS], np.uint32)
    base_at = now.base.find(distinct)
    places = [(now.base, base_at), *((part, part.find(distinct)) for part in now.live)]
    # Counted everywhere, so that a word is as rare for a live item as for one of the bundle.
    holders = now.base.holders(base_at)
    places = [(part, at) for part, at in places if (at >= 0).any()]
    for part, at in places:
        if part is not now.base:
            count_holders(part, at, now.moment, holders)
    # A changed item is counted in the bundle too until the next one; `minimum` keeps the rarity above 0 all the same.
    rarity = np.log1p((now.items - np.minimum(holders, now.items) + 0.5) / (holders + 0.5))
    # No impact exceeds K1 + 1, so an item of all words scores at most 1.
    weights = (rarity / max(float(rarity.sum()) * (K1 + 1), 1e-9)).astype(np.float32)
    return [(part, Words(at, weights)) for part, at in places]


def _bits(allowed: _BITMAP, rows: _I32) -> npt.NDArray[np.bool_]:
    """Returns True for each row whose bit is set; rows past the bitmap are not allowed; bool [n]."""
    # The byte after the last stands for every row past the bitmap.
    bits = np.append(allowed, np.uint8(0))
    set_bits: _BITMAP = (bits[np.minimum(rows >> 3, allowed.size)] >> (rows & 7).astype(np.uint8)) & np.uint8(1)
    return set_bits.astype(np.bool_)
