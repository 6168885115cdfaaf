"""The tables of a bundle in the form that requests read them: the catalogue, its words, item neighbours and the index.

They are read, checked and computed once, into sealed memory, and opened from there by every worker of a host: what a
worker adds of its own are the live changes. A process that serves alone does the same with memory of its own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features import bundle_tables
from features.arrow_file import reopen_table
from features.bundle import Bundle
from features.catalog import Catalog, CatalogTables
from features.catalog_columns import CatalogColumns, facts_of
from features.eligibility import Moments
from features.errors import BundleError
from features.item_prior import GROUPS
from features.linear import ItemWeights
from features.shared_arrays import ArrayWriter, NotSealed, SharedArrays, shared
from features.vocabulary import Vocabulary
from serving.bundle.bitmap import Bitmap, first_allowed
from serving.bundle.postings import Postings
from serving.bundle.reading import Announce, silent
from serving.bundle.text_index import LexicalIndex, base_postings
from serving.bundle.vector_index import require_index_of

_LEAST_ROOM = 1 << 14
_CHUNK = 1 << 16

_I32 = npt.NDArray[np.int32]
_F32 = npt.NDArray[np.float32]


class NeighborTable:
    """The neighbours of items by the table of item-to-item weights: row -> rows and weights."""

    def __init__(self, weights: ItemWeights) -> None:
        self.weights = weights

    def of(self, rows: _I32, weights: _F32, count: int, allowed: Bitmap) -> tuple[_I32, _F32]:
        """Returns the `count` allowed neighbours of `rows` with the largest sums of weights above 0, best first."""
        packed = self.weights
        # Live items have no neighbours here: they came after the export.
        exported = rows < packed.offsets.size - 1
        starts, ends = packed.offsets[rows[exported]], packed.offsets[rows[exported] + 1]
        lengths = ends - starts
        places = np.repeat(ends - np.cumsum(lengths), lengths) + np.arange(lengths.sum())
        neighbors, scores = packed.rows[places], packed.scores[places] * np.repeat(weights[exported], lengths)
        distinct, place = np.unique(neighbors, return_inverse=True)
        total = np.bincount(place, scores, distinct.size).astype(np.float32)
        # A sum below 0 says that users who chose these rows rather leave the neighbour.
        order = np.argsort(-total, kind="stable")[: np.count_nonzero(total > 0)]
        ranked = distinct[order].astype(np.int32)
        best = first_allowed(ranked, allowed, count)
        return ranked[best], total[order[best]]


@dataclass(frozen=True, slots=True)
class BundleTables:
    """The tables of a bundle.

    Attributes:
        catalog: Its items.
        lexical: Their words.
        neighbors: Their neighbours.
        index: The checked bytes of its FAISS index; uint8.
    """

    catalog: Catalog
    lexical: LexicalIndex
    neighbors: NeighborTable
    index: npt.NDArray[np.uint8]


def read_tables(bundle: Bundle, handle: int | None = None, announce: Announce = silent) -> BundleTables:
    """Returns the tables of a bundle.

    Args:
        bundle: The bundle.
        handle: Sealed memory that `write_tables` filled; None reads the files into memory of this process.
        announce: Called with the name of each file before it is read.

    Raises:
        BundleError: A table or an array is malformed, or they contradict one another; or the memory is not sealed, or
            is that of another bundle.
    """
    if handle is None:
        with shared(lambda writer: write_tables(bundle, writer, announce)) as arrays:
            return _opened(bundle, arrays)
    try:
        arrays = SharedArrays(handle)
    except NotSealed as error:
        raise BundleError(f"{bundle.path}: {error}; start the service again") from error
    if arrays.facts.get("bundle_id") != bundle.bundle_id:
        raise BundleError(f"{bundle.path}: the shared memory is of another bundle; start the service again")
    return _opened(bundle, arrays)


def read_catalog(bundle: Bundle) -> tuple[Catalog, LexicalIndex]:
    """Reads the items of a bundle, and the index of their words.

    Raises:
        BundleError: A table or an array is malformed, or they contradict one another.
    """
    tables = read_tables(bundle)
    return tables.catalog, tables.lexical


def write_tables(bundle: Bundle, writer: ArrayWriter, announce: Announce = silent) -> None:
    """Reads the files of `features.bundle.TABLES`, checks them, and writes what requests need; the caller seals it.

    Args:
        bundle: The bundle.
        writer: Takes the tables.
        announce: Called with the name of each file before it is read.

    Raises:
        BundleError: See `read_tables`.
    """
    announce("items.arrow")
    items_file: Any = writer.stream("items.arrow", np.uint8, _size(bundle, "items.arrow"), bundle.pieces("items.arrow"))
    items = bundle_tables.read_items(bundle, memoryview(items_file))
    announce("vocabulary.arrow")
    vocabulary = bundle_tables.read_vocabulary(bundle, items)
    for name in ("keys", "offsets", "text", "slots"):
        writer.add(f"vocabulary.{name}", getattr(vocabulary, name))
    count = len(vocabulary)
    # A quarter more, as a catalogue grows in memory: room costs nothing until live items take it.
    room = max(_LEAST_ROOM, count // 4)
    announce("vectors.npy")
    vectors = _write_vectors(bundle, writer, count, room)
    facts = {name: writer.add(f"columns.{name}", column, room) for name, column in facts_of(items).items()}
    tables = CatalogTables.of(CatalogColumns(vectors=vectors, **facts), count)
    writer.add("moments.times", tables.moments.times)
    writer.add("moments.rows", tables.moments.rows)
    writer.add("popular", tables.popular)
    for name in GROUPS:
        keys, rows = tables.firsts[name]
        writer.add(f"{name}.keys", keys)
        writer.add(f"{name}.rows", rows)
    average = _write_words(bundle, writer, count, announce)
    announce("index.faiss")
    index: Any = writer.stream("index.faiss", np.uint8, _size(bundle, "index.faiss"), bundle.pieces("index.faiss"))
    require_index_of(memoryview(index), vectors)
    writer.note(bundle_id=bundle.bundle_id, items=count, average=average)


def _write_words(bundle: Bundle, writer: ArrayWriter, count: int, announce: Announce) -> float:
    """Writes the words of the items and their neighbours, and returns the average number of words of an item."""
    announce("tokens.npy")
    postings, average = base_postings(*bundle_tables.read_words(bundle, count))
    for name in ("tokens", "offsets", "rows", "impacts"):
        writer.add(f"words.{name}", getattr(postings, name))
    announce("neighbors.npy")
    neighbors = bundle_tables.read_neighbors(bundle, count)
    for name in ItemWeights._fields:
        writer.add(f"neighbors.{name}", getattr(neighbors, name))
    return average


def _write_vectors(bundle: Bundle, writer: ArrayWriter, count: int, room: int) -> _F32:
    shape, numbers = bundle.stream_array("vectors.npy", np.float32, (count, bundle.model.dim))
    vectors = writer.stream("columns.vectors", np.float32, shape, numbers, room)
    for start in range(0, count, _CHUNK):
        if not np.isfinite(vectors[start : start + _CHUNK]).all():
            raise bundle.malformed("vectors.npy", "holds NaN or infinity")
    return vectors


def _opened(bundle: Bundle, arrays: SharedArrays) -> BundleTables:
    """Returns the tables that lie in sealed memory: nothing is checked or computed again."""
    read: Any = arrays.read
    count = int(arrays.facts["items"])
    try:
        items = reopen_table(memoryview(read("items.arrow")))
    except ValueError as error:
        raise bundle.malformed("items.arrow", f"Arrow cannot read it ({error})") from error
    columns = CatalogColumns(
        **{field.name: arrays.writable(f"columns.{field.name}") for field in dataclasses.fields(CatalogColumns)}
    )
    # Writable, because a kernel is compiled for arrays that can be written to, and once more for those that cannot.
    popular = arrays.writable("popular")
    firsts = {name: (read(f"{name}.keys"), read(f"{name}.rows")) for name in GROUPS}
    tables = CatalogTables(columns, Moments(read("moments.times"), read("moments.rows")), firsts, popular)
    vocabulary = Vocabulary(*(read(f"vocabulary.{name}") for name in ("keys", "offsets", "text", "slots")))
    tokens, offsets, rows, impacts = (read(f"words.{name}") for name in ("tokens", "offsets", "rows", "impacts"))
    # Zeros that are not written take no memory: only items that are changed do.
    retired = np.zeros(count, np.int32)
    postings = Postings(tokens, offsets, rows, impacts, np.zeros(0, np.int32), retired)
    return BundleTables(
        Catalog(items, vocabulary, columns.vectors[:count], tables, bundle.model.declared),
        LexicalIndex.of(postings, float(arrays.facts["average"])),
        NeighborTable(ItemWeights(*(arrays.writable(f"neighbors.{name}") for name in ItemWeights._fields))),
        read("index.faiss"),
    )


def _size(bundle: Bundle, name: str) -> tuple[int]:
    return (bundle.manifest.files[name].size,)
