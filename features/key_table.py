"""A hash table in two arrays: key -> row, in one or two reads of memory whatever the number of keys.

The keys themselves stay where they are, in row order; the table holds rows only, so it costs 8 to 16 bytes a key, and
processes share it as they share any other array.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.jit import kernel

_U64 = npt.NDArray[np.uint64]
_I32 = npt.NDArray[np.int32]

_FEWEST = 8


def key_slots(keys: _U64) -> _I32:
    """Returns the hash table of keys.

    Args:
        keys: Distinct keys, none of them 0; uint64 [n].

    Returns:
        The row of a key in the slot of the key or, where that was taken, in the next free one, -1 in a free slot;
        int32 [a power of 2, at least twice n].
    """
    size = _FEWEST
    while size < 2 * keys.size:
        size *= 2
    slots = np.full(size, -1, np.int32)
    _insert(keys, slots)
    return slots


@kernel(nogil=True)
def _insert(keys: _U64, slots: _I32) -> None:
    # Keys are hashes already, so that their lowest bits spread them well.
    last = np.uint64(slots.size - 1)
    for row in range(keys.size):
        at = keys[row] & last
        while slots[at] >= 0:
            at = (at + np.uint64(1)) & last
        slots[at] = row


@kernel(nogil=True)
def find_rows(keys: _U64, slots: _I32, wanted: _U64, rows: _I32) -> None:
    """Writes the row of each of `wanted` uint64 [m] to `rows` int32 [m], -1 if it is none of `keys`.

    Args:
        keys: The keys in row order; uint64 [n].
        slots: What `key_slots` returned for them.
        wanted: The keys to look up.
        rows: Takes the answer.
    """
    last = np.uint64(slots.size - 1)
    for i in range(wanted.size):
        at = wanted[i] & last
        while slots[at] >= 0 and keys[slots[at]] != wanted[i]:
            at = (at + np.uint64(1)) & last
        rows[i] = slots[at]


def find_rows_plain(keys: _U64, slots: _I32, wanted: _U64, rows: _I32) -> None:
    """Does the same as `find_rows` by a search among the sorted keys, for tests to compare."""
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys[order], wanted), max(keys.size - 1, 0))
    rows[:] = np.where(keys[order[at]] == wanted, order[at], -1) if keys.size else -1


def find_row(keys: _U64, slots: _I32, wanted: int) -> int:
    """Returns the row of a single key, -1 if it is none of `keys`: a call of a kernel costs more than this loop."""
    last = slots.size - 1
    at = wanted & last
    # An item at a time by `item`: an index makes a numpy number, which takes twice as long.
    while (row := slots.item(at)) >= 0 and keys.item(row) != wanted:
        at = (at + 1) & last
    return int(row)
