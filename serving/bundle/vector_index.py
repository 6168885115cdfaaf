"""The nearest items: those whose vectors have the largest inner product with a query.

A small bundle is scanned whole, a larger one is searched with its FAISS index, and on a CUDA device each is scanned
whole (`serving.bundle.device_scan`). Rows put since the bundle was made are always scanned. Each way only proposes:
the proposed rows are scored again, pair by pair, so a score is the same whichever way found the item.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from features.catalog import Catalog
from features.errors import BundleError
from features.kernels import best_first, dot_rows
from serving.bundle.bitmap import Bitmap, allowed_count, allowed_rows
from serving.bundle.index_file import check_index
from serving.errors import ConfigError

if TYPE_CHECKING:
    from serving.bundle.device_scan import DeviceScan

# Typed Any because the published stubs lack half of the arguments.
faiss: Any = _faiss

SPARE = 0.5
"""Share of rows that a quantised list proposes beyond those asked for, because it orders them roughly; as in export."""

# A product of matrices rounds by position, so where scores are nearly equal a few more must be proposed.
_ROUNDING = 16

NARROW = 32_000
"""Allowed rows up to which all of them are scored: reading lists far from the query for a few rows each costs more."""

# The CPU has scored so few rows before a device has answered.
_FEW = 2048

_F32 = npt.NDArray[np.float32]
_I32 = npt.NDArray[np.int32]


class Index:
    """Searches a catalogue by inner product; a call takes one thread, and any number of calls run at once."""

    def __init__(
        self,
        data: bytes | npt.NDArray[np.uint8],
        catalog: Catalog,
        device: Literal["cpu", "cuda"] = "cpu",
        *,
        checked: bool = False,
    ) -> None:
        """Takes an index as export wrote it.

        Args:
            data: The verified bytes of `index.faiss`; FAISS reads its lists in them, without a copy.
            catalog: The catalogue whose rows it indexes; rows it gains later are found too.
            device: Device that searches the bundle's rows. The answers are the same but for the rows that a FAISS
                index of lists misses; a CUDA device misses none.
            checked: True if `require_index_of` has passed these bytes.

        Raises:
            BundleError: The bytes are no index, or not of this catalogue's vectors.
            ConfigError: The device cannot be used.
        """
        self._catalog = catalog
        vectors = catalog.columns.vectors[: catalog.base_size]
        if not checked:
            require_index_of(data, vectors)
        # Kept, because FAISS points into it.
        self._data = np.frombuffer(data, np.uint8)
        self._index = _parse(self._data)
        self._lists = getattr(self._index, "nlist", 0)
        # Only numbers of one byte are rough; an exact index or whole lists order their rows exactly.
        self._spare = SPARE if isinstance(self._index, faiss.IndexIVFScalarQuantizer) else 0.0
        self._device_scan = None if device == "cpu" else scan_on(device, vectors)
        self.device = device

    def search(self, queries: _F32, k: int, allowed: Bitmap | None = None) -> tuple[_I32, _F32]:
        """Returns the best `k` rows of each query, best first, ties by row.

        Args:
            queries: float32 [B, D].
            k: Number of rows to return, at least 1; fewer if fewer are allowed.
            allowed: Rows that may be returned, one bit a row, lowest bit first; None allows every row.

        Returns:
            Rows int32 [B, k'] and inner products float32 [B, k'], k' = min(k, number of allowed rows).

        Raises:
            ValueError: A query is not finite or has the wrong length, or `k` is less than 1.
        """
        queries = self._checked(queries, k)
        # The size first: the catalogue grows while this thread reads, and columns read later have room for all rows.
        size = self._catalog.size
        vectors = self._catalog.columns.vectors
        base = self._catalog.base_size
        if allowed is None:
            live, base_count = np.arange(base, size, dtype=np.int32), base
        else:
            live = allowed_rows(allowed, base, size)
            base_count = allowed_count(allowed, base)
        count = min(k, base_count + live.size)
        rows, scores = np.empty((len(queries), count), np.int32), np.empty((len(queries), count), np.float32)
        proposals = self._propose(queries, min(k, base_count), base_count, allowed)
        for at, query in enumerate(queries):
            proposed = proposals[at][proposals[at] >= 0].astype(np.int32)
            # Scored again, pair by pair: a score must not depend on the way, the batch or the other rows.
            rows[at], scores[at] = best(np.concatenate([proposed, live]), vectors, query, count)
        return rows, scores

    def score(self, query: _F32, rows: _I32) -> _F32:
        """Returns the scores of `rows` int32 [n] for `query` float32 [D], as `search` gives them; float32 [n].

        Raises:
            ValueError: The query is not finite or has the wrong length.
        """
        query = self._checked(np.asarray(query)[None], 1)[0]
        return dot_rows(self._catalog.columns.vectors, np.ascontiguousarray(rows, np.int32), query)

    def _propose(self, queries: _F32, k: int, count: int, allowed: Bitmap | None) -> npt.NDArray[np.int64]:
        """Returns rows of the bundle that hold the best `k` of `count` allowed ones, and -1; int64 [B, >= k]."""
        if k == 0:
            return np.empty((len(queries), 0), np.int64)
        if self._device_scan is not None:
            if allowed is not None and count <= _FEW:
                return self._all_allowed(allowed, len(queries))
            return self._device_scan.propose(queries, k, allowed)
        if not self._lists:
            return self._scan(queries, min(count, k + _ROUNDING), allowed)
        # The fewer rows are allowed, the farther from the query the best of them lie, and the more lists must be read
        # to meet as many rows as export measured the recall with; in the end scoring every allowed row costs less.
        probes = math.ceil(self._index.nprobe * self._index.ntotal / count)
        if allowed is not None and (probes >= self._lists or count <= NARROW):
            return self._all_allowed(allowed, len(queries))
        depth = min(count, k + math.ceil(k * self._spare))
        proposals = self._search_lists(queries, depth, probes, allowed)
        # The lists near the query hold fewer than `k` allowed rows: rules can allow what lies far from the user. FAISS
        # puts -1 behind what it has found, so the place of the k-th row tells.
        if (proposals[:, k - 1] < 0).any():
            proposals = self._search_lists(queries, depth, self._lists, allowed)
        return proposals

    def _all_allowed(self, allowed: Bitmap, queries: int) -> npt.NDArray[np.int64]:
        """Returns every allowed row of the bundle, for each of `queries`."""
        rows = allowed_rows(allowed, 0, self._catalog.base_size).astype(np.int64)
        return np.broadcast_to(rows, (queries, rows.size))

    def _scan(self, queries: _F32, k: int, allowed: Bitmap | None) -> npt.NDArray[np.int64]:
        """Returns the best `k` of a small bundle: one matrix product, half the time of FAISS's own exact index."""
        base = self._catalog.base_size
        scores = queries @ self._catalog.columns.vectors[:base].T
        if allowed is not None:
            # The caller asks for no more rows than are allowed, so none of these is among the best `k`.
            scores[:, np.unpackbits(allowed, count=base, bitorder="little") == 0] = -np.inf
        if k < base:
            return np.argpartition(scores, base - k, axis=1)[:, base - k :]
        return np.broadcast_to(np.arange(base), scores.shape)

    def _search_lists(self, queries: _F32, k: int, probes: int, allowed: Bitmap | None) -> npt.NDArray[np.int64]:
        # The number of threads belongs to the calling thread, so it is set by each call.
        faiss.omp_set_num_threads(1)
        selector = None if allowed is None else faiss.IDSelectorBitmap(np.ascontiguousarray(allowed))
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=min(probes, self._lists))
        rows: npt.NDArray[np.int64] = self._index.search(queries, k, params=parameters)[1]
        return rows

    def _checked(self, queries: _F32, k: int) -> _F32:
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._index.d:
            raise ValueError(f"queries: expected [B, {self._index.d}], got {list(queries.shape)}")
        if not np.isfinite(queries).all():
            raise ValueError("queries: a vector holds NaN or infinity, so it has no nearest items")
        if k < 1:
            raise ValueError(f"k: must be at least 1, got {k}")
        return queries


def require_index_of(data: bytes | memoryview | npt.NDArray[np.uint8], vectors: _F32) -> None:
    """Checks that the bytes of an index are sound, and that it is the index of these vectors.

    Raises:
        BundleError: They are not.
    """
    try:
        facts = check_index(data)
    except ValueError as error:
        raise BundleError(f"index.faiss: {error}; export the run again") from error
    if (facts.count, facts.dim) != vectors.shape:
        raise BundleError(
            f"index.faiss: holds {facts.count} vectors of {facts.dim} numbers, the catalogue has "
            f"{vectors.shape[0]} of {vectors.shape[1]}; export the run again"
        )
    # A small index is never searched, but a bundle that contradicts itself is refused all the same.
    if facts.vectors is not None and not np.array_equal(facts.vectors, vectors):
        raise BundleError("index.faiss: holds other vectors than vectors.npy; export the run again")
    _parse(np.frombuffer(data, np.uint8))


def scan_on(device: str, vectors: _F32) -> DeviceScan:
    """Returns the scan of `vectors` float32 [N, D] on a CUDA device.

    Raises:
        ConfigError: There is no such device, no package that drives it, or too little memory on it.
    """
    try:
        from serving.bundle.device_scan import DeviceScan, require
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--device cuda: the search on a GPU needs {error.name}; pip install 'penchant[gpu]', or choose "
            "--device cpu"
        ) from error
    require(device)
    return DeviceScan(vectors, device)


def can_scan_on(device: str) -> bool:
    """Returns True if `scan_on` finds its packages and the device."""
    try:
        from serving.bundle.device_scan import require

        require(device)
    except (ModuleNotFoundError, ConfigError):
        return False
    return True


def best(candidates: _I32, vectors: _F32, query: _F32, k: int) -> tuple[_I32, _F32]:
    """Returns the best `k` of `candidates` int32 [n], best first, ties by row: rows int32 [k], scores float32 [k]."""
    scores = dot_rows(vectors, candidates, query)
    order = best_places(scores, candidates, k)
    return candidates[order], scores[order]


def best_places(scores: _F32, ties: _I32, k: int) -> npt.NDArray[np.intp]:
    """Returns the places of the best `k` of `scores` float32 [n], best first, then by `ties` int32 [n]; intp [<= k]."""
    keys = best_first(scores, ties)
    if k < keys.size:
        # A partition costs less than sorting all.
        at = np.argpartition(keys, k)[:k]
        return at[np.argsort(keys[at])]
    return np.argsort(keys)


def exact_search(vectors: _F32, queries: _F32, k: int, allowed: Bitmap | None = None) -> tuple[_I32, _F32]:
    """Scores every allowed row of `vectors` float32 [N, D]; the plain twin of `Index.search`."""
    size = len(vectors)
    rows = np.arange(size, dtype=np.int32) if allowed is None else allowed_rows(allowed, 0, size)
    pairs = [best(rows, vectors, query, min(k, rows.size)) for query in np.asarray(queries, np.float32)]
    return np.stack([rows for rows, _ in pairs]), np.stack([scores for _, scores in pairs])


def _parse(data: npt.NDArray[np.uint8]) -> Any:
    # No array inside the file can be larger than the file: a wrong length is refused before memory is taken for it.
    # FAISS counts four bytes for each element. The limits are the process's, so they are put back.
    limits = faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()
    faiss.set_deserialization_vector_byte_limit(4 * data.size + 64)
    faiss.set_deserialization_loop_limit(data.size + 64)
    try:
        return faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(data), data.size))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"index.faiss: FAISS cannot read it ({reason}); export the run again") from error
    finally:
        faiss.set_deserialization_vector_byte_limit(limits[0])
        faiss.set_deserialization_loop_limit(limits[1])
