"""Numba kernels of the shared features; each public one has a plain numpy twin, `<name>_plain`.

Without fastmath and with a fixed order of additions, a kernel and its twin agree to the bit, and a candidate's value
never depends on the other candidates of its batch.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from features.jit import kernel

# Partial sums of an inner product, added up in one order, so that a vector unit of any width gives the same bits.
_LANES = 16
# A rate of 0 or 1 has no log-odds.
_RAREST = 1e-6


def _crc_tables() -> npt.NDArray[np.uint32]:
    """Returns what a byte adds to a CRC-32, by the number of bytes behind it in its group; uint32 [8, 256]."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, np.uint32(0xEDB88320) ^ (table >> np.uint32(1)), table >> np.uint32(1))
    tables = [table.astype(np.uint32)]
    for _ in range(7):
        tables.append(tables[0][tables[-1] & np.uint32(0xFF)] ^ (tables[-1] >> np.uint32(8)))
    return np.array(tables)


_CRC_TABLES = _crc_tables()


@kernel()
def crc32_rows(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Returns the CRC-32 of zlib of each row of `rows` uint8 [n, width]; uint32 [n]."""
    # Eight bytes at a time ("slicing by 8"): a byte at a time, each step would wait for the one before.
    out = np.empty(rows.shape[0], np.uint32)
    width = rows.shape[1]
    for i in range(rows.shape[0]):
        crc = np.uint32(0xFFFFFFFF)
        j = 0
        while j + 8 <= width:
            mixed = np.uint32(0)
            for k in range(4):
                byte = rows[i, j + k] ^ ((crc >> np.uint32(8 * k)) & np.uint32(0xFF))
                mixed ^= _CRC_TABLES[7 - k, byte] ^ _CRC_TABLES[3 - k, rows[i, j + k + 4]]
            crc = mixed
            j += 8
        while j < width:
            crc = _CRC_TABLES[0, (crc ^ rows[i, j]) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
            j += 1
        out[i] = crc ^ np.uint32(0xFFFFFFFF)
    return out


def crc32_rows_plain(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """The plain twin of `crc32_rows`."""
    return np.array([zlib.crc32(row.tobytes()) for row in rows], dtype=np.uint32)


@kernel()
def are_among(keys: npt.NDArray[np.uint32], wanted: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Returns a mask of the `keys` uint32 [n] that are one of a few `wanted` uint32 [k]; bool [n]."""
    # np.isin sorts both sides; there are a handful of event types.
    out = np.zeros(keys.size, np.bool_)
    for i in range(keys.size):
        for key in wanted:
            if keys[i] == key:
                out[i] = True
                break
    return out


def are_among_plain(keys: npt.NDArray[np.uint32], wanted: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """The plain twin of `are_among`."""
    return np.isin(keys, wanted)


@kernel()
def best_first(scores: npt.NDArray[np.float32], ties: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """Returns numbers that sort as places do by their score, the highest first, then by `ties`, the lowest first.

    Args:
        scores: float32 [n]; NaN comes last, and -0 is as good as 0.
        ties: Numbers from 0 on; int32 [n].

    Returns:
        uint64 [n]: the score's place in the order of all float32 in the upper half, the tie in the lower half.
    """
    out = np.empty(scores.size, np.uint64)
    bits = (scores + np.float32(0.0)).view(np.uint32)
    for i in range(scores.size):
        # The bits of positive numbers sort as the numbers do, those of negative ones the other way round.
        high = bits[i] if bits[i] & np.uint32(0x80000000) else np.uint32(0x7FFFFFFF) - bits[i]
        if np.isnan(scores[i]):
            high = np.uint32(0xFFFFFFFF)
        out[i] = (np.uint64(high) << np.uint64(32)) | np.uint64(ties[i])
    return out


def best_first_plain(scores: npt.NDArray[np.float32], ties: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """The plain twin of `best_first`: any numbers in the same order."""
    places = np.empty(scores.size, np.uint64)
    places[np.lexsort((ties, -scores))] = np.arange(scores.size, dtype=np.uint64)
    return places


@kernel()
def append_distinct(keys: npt.NDArray[np.uint64], pushed: npt.NDArray[np.uint64], cap: int) -> npt.NDArray[np.uint64]:
    """Appends to `keys` the keys of `pushed` that it lacks, one by one, and keeps the newest `cap`.

    Args:
        keys: Item keys pushed out of the ring so far, oldest first, without repeats; uint64 [m].
        pushed: Item keys pushed out now, oldest first; 0 means no item and is skipped; uint64 [k].
        cap: Number of keys to keep.

    Returns:
        The new list, uint64 [<= cap].
    """
    # A fold pushes out few keys at a time, so a scan of the list is enough.
    kept = np.empty(keys.size + pushed.size, np.uint64)
    kept[: keys.size] = keys
    start, end = max(0, keys.size - cap), keys.size
    for i in range(pushed.size):
        key = pushed[i]
        skip = key == np.uint64(0)
        for j in range(start, end):
            if kept[j] == key:
                skip = True
                break
        if not skip:
            kept[end] = key
            end += 1
            if end - start > cap:
                start += 1
    return kept[start:end].copy()


def append_distinct_plain(
    keys: npt.NDArray[np.uint64], pushed: npt.NDArray[np.uint64], cap: int
) -> npt.NDArray[np.uint64]:
    """The plain twin of `append_distinct`."""
    kept = keys[-cap:].tolist() if cap else []
    for key in pushed.tolist():
        if key and key not in kept:
            kept = [*kept, key][-cap:] if cap else []
    return np.array(kept, dtype=np.uint64)


@kernel()
def place(slots: npt.NDArray[np.uint64], key: np.uint64) -> np.uint64:
    """Returns the slot of a key in an open hash table, or the free slot for it; 0 marks a free slot."""
    # Keys are hashes already, but their low bits may be few (rows + 1): the multiplication spreads them.
    last = np.uint64(slots.size - 1)
    at = ((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & last
    while slots[at] != np.uint64(0) and slots[at] != key:
        at = (at + np.uint64(1)) & last
    return at


@kernel()
def tallied(
    history: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]:
    """Returns the weights [h, w] summed by key, in the order of the history: a hash table and the sums of its slots."""
    # At most half full, so that a search ends after few steps.
    size = 16
    while size < 2 * history.size:
        size *= 2
    slots, sums = np.zeros(size, np.uint64), np.zeros((size, weights.shape[1]), np.float64)
    for j in range(history.size):
        if history[j] != np.uint64(0):
            at = place(slots, history[j])
            slots[at] = history[j]
            for k in range(weights.shape[1]):
                sums[at, k] += weights[j, k]
    return slots, sums


@kernel()
def matched_weights(
    keys: npt.NDArray[np.uint64], history: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Returns the sum of the weights of the events that share each candidate's key; no event shares key 0.

    Args:
        keys: One key per candidate (its category, its creator), 0 for none; uint64 [n].
        history: One key per event; uint64 [h].
        weights: Weights of each event; float64 [h, w].

    Returns:
        float64 [n, w].
    """
    slots, sums = tallied(history, weights)
    out = np.zeros((keys.size, weights.shape[1]), np.float64)
    for i in range(keys.size):
        if keys[i] != np.uint64(0):
            at = place(slots, keys[i])
            for k in range(weights.shape[1]):
                out[i, k] = sums[at, k]
    return out


def matched_weights_plain(
    keys: npt.NDArray[np.uint64], history: npt.NDArray[np.uint64], weights: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The plain twin of `matched_weights`."""
    out = np.zeros((keys.size, weights.shape[1]), np.float64)
    for key, line in zip(history, weights, strict=True):
        out += np.where(((keys == key) & (keys != 0))[:, None], line, 0.0)
    return out


@kernel(error_model="numpy")
def pulled_log_odds(acted: float, shown: float, prior: float, strength: float) -> float:
    """Returns one value of `log_odds`."""
    if shown == 0.0:
        return prior
    expected = 1.0 / (1.0 + math.exp(-prior))
    # More actions than showings (one showing may lead to several) is a rate of nearly 1.
    rate = (min(acted, shown) + strength * expected) / (shown + strength)
    rate = min(max(rate, _RAREST), 1.0 - _RAREST)
    return math.log(rate / (1.0 - rate))


@kernel()
def log_odds(
    acted: npt.NDArray[np.float64], shown: npt.NDArray[np.float64], prior: npt.NDArray[np.float64], strength: float
) -> npt.NDArray[np.float64]:
    """Returns the log-odds of rates that are pulled towards a prior.

    Args:
        acted: Weight of the actions; float64 [n, a].
        shown: Weight of the showings; float64 [n, a].
        prior: Log-odds of the expected rate; float64 [n, a].
        strength: Showings that the prior is worth.

    Returns:
        float64 [n, a]; the prior where nothing was shown.
    """
    out = np.empty(prior.shape, np.float64)
    for i in range(acted.shape[0]):
        for k in range(acted.shape[1]):
            out[i, k] = pulled_log_odds(acted[i, k], shown[i, k], prior[i, k], strength)
    return out


def log_odds_plain(
    acted: npt.NDArray[np.float64], shown: npt.NDArray[np.float64], prior: npt.NDArray[np.float64], strength: float
) -> npt.NDArray[np.float64]:
    """The plain twin of `log_odds`."""
    out = prior.copy()
    for at in map(tuple, np.argwhere(shown).tolist()):
        weight, expected = float(shown[at]), 1.0 / (1.0 + math.exp(-float(prior[at])))
        rate = (min(float(acted[at]), weight) + strength * expected) / (weight + strength)
        rate = min(max(rate, _RAREST), 1.0 - _RAREST)
        out[at] = math.log(rate / (1.0 - rate))
    return out


@kernel()
def dot_rows(
    vectors: npt.NDArray[np.float32], rows: npt.NDArray[np.int32], query: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Returns the inner products of `query` with the vectors of `rows`, without a copy of these vectors.

    Args:
        vectors: float32 [N, D].
        rows: Rows of `vectors`, each in [0, N); int32 [n].
        query: float32 [D].

    Returns:
        float32 [n].
    """
    out = np.empty(rows.size, np.float32)
    lanes = np.empty(_LANES, np.float32)
    whole = query.size - query.size % _LANES
    for i in range(rows.size):
        vector = vectors[rows[i]]
        lanes[:] = np.float32(0.0)
        for start in range(0, whole, _LANES):
            for lane in range(_LANES):
                lanes[lane] += vector[start + lane] * query[start + lane]
        for j in range(whole, query.size):
            lanes[j - whole] += vector[j] * query[j]
        total = np.float32(0.0)
        for lane in range(_LANES):
            total += lanes[lane]
        out[i] = total
    return out


def dot_rows_plain(
    vectors: npt.NDArray[np.float32], rows: npt.NDArray[np.int32], query: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The plain twin of `dot_rows`."""
    padded = -(-query.size // _LANES) * _LANES
    products = np.zeros((rows.size, padded), np.float32)
    products[:, : query.size] = vectors[rows] * query
    lanes = np.zeros((rows.size, _LANES), np.float32)
    for start in range(0, padded, _LANES):
        lanes += products[:, start : start + _LANES]
    out = np.zeros(rows.size, np.float32)
    for lane in range(_LANES):
        out += lanes[:, lane]
    return out


@kernel()
def pack_newest(
    rows: npt.NDArray[np.int32],
    types: npt.NDArray[Any],
    starts: npt.NDArray[np.int64],
    ends: npt.NDArray[np.int64],
    max_length: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the newest `max_length` known events of each part `starts[i]:ends[i]`, padded on the right with zeros.

    Args:
        rows: Row of each event's item, -1 if it is unknown; int32 [E].
        types: Type of each event; any integers [E].
        starts: First event of each part; int64 [B].
        ends: One past its last; int64 [B].
        max_length: Events of a part that are kept.

    Returns:
        rows and types int64 [B, L], L the greatest length but at least 1, and lengths int64 [B].
    """
    firsts, lengths = np.empty(starts.size, np.int64), np.zeros(starts.size, np.int64)
    longest = 1
    for part in range(starts.size):
        at = ends[part]
        while at > starts[part] and lengths[part] < max_length:
            at -= 1
            if rows[at] >= 0:
                lengths[part] += 1
        firsts[part] = at
        longest = max(longest, lengths[part])
    packed_rows = np.zeros((starts.size, longest), np.int64)
    packed_types = np.zeros((starts.size, longest), np.int64)
    for part in range(starts.size):
        place = 0
        for at in range(firsts[part], ends[part]):
            if rows[at] >= 0:
                packed_rows[part, place] = rows[at]
                packed_types[part, place] = types[at]
                place += 1
    return packed_rows, packed_types, lengths
