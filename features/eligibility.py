"""The rows of a catalogue that may be shown now, as a bitmap that changes and the clock keep right a bit at a time."""

from __future__ import annotations

import heapq
import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.catalog_columns import FOREVER, CatalogColumns

_I64 = npt.NDArray[np.int64]
_I32 = npt.NDArray[np.int32]
_U8 = npt.NDArray[np.uint8]

_LENIENCE_MS = 1000
"""Requests of the same moment come a little out of order: one that is not older than this reads the newer bitmap."""

_MOST_MOMENTS = 10_000
"""Rows whose bit is set one by one; of more, all are computed again."""


class Moments(NamedTuple):
    """The moments at which rows of a bundle begin or cease to be available, in order.

    Attributes:
        times: Moments, ms; int64 [m].
        rows: The row of each; int32 [m].
    """

    times: _I64
    rows: _I32


def moments_of(available_from: _I64, available_until: _I64) -> Moments:
    """Returns the moments of the rows whose availability depends on the clock."""
    begin, end = np.flatnonzero(available_from > 0), np.flatnonzero(available_until < FOREVER)
    times = np.concatenate([available_from[begin], available_until[end]])
    order = np.argsort(times, kind="stable")
    return Moments(times[order], np.concatenate([begin, end]).astype(np.int32)[order])


class EligibleRows:
    """The bitmap of the rows that may be shown; any thread may ask, and changes are written under the catalogue's lock.

    It is a hint for retrieval: the columns themselves have the last word on each row that is shown.
    """

    def __init__(self, moments: Moments) -> None:
        """Takes the moments of the bundle's rows; the bitmap is made when it is first asked for."""
        self._moments = moments
        self._next = 0
        self._live: list[tuple[int, int]] = []
        self._bits: _U8 = np.zeros(0, np.uint8)
        self._size = self._count = 0
        self._since = self._until = -1
        self._lock = threading.Lock()

    def at(self, columns: CatalogColumns, size: int, now_ms: int) -> tuple[_U8, int]:
        """Returns the rows that may be shown at a moment, lowest bit first, and their number.

        Args:
            columns: The columns of the catalogue.
            size: Number of its rows.
            now_ms: The moment, ms.

        Returns:
            uint8 [ceil(size / 8)], which later changes alter in place: a reader that needs one state copies it; and the
            number of rows in it.
        """
        # Without the lock first: nearly every request falls between two moments at which nothing changes.
        if not self._since - _LENIENCE_MS <= now_ms < self._until or self._size < size:
            with self._lock:
                if now_ms < self._since - _LENIENCE_MS:
                    return _bits_of(columns, size, now_ms)
                self._move_to(columns, size, now_ms)
        bits = self._bits[: -(-size // 8)].view()
        bits.flags.writeable = False
        return bits, self._count

    def changed(self, columns: CatalogColumns, row: int, size: int) -> None:
        """Takes over a change of a row's availability."""
        with self._lock:
            if self._since < 0:  # the bitmap is not made yet, and will hold the change
                for time in _times_of(columns, row):
                    heapq.heappush(self._live, (time, row))
                return
            self._reserve(columns.capacity)
            self._size = max(self._size, size)
            for time in _times_of(columns, row):
                if time > self._since:
                    heapq.heappush(self._live, (time, row))
                    self._until = min(self._until, time)
            self._set(columns, row, self._since)

    def _move_to(self, columns: CatalogColumns, size: int, now_ms: int) -> None:
        """Brings the bitmap to a moment, from the one it is of."""
        moments = self._moments
        pending = int(np.searchsorted(moments.times, now_ms, side="right")) - self._next
        # So many that a pass over the columns costs less, as at the first call after the bundle was opened.
        if self._since < 0 or pending > _MOST_MOMENTS:
            bits, self._count = _bits_of(columns, size, now_ms)
            self._reserve(columns.capacity)
            self._bits[: bits.size] = bits
            self._next += pending
        self._size = max(self._size, size)
        # A row whose moment came may have been changed since, so its columns tell and not the moment.
        while self._next < moments.times.size and moments.times.item(self._next) <= now_ms:
            self._set(columns, moments.rows.item(self._next), now_ms)
            self._next += 1
        while self._live and self._live[0][0] <= now_ms:
            self._set(columns, heapq.heappop(self._live)[1], now_ms)
        coming = [moments.times.item(self._next)] if self._next < moments.times.size else []
        coming += [self._live[0][0]] if self._live else []
        self._since, self._until = max(self._since, now_ms), min(coming, default=FOREVER)

    def _set(self, columns: CatalogColumns, row: int, now_ms: int) -> None:
        begun = columns.available.item(row) and columns.available_from.item(row) <= now_ms
        place, bit = row >> 3, 1 << (row & 7)
        was = self._bits.item(place)
        now = was | bit if begun and now_ms < columns.available_until.item(row) else was & ~bit
        if now != was:
            self._bits[place] = now
            self._count += 1 if now > was else -1

    def _reserve(self, capacity: int) -> None:
        if self._bits.size * 8 < capacity:
            larger = np.zeros(-(-capacity // 8), np.uint8)
            larger[: self._bits.size] = self._bits
            self._bits = larger


def _times_of(columns: CatalogColumns, row: int) -> list[int]:
    times = (columns.available_from.item(row), columns.available_until.item(row))
    return [time for time in times if 0 < time < FOREVER]


def _bits_of(columns: CatalogColumns, size: int, now_ms: int) -> tuple[_U8, int]:
    """Returns the bitmap of a moment from the columns of all rows, and the number of rows in it."""
    begun = columns.available[:size] & (columns.available_from[:size] <= now_ms)
    eligible = begun & (now_ms < columns.available_until[:size])
    bits = np.packbits(eligible, bitorder="little")
    bits.flags.writeable = False
    return bits, int(np.count_nonzero(eligible))
