"""The items that hold each word, and the kernels that read them: postings never change once they are built.

An item that is changed or removed is *retired* at the moment of the change, a number that only grows: a search that
began at an earlier moment still counts it, one that begins later does not. So a change writes one number for each
former place of the item, and no search ever sees half of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.jit import kernel

K1 = 1.2
B = 0.75

_U32 = npt.NDArray[np.uint32]
_U64 = npt.NDArray[np.uint64]
_I32 = npt.NDArray[np.int32]
_I64 = npt.NDArray[np.int64]
_F32 = npt.NDArray[np.float32]

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Postings(NamedTuple):
    """The items that hold each word; a tuple, because a kernel can take that whole.

    Attributes:
        tokens: Distinct words, ascending; uint32 [T].
        offsets: Place at which the postings of each word begin; int64 [T + 1].
        rows: Members that hold the word, ascending within it: places in `items`; int32 [P].
        impacts: Weight of the word for the member, without the word's rarity; float32 [P].
        items: Row of each member, ascending; empty if each member is the row itself; int32 [m].
        retired: Moment from which each member no longer counts, 0 if it does; int32 [m].
    """

    tokens: _U32
    offsets: _I64
    rows: _I32
    impacts: _F32
    items: _I32
    retired: _I32

    @property
    def cost(self) -> int:
        """Number of entries: what it costs to merge them with others."""
        return int(self.rows.size + self.retired.size)

    def find(self, tokens: _U32) -> _I64:
        """Returns the position of each word, -1 if no item holds it; int64 [n]."""
        if not self.tokens.size:
            return np.full(tokens.size, -1, np.int64)
        at = np.minimum(np.searchsorted(self.tokens, tokens), self.tokens.size - 1)
        return np.where(self.tokens[at] == tokens, at, -1)

    def holders(self, positions: _I64) -> _I64:
        """Returns the number of members, retired or not, that hold the word at each position; int64 [n]."""
        return np.where(positions >= 0, self.offsets[positions + 1] - self.offsets[positions], 0)

    def gone(self, moment: int) -> npt.NDArray[np.bool_]:
        """Returns True for each member that no longer counts at a moment; bool [m]."""
        return (self.retired > 0) & (self.retired <= moment)

    def retire(self, rows: _I32, moment: int) -> int:
        """Retires the members of `rows` int32 [n], which are distinct; returns the number of those that counted."""
        if self.items.size:
            at = np.minimum(np.searchsorted(self.items, rows), self.items.size - 1)
            at = at[self.items[at] == rows]
        else:
            at = rows[rows < self.retired.size]
        at = at[self.retired[at] == 0]
        self.retired[at] = moment
        return int(at.size)


class Words(NamedTuple):
    """The words of a query against one set of postings.

    Attributes:
        positions: Position of each word among the postings' words, -1 if it is not there; int64 [n].
        weights: Its rarity as a share of the highest possible score, above 0; float32 [n].
    """

    positions: _I64
    weights: _F32


def build_postings(members: _I32, tokens: _U32, lengths: _I64, average: float) -> Postings:
    """Builds postings from one entry per occurrence of a word.

    Args:
        members: The member of each occurrence; int32 [n].
        tokens: The word; uint32 [n].
        lengths: Number of words of each member; int64 [m].
        average: Average number of words of an item of the bundle.
    """
    # Word above member in one integer: one sort orders the words, the members of each, and counts repeats.
    pairs = (tokens.astype(np.uint64) << _HALF) | members.astype(np.uint64)
    pairs, times = np.unique(pairs, return_counts=True)
    holders = (pairs & _LOW).astype(np.int32)
    length = lengths[holders] / average
    impacts = times * (K1 + 1) / (times + K1 * (1 - B + B * length))
    words, offsets = _words_of(pairs)
    none, retired = np.zeros(0, np.int32), np.zeros(lengths.size, np.int32)
    return Postings(words, offsets, holders, impacts.astype(np.float32), none, retired)


def merge_postings(parts: Sequence[Postings], counts: Sequence[npt.NDArray[np.bool_]]) -> Postings:
    """Returns the members of several postings in one, without those that no longer count.

    Args:
        parts: The postings, each with `items`; no row counts in two of them.
        counts: True for the members of each that are kept; bool [m] each.
    """
    items = np.concatenate([part.items[keep] for part, keep in zip(parts, counts, strict=True)])
    items.sort()
    pairs, impacts = [], []
    for part, keep in zip(parts, counts, strict=True):
        kept = keep[part.rows]
        members = np.searchsorted(items, part.items[part.rows[kept]])
        tokens = np.repeat(part.tokens, np.diff(part.offsets))[kept]
        pairs.append((tokens.astype(np.uint64) << _HALF) | members.astype(np.uint64))
        impacts.append(part.impacts[kept])
    merged = np.concatenate(pairs)
    order = np.argsort(merged)
    merged = merged[order]
    rows: _I32 = (merged & _LOW).astype(np.int32)
    words, offsets = _words_of(merged)
    return Postings(words, offsets, rows, np.concatenate(impacts)[order], items, np.zeros(items.size, np.int32))


def _words_of(pairs: _U64) -> tuple[_U32, _I64]:
    """Returns the distinct words of sorted pairs, and the place at which each begins."""
    words, starts = np.unique((pairs >> _HALF).astype(np.uint32), return_index=True)
    return words, np.append(starts, pairs.size).astype(np.int64)


@kernel(nogil=True)
def accumulate(postings: Postings, words: Words, moment: int, sums: _F32, touched: _I32, count: int) -> int:
    """Adds the scores of a query's words to `sums`, and notes each item in `touched` when it is first met.

    Args:
        postings: The postings.
        words: The words of the query against them.
        moment: The state of the index that counts.
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
            member = postings.rows[place]
            retired = postings.retired[member]
            if retired and retired <= moment:
                continue
            row = postings.items[member] if postings.items.size else member
            # Every addend is above 0, so a sum of 0 is that of an item not met before.
            if sums[row] == np.float32(0.0):
                touched[count] = row
                count += 1
            sums[row] += words.weights[word] * postings.impacts[place]
    return count


def accumulate_plain(postings: Postings, words: Words, moment: int, sums: _F32, touched: _I32, count: int) -> int:
    """Does the same as `accumulate` in plain numpy, for tests to compare."""
    for at, weight in zip(words.positions.tolist(), words.weights, strict=True):
        if at < 0:
            continue
        span = slice(postings.offsets[at], postings.offsets[at + 1])
        members, impacts = postings.rows[span], postings.impacts[span]
        counts = ~postings.gone(moment)[members]
        members, impacts = members[counts], impacts[counts]
        rows = postings.items[members] if postings.items.size else members
        new = rows[sums[rows] == 0]
        touched[count : count + new.size] = new
        count += new.size
        sums[rows] += weight * impacts
    return count


@kernel(nogil=True)
def look_up(postings: Postings, words: Words, moment: int, rows: _I32, out: _F32) -> None:
    """Adds the scores of a query's words for `rows` int32 [n] to `out` float32 [n]."""
    for i in range(rows.size):
        member = rows[i]
        if postings.items.size:
            member = np.searchsorted(postings.items, rows[i])
            if member == postings.items.size or postings.items[member] != rows[i]:
                continue
        elif member >= postings.retired.size:
            continue
        retired = postings.retired[member]
        if retired and retired <= moment:
            continue
        for word in range(words.positions.size):
            at = words.positions[word]
            if at < 0:
                continue
            # The holders of a word ascend, so a few rows cost a few steps, however common the word.
            start = postings.offsets[at]
            holders = postings.rows[start : postings.offsets[at + 1]]
            place = np.searchsorted(holders, member)
            if place < holders.size and holders[place] == member:
                out[i] += words.weights[word] * postings.impacts[start + place]


def look_up_plain(postings: Postings, words: Words, moment: int, rows: _I32, out: _F32) -> None:
    """Does the same as `look_up` in plain numpy, for tests to compare."""
    size = 1 + int(max(postings.items.max(initial=postings.retired.size - 1), rows.max(initial=-1)))
    sums = np.zeros(size, np.float32)
    accumulate_plain(postings, words, moment, sums, np.empty(size, np.int32), 0)
    out += sums[rows]


@kernel(nogil=True)
def count_holders(postings: Postings, positions: _I64, moment: int, counts: _I64) -> None:
    """Adds the number of items that hold the word at each position, if it is none of -1, to `counts` int64 [n]."""
    for word in range(positions.size):
        if positions[word] < 0:
            continue
        for place in range(postings.offsets[positions[word]], postings.offsets[positions[word] + 1]):
            retired = postings.retired[postings.rows[place]]
            if not retired or retired > moment:
                counts[word] += 1


def count_holders_plain(postings: Postings, positions: _I64, moment: int, counts: _I64) -> None:
    """Does the same as `count_holders` in plain numpy, for tests to compare."""
    gone = postings.gone(moment)
    for word, at in enumerate(positions.tolist()):
        if at >= 0:
            counts[word] += int((~gone[postings.rows[postings.offsets[at] : postings.offsets[at + 1]]]).sum())
