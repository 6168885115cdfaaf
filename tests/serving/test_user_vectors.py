"""The vectors of users that are kept: the same as computed, exact by their inputs, bounded."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

from serving.bundle.model import ModelError
from serving.bundle.user_vectors import WAYS, UserVectors, digest, keep, look_up

DIM = 8


class Encoder:
    """A stand-in for `Model`, whose answer tells its inputs apart; it counts its calls."""

    def __init__(self) -> None:
        self.dim, self.calls, self.fails = DIM, 0, False

    def encode_user(self, vectors: Any, types: Any) -> Any:
        self.calls += 1
        if self.fails:
            raise ModelError("no answer")
        weights = np.arange(1, len(types) + 1, dtype=np.float32)[:, None]
        return (vectors * weights + types[:, None]).sum(axis=0).astype(np.float32)


def events(seed: int, length: int = 5) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(length, DIM)).astype(np.float32), rng.integers(0, 4, length)


def test_a_user_without_new_events_is_encoded_once() -> None:
    encoder = Encoder()
    kept = UserVectors(encoder, 64)  # type: ignore[arg-type]
    first = kept.encode(*events(1))
    again = kept.encode(*events(1))
    assert encoder.calls == 1
    np.testing.assert_array_equal(first, again)
    again[:] = 0  # the caller's own
    np.testing.assert_array_equal(kept.encode(*events(1)), first)


@pytest.mark.parametrize("change", ["event", "order", "type", "vector", "sign of a zero"])
def test_whatever_the_encoder_reads_is_part_of_the_key(change: str) -> None:
    encoder = Encoder()
    kept = UserVectors(encoder, 64)  # type: ignore[arg-type]
    vectors, types = events(1)
    vectors[0, 0], types[:] = 0.0, [0, 1, 2, 3, 0]
    kept.encode(vectors.copy(), types.copy())
    if change == "event":
        vectors, types = vectors[1:], types[1:]
    elif change == "order":
        vectors, types = vectors[::-1], types[::-1]
    elif change == "type":
        types[2] += 1
    elif change == "vector":
        vectors[3, 3] = np.nextafter(vectors[3, 3], np.float32(9))
    else:
        vectors[0, 0] = -0.0
    np.testing.assert_array_equal(kept.encode(vectors, types), encoder.encode_user(vectors, types))
    assert encoder.calls == 3  # the second and the one for this comparison


def test_what_fails_is_not_kept() -> None:
    encoder = Encoder()
    kept = UserVectors(encoder, 64)  # type: ignore[arg-type]
    encoder.fails = True
    with pytest.raises(ModelError):
        kept.encode(*events(1))
    encoder.fails = False
    np.testing.assert_array_equal(kept.encode(*events(1)), Encoder().encode_user(*events(1)))


def test_none_is_kept_with_a_capacity_of_0() -> None:
    encoder = Encoder()
    kept = UserVectors(encoder, 0)  # type: ignore[arg-type]
    kept.encode(*events(1))
    kept.encode(*events(1))
    assert encoder.calls == 2


def test_the_longest_unused_makes_room_as_in_a_plain_table() -> None:
    rng, sets = np.random.default_rng(3), 4
    keys, used = np.zeros((sets, WAYS, 2), np.uint64), np.zeros((sets, WAYS), np.int64)
    vectors = np.zeros((sets, WAYS, DIM), np.float32)
    plain: list[OrderedDict[bytes, float]] = [OrderedDict() for _ in range(sets)]
    out = np.empty(DIM, np.float32)
    for step in range(2000):
        key = digest(*events(int(rng.integers(0, 40)), 1))
        table = plain[int(key[0] >> np.uint64(1)) % sets]
        hit = look_up(keys, used, vectors, key, out)
        assert hit == (key.tobytes() in table)
        if hit:
            assert (out == table[key.tobytes()]).all()
            table.move_to_end(key.tobytes())
            continue
        keep(keys, used, vectors, key, np.full(DIM, step, np.float32))
        table[key.tobytes()] = step
        if len(table) > WAYS:
            table.popitem(last=False)
