"""The tables of a bundle in the form that requests read them: the catalogue, its words, and item neighbours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from features import bundle_tables
from features.bundle import Bundle
from features.catalog import Catalog
from serving.bundle.bitmap import Bitmap, first_allowed
from serving.bundle.text_index import LexicalIndex

_I32 = npt.NDArray[np.int32]
_F32 = npt.NDArray[np.float32]


class NeighborTable:
    """The item neighbours that export counted: row -> nearest rows and their cosine."""

    def __init__(self, rows: _I32, scores: _F32) -> None:
        """Takes the neighbours of each row, -1 after the last, and their cosines; int32, float32 [N, K]."""
        self._rows, self._scores = rows, scores

    def of(self, rows: _I32, weights: _F32, count: int, allowed: Bitmap) -> tuple[_I32, _F32]:
        """Returns the `count` allowed neighbours of `rows` with the largest sums of weighted cosines, best first."""
        # Live items have no neighbours here: they came after the export.
        exported = rows < len(self._rows)
        neighbors = self._rows[rows[exported]]
        scores = (self._scores[rows[exported]] * weights[exported, None])[neighbors >= 0]
        distinct, place = np.unique(neighbors[neighbors >= 0], return_inverse=True)
        total = np.bincount(place, scores, distinct.size).astype(np.float32)
        order = np.argsort(-total, kind="stable")
        ranked = distinct[order].astype(np.int32)
        best = first_allowed(ranked, allowed, count)
        return ranked[best], total[order[best]]


def read_catalog(bundle: Bundle) -> tuple[Catalog, LexicalIndex]:
    """Reads the items of a bundle, and the index of their words.

    Raises:
        BundleError: A table or an array is malformed, or they contradict one another.
    """
    items = bundle_tables.read_items(bundle)
    vocabulary = bundle_tables.read_vocabulary(bundle, items)
    vectors = bundle_tables.read_vectors(bundle, len(vocabulary))
    words = LexicalIndex(*bundle_tables.read_words(bundle, len(vocabulary)))
    return Catalog(items, vocabulary, vectors), words
