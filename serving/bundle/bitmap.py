"""Sets of rows as bitmaps: one bit a row, lowest bit first, uint8 [ceil(rows / 8)]; rows past the end are not in it.

A million rows are 125 kB, so a set is copied, cut down and searched in microseconds.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features.jit import kernel

Bitmap = npt.NDArray[np.uint8]

_I32 = npt.NDArray[np.int32]
_U64 = npt.NDArray[np.uint64]


@kernel(nogil=True)
def allowed_rows(allowed: Bitmap, start: int, stop: int) -> _I32:
    """Returns the rows in [start, stop) whose bit is set; rows past the bitmap are not allowed; int32 [n]."""
    stop = min(stop, 8 * allowed.size)
    rows, filled = np.empty(64, np.int32), 0
    row = start
    while row < stop:
        bits = allowed[row >> 3] >> np.uint8(row & 7)
        if bits == 0:  # a filter often leaves a few rows of a million
            row = (row | 7) + 1
            continue
        if bits & 1:
            if filled == rows.size:
                grown = np.empty(2 * filled, np.int32)
                grown[:filled] = rows
                rows = grown
            rows[filled] = row
            filled += 1
        row += 1
    return rows[:filled].copy()


def allowed_rows_plain(allowed: Bitmap, start: int, stop: int) -> _I32:
    """Does the same as `allowed_rows` in plain numpy, for tests to compare."""
    first = start // 8
    part = allowed[first : -(-stop // 8)]
    # Only bytes that hold a bit are unpacked: a filter often leaves a few rows of a million.
    nonzero = np.flatnonzero(part)
    place, bit = np.nonzero(np.unpackbits(part[nonzero, None], axis=1, bitorder="little"))
    rows = ((nonzero[place] + first) * 8 + bit).astype(np.int32)
    return rows[(rows >= start) & (rows < stop)]


def allowed_count(allowed: Bitmap, stop: int) -> int:
    """Returns the number of rows in [0, stop) whose bit is set."""
    whole, bits = divmod(stop, 8)
    count = int(np.bitwise_count(allowed[:whole]).sum(dtype=np.int64))
    if bits and whole < allowed.size:
        count += int(allowed[whole] & ((1 << bits) - 1)).bit_count()
    return count


@kernel(nogil=True)
def clear_rows(bitmap: Bitmap, rows: _I32) -> int:
    """Takes `rows` int32 [n] out of a bitmap, in place.

    Returns:
        The number of them that were in it.
    """
    count = 0
    for i in range(rows.size):
        place, bit = rows[i] >> 3, np.uint8(1 << (rows[i] & 7))
        if place < bitmap.size and bitmap[place] & bit:
            bitmap[place] ^= bit
            count += 1
    return count


def clear_rows_plain(bitmap: Bitmap, rows: _I32) -> int:
    """Does the same as `clear_rows` in plain numpy, for tests to compare."""
    bits = np.unpackbits(bitmap, bitorder="little")
    before = int(bits.sum())
    bits[rows[rows < bits.size]] = 0
    bitmap[:] = np.packbits(bits, bitorder="little")
    return before - int(bits.sum())


@kernel(nogil=True)
def clear_keys(bitmap: Bitmap, column: _U64, keys: _U64) -> int:
    """Takes the rows out of a bitmap whose key is one of `keys`, in place; one pass, however many keys there are.

    Args:
        bitmap: The rows.
        column: The key of each row, 0 for none; uint64 [at least as many as there are rows].
        keys: The keys, none of them 0; uint64 [k].

    Returns:
        The number of rows taken out.
    """
    if keys.size == 0:
        return 0
    # An open hash table: keys are hashes, so their lowest bits spread them well; 0 is a free slot.
    size, count = 64, 0
    while size < 4 * keys.size:
        size *= 2
    slots, last = np.zeros(size, np.uint64), np.uint64(size - 1)
    for i in range(keys.size):
        at = keys[i] & last
        while slots[at] != np.uint64(0) and slots[at] != keys[i]:
            at = (at + np.uint64(1)) & last
        slots[at] = keys[i]
    # Byte by byte, so that eight rows that are all out already cost one comparison.
    for place in range(bitmap.size):
        bits = bitmap[place]
        if bits == 0:
            continue
        for bit in range(min(8, column.size - 8 * place)):
            if not (bits >> bit) & 1:
                continue
            key = column[8 * place + bit]
            at = key & last
            while slots[at] != np.uint64(0) and slots[at] != key:
                at = (at + np.uint64(1)) & last
            if slots[at] == key and key != np.uint64(0):
                bits ^= np.uint8(1 << bit)
                count += 1
        bitmap[place] = bits
    return count


def clear_keys_plain(bitmap: Bitmap, column: _U64, keys: _U64) -> int:
    """Does the same as `clear_keys` in plain numpy, for tests to compare."""
    return clear_rows_plain(bitmap, np.flatnonzero(np.isin(column, keys)).astype(np.int32))


@kernel(nogil=True)
def first_allowed(rows: _I32, bitmap: Bitmap, count: int) -> npt.NDArray[np.intp]:
    """Returns the positions of the first `count` of `rows` int32 [n] whose bit is set; intp [at most `count`]."""
    places = np.empty(min(count, rows.size), np.intp)
    filled = 0
    for i in range(rows.size):
        if filled == count:
            break
        place = rows[i] >> 3
        if place < bitmap.size and (bitmap[place] >> (rows[i] & 7)) & 1:
            places[filled] = i
            filled += 1
    return places[:filled]


def first_allowed_plain(rows: _I32, bitmap: Bitmap, count: int) -> npt.NDArray[np.intp]:
    """Does the same as `first_allowed` in plain numpy, for tests to compare."""
    # The bit after the last stands for every row past the bitmap.
    bits = np.append(np.unpackbits(bitmap, bitorder="little"), np.uint8(0))
    return np.flatnonzero(bits[np.minimum(rows, bits.size - 1)])[:count]
