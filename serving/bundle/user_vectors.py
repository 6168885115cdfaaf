"""The vectors of users, each computed once: the user encoder runs again only when what it would read has changed.

Most requests come from users who have done nothing since their last one, and the encoder is the dearest step of a
request. A vector is kept under a digest of the very inputs of the encoder, so that it is exact without a version of
the profile or of the catalogue: another event, another order or a changed item vector is another key. What is kept
names no user.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from features.jit import kernel
from serving.bundle.model import Model

WAYS = 4
"""Places that a key may take; the longest unused of them makes room for a new one."""

_F32 = npt.NDArray[np.float32]
_I64 = npt.NDArray[np.int64]
_U64 = npt.NDArray[np.uint64]


class UserVectors:
    """The user encoder of a model with the vectors that it answered last; any number of threads may call at once."""

    def __init__(self, model: Model, capacity: int) -> None:
        """Takes the model and the number of vectors to keep, rounded up to four times a power of two; 0 keeps none."""
        self._model = model
        sets = 1 << (-(-capacity // WAYS) - 1).bit_length() if capacity else 0
        # Written here (`zeros` would not), so that the memory is taken at the start and does not seem to leak later.
        self._keys, self._used = np.full((sets, WAYS, 2), 0, np.uint64), np.full((sets, WAYS), 0, np.int64)
        self._vectors = np.full((sets, WAYS, model.dim), np.nan, np.float32)

    def encode(self, vectors: _F32, types: _I64) -> _F32:
        """Returns the vector of one user; see `Model.encode_user`."""
        if not self._keys.size:
            return self._model.encode_user(vectors, types)
        key = digest(vectors, types)
        user = np.empty(self._model.dim, np.float32)
        # Each kernel holds the interpreter, so that no thread sees the table half written.
        if not look_up(self._keys, self._used, self._vectors, key, user):
            user = self._model.encode_user(vectors, types)
            keep(self._keys, self._used, self._vectors, key, user)
        return user


def digest(vectors: _F32, types: _I64) -> _U64:
    """Returns what tells inputs of the encoder apart, 128 bits; uint64 [2], the first never 0."""
    state = hashlib.blake2b(np.ascontiguousarray(vectors).data, digest_size=16)
    state.update(np.ascontiguousarray(types).data)
    key = np.frombuffer(state.digest(), np.uint64).copy()
    key[0] |= np.uint64(1)  # 0 marks a free place
    return key


@kernel()
def _set_of(keys: _U64, key: _U64) -> np.int64:
    """Returns the set of places that a key may take; its lowest bit is always set, so it tells nothing."""
    return np.int64((key[0] >> np.uint64(1)) & np.uint64(keys.shape[0] - 1))


@kernel()
def look_up(keys: _U64, used: _I64, vectors: _F32, key: _U64, out: _F32) -> bool:
    """Copies the vector of a key; returns False if it is not there.

    Args:
        keys: uint64 [S, WAYS, 2], S a power of two.
        used: Number of the newest use of each place; int64 [S, WAYS].
        vectors: float32 [S, WAYS, D].
        key: uint64 [2].
        out: Receives the vector; float32 [D].
    """
    at = _set_of(keys, key)
    for way in range(keys.shape[1]):
        if keys[at, way, 0] == key[0] and keys[at, way, 1] == key[1]:
            used[at, way] = used[at].max() + 1
            out[:] = vectors[at, way]
            return True
    return False


@kernel()
def keep(keys: _U64, used: _I64, vectors: _F32, key: _U64, vector: _F32) -> None:
    """Keeps the vector of a key, in the place of the longest unused of its set; see `look_up`."""
    at = _set_of(keys, key)
    place = 0
    for way in range(keys.shape[1]):
        if keys[at, way, 0] == key[0] and keys[at, way, 1] == key[1]:
            place = way  # another thread was as fast
            break
        if used[at, way] < used[at, place]:
            place = way
    used[at, place] = used[at].max() + 1
    keys[at, place, 0], keys[at, place, 1] = key[0], key[1]
    vectors[at, place] = vector
