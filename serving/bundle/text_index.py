"""Items that share words with a query, by BM25 (Robertson and Zaragoza, "The Probabilistic Relevance Framework", 2009).

A word is the 32-bit key that `features.transforms.text_tokens` makes of it. Postings never change once they are built:
the items of the bundle are one set of them, everything put since then is another, which each change builds again and
swaps as one reference, so a search never sees half a change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.jit import kernel

K1 = 1.2
B = 0.75
MAX_QUERY_TOKENS = 32
"""Distinct words of a query that count; a longer text costs no more than this."""

_U32 = npt.NDArray[np.uint32]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]
_BITMAP = npt.NDArray[np.uint8]


class Postings(NamedTuple):
    """The items that hold each word; a tuple, because a kernel can take that whole.

    Attributes:
        tokens: Distinct words, ascending; uint32 [T].
        offsets: Place at which the postings of each word begin; int64 [T + 1].
        rows: Items that hold the word, ascending within it; int32 [P].
        impacts: Weight of the word for the item, without the word's rarity; float32 [P].
        stale: Whether an item no longer counts; items past its end do; bool [m].
    """

    tokens: _U32
    offsets: _I64
    rows: _I32
    impacts: _F32
    stale: npt.NDArray[np.bool_]

    def find(self, tokens: _U32) -> _I64:
        """Returns the position of each word, -1 if no item holds it; int64 [n]."""
        if not self.tokens.size:
            return np.full(tokens.size, -1, np.int64)
        at = np.minimum(np.searchsorted(self.tokens, tokens), self.tokens.size - 1)
        return np.where(self.tokens[at] == tokens, at, -1)

    def holders(self, positions: _I64) -> _I64:
        """Returns the number of items that hold the word at each position, 0 for -1; int64 [n]."""
        return np.where(positions >= 0, self.offsets[positions + 1] - self.offsets[positions], 0)


class Words(NamedTuple):
    """The words of a query against one set of postings.

    Attributes:
        positions: Position of each word among the postings' words, -1 if it is not there; int64 [n].
        weights: Its rarity as a share of the highest possible score, above 0; float32 [n].
    """

    positions: _I64
    weights: _F32


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """One state of the index, which a search reads throughout.

    Attributes:
        base: Postings of the bundle's items.
        live: Postings of the items put since then.
        size: One more than the last row.
        items: Number of items that count.
    """

    base: Postings
    live: Postings
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
        lengths = np.diff(offsets)
        if not offsets.size or offsets[0] != 0 or offsets[-1] != tokens.size or (lengths < 0).any():
            raise ValueError("token_offsets do not fit tokens; export the bundle again")
        # Of the bundle alone: with an average that moves, each item put would change the weights of all others.
        self._average = float(lengths.mean()) if tokens.size else 1.0
        self._live: dict[int, _U32] = {}
        count = lengths.size
        base = _postings(np.repeat(np.arange(count, dtype=np.int32), lengths), tokens, self._average)
        live = _postings(np.empty(0, np.int32), np.empty(0, np.uint32), self._average)
        self._now = _Snapshot(base._replace(stale=np.zeros(count, np.bool_)), live, count, count)

    def put(self, rows: Sequence[int], tokens: Sequence[_U32]) -> None:
        """Puts items, new or changed; their former words no longer count.

        The cost grows with all the items put so far, so put many at once.

        Args:
            rows: Rows of the items.
            tokens: The words of each.
        """
        self._live.update(zip(map(int, rows), tokens, strict=True))
        self._swap(rows)

    def remove(self, rows: Sequence[int]) -> None:
        """Removes the words of items."""
        for row in rows:
            self._live.pop(int(row), None)
        self._swap(rows)

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
        base, live = _weigh(now, tokens)
        # `touched` spares a pass over the sums of all items: a query meets few of them.
        sums, touched = np.zeros(now.size, np.float32), np.empty(now.size, np.int32)
        count = accumulate(now.base, base, sums, touched, 0)
        count = accumulate(now.live, live, sums, touched, count)
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
        base, live = _weigh(now, tokens)
        rows, out = np.ascontiguousarray(rows, np.int32), np.zeros(len(rows), np.float32)
        look_up(now.base, base, rows, out)
        look_up(now.live, live, rows, out)
        return out

    def _swap(self, changed: Sequence[int]) -> None:
        now = self._now
        # A copy: a search that runs meanwhile goes on reading the state that it began with.
        stale = now.base.stale.copy()
        stale[[row for row in changed if row < stale.size]] = True
        sizes = [words.size for words in self._live.values()]
        rows = np.repeat(np.fromiter(self._live, np.int32, len(self._live)), sizes)
        words = np.concatenate([np.empty(0, np.uint32), *self._live.values()])
        self._now = replace(
            now,
            base=now.base._replace(stale=stale),
            live=_postings(rows, words, self._average),
            size=max(stale.size, 1 + max(self._live, default=-1)),
            items=int((~stale).sum()) + len(self._live),
        )


@kernel(nogil=True)
def accumulate(postings: Postings, words: Words, sums: _F32, touched: _I32, count: int) -> int:
    """Adds the scores of a query's words to `sums`, and notes each item in `touched` when it is first met.

    Args:
        postings: The postings.
        words: The words of the query against them.
        sums: Score by item; float32 [size].
        touched: Items met; int32 [size].
        count: Number of items in `touched`.

    Returns:
        The number of them afterwards.
    """
    for word in range(words.positions.size):
        at = words.positions[word]
        if at < 0:
            continue
        for place in range(postings.offsets[at], postings.offsets[at + 1]):
            row = postings.rows[place]
            if row < postings.stale.size and postings.stale[row]:
                continue
            # Every addend is above 0, so a sum of 0 is that of an item not met before.
            if sums[row] == np.float32(0.0):
                touched[count] = row
                count += 1
            sums[row] += words.weights[word] * postings.impacts[place]
    return count


def accumulate_plain(postings: Postings, words: Words, sums: _F32, touched: _I32, count: int) -> int:
    """Does the same as `accumulate` in plain numpy, for tests to compare."""
    for at, weight in zip(words.positions.tolist(), words.weights, strict=True):
        if at < 0:
            continue
        span = slice(postings.offsets[at], postings.offsets[at + 1])
        rows, impacts = postings.rows[span], postings.impacts[span]
        counts = ~np.isin(rows, np.flatnonzero(postings.stale))
        rows, impacts = rows[counts], impacts[counts]
        new = rows[sums[rows] == 0]
        touched[count : count + new.size] = new
        count += new.size
        sums[rows] += weight * impacts
    return count


@kernel(nogil=True)
def look_up(postings: Postings, words: Words, rows: _I32, out: _F32) -> None:
    """Adds the scores of a query's words for `rows` int32 [n] to `out` float32 [n]."""
    for word in range(words.positions.size):
        at = words.positions[word]
        if at < 0:
            continue
        start = postings.offsets[at]
        holders = postings.rows[start : postings.offsets[at + 1]]
        for i in range(rows.size):
            if rows[i] < postings.stale.size and postings.stale[rows[i]]:
                continue
            # The holders of a word ascend, so a few rows cost a few steps, however common the word.
            place = np.searchsorted(holders, rows[i])
            if place < holders.size and holders[place] == rows[i]:
                out[i] += words.weights[word] * postings.impacts[start + place]


def look_up_plain(postings: Postings, words: Words, rows: _I32, out: _F32) -> None:
    """Does the same as `look_up` in plain numpy, for tests to compare."""
    size = 1 + int(max(postings.rows.max(initial=-1), rows.max(initial=-1)))
    sums = np.zeros(size, np.float32)
    accumulate_plain(postings, words, sums, np.empty(size, np.int32), 0)
    out += sums[rows]


def _weigh(now: _Snapshot, tokens: _U32) -> tuple[Words, Words]:
    """Returns the first `MAX_QUERY_TOKENS` distinct words of a query, against both sets of postings."""
    distinct = np.array(list(dict.fromkeys(tokens.tolist()))[:MAX_QUERY_TOKENS], np.uint32)
    base_at, live_at = now.base.find(distinct), now.live.find(distinct)
    # Counted in both sets, so that a word is as rare for a live item as for one of the bundle.
    holders = now.base.holders(base_at) + now.live.holders(live_at)
    # A changed item is counted in both sets until the next bundle; `minimum` keeps the rarity above 0 all the same.
    rarity = np.log1p((now.items - np.minimum(holders, now.items) + 0.5) / (holders + 0.5))
    # No impact exceeds K1 + 1, so an item of all words scores at most 1.
    weights = (rarity / max(float(rarity.sum()) * (K1 + 1), 1e-9)).astype(np.float32)
    return Words(base_at, weights), Words(live_at, weights)


def _bits(allowed: _BITMAP, rows: _I32) -> npt.NDArray[np.bool_]:
    """Returns True for each row whose bit is set; rows past the bitmap are not allowed; bool [n]."""
    # The byte after the last stands for every row past the bitmap.
    bits = np.append(allowed, np.uint8(0))
    set_bits: _BITMAP = (bits[np.minimum(rows >> 3, allowed.size)] >> (rows & 7).astype(np.uint8)) & np.uint8(1)
    return set_bits.astype(np.bool_)


def _postings(rows: _I32, tokens: _U32, average: float) -> Postings:
    """Builds postings from one entry per occurrence of a word; int32 [n] and uint32 [n]."""
    # Word above row in one integer: one sort orders the words, the items of each, and counts repeats.
    pairs = (tokens.astype(np.uint64) << np.uint64(32)) | rows.astype(np.uint64)
    pairs, times = np.unique(pairs, return_counts=True)
    holders = (pairs & np.uint64(0xFFFFFFFF)).astype(np.int32)
    words, starts = np.unique((pairs >> np.uint64(32)).astype(np.uint32), return_index=True)
    lengths = np.bincount(rows) if rows.size else np.zeros(0, np.int64)
    length = lengths[holders] / average
    impacts = times * (K1 + 1) / (times + K1 * (1 - B + B * length))
    offsets = np.append(starts, pairs.size).astype(np.int64)
    return Postings(words, offsets, holders, impacts.astype(np.float32), np.zeros(0, np.bool_))
