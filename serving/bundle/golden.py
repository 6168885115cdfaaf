"""Asks a loaded bundle the golden questions before it may serve: the same software, the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features import strict_json
from features.action_rates import ActionRates
from features.assemble import Moment, encoder_inputs, history, ranker_features, rows_read
from features.bundle import Bundle
from features.catalog import Catalog
from features.errors import BundleError
from features.golden import apart, profile_of
from features.keys import event_type_key
from features.transforms import ItemInputShapes, item_inputs, query_inputs, text_tokens
from serving.bundle.model import Model, ModelError
from serving.bundle.vector_index import Index

TOLERANCE = 1e-3
"""How far an answer may lie from the golden one, relative to its largest number: other processors round otherwise."""

RECALL = 0.9
"""Share of all golden best items that the index must find; export measured it on far more queries."""

_F32 = npt.NDArray[np.float32]
_MALFORMED = (ModelError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""Whatever a request raises that is not of the form that export writes."""


def replay(bundle: Bundle, model: Model, catalog: Catalog, index: Index) -> None:
    """Sends the golden requests down the road of real ones, before the catalogue takes live changes.

    Raises:
        BundleError: An answer is not the golden one; the message says which, and by how much.
    """
    _Replay(bundle, model, catalog, index).run()


class _Replay:
    def __init__(self, bundle: Bundle, model: Model, catalog: Catalog, index: Index) -> None:
        self._bundle, self._model, self._index, self._catalog = bundle, model, index, catalog
        self._types = {event_type_key(name): 1 + at for at, name in enumerate(bundle.model["event_types"])}
        self._shapes = ItemInputShapes(**{name: int(bundle.model[name]) for name in ItemInputShapes.__slots__})
        self._outcomes = ActionRates.of(bundle.model)
        self._found = self._wanted = 0

    def run(self) -> None:
        try:
            golden = strict_json.loads(self._bundle.read("golden.json"))
            for kind in ("people", "queries", "items") if self._catalog.size else ("items",):
                if not golden[kind]:
                    raise ValueError(f"there are no {kind}, so nothing shows that the models answer as at export")
            for at, person in enumerate(golden["people"]):
                self._person(f"people[{at}]", person)
            for at, query in enumerate(golden["queries"]):
                self._query(f"queries[{at}]", query)
            for at, new in enumerate(golden["items"]):
                vectors = self._model.encode_items(item_inputs([new["item"]], self._shapes))
                self._close(f"items[{at}].vector", vectors[0], new["vector"])
        except _MALFORMED as error:
            raise self._refusal(f"a request cannot be replayed: {error!r:.300}") from error
        if self._found < RECALL * self._wanted:
            raise self._refusal(f"the index finds {self._found} of {self._wanted} best items, fewer than {RECALL:.0%}")

    def _person(self, name: str, golden: Mapping[str, Any]) -> None:
        columns = self._catalog.columns
        profile = profile_of(golden["events"], self._catalog)
        past = history(profile, self._catalog, self._types)
        rows, types = encoder_inputs(rows_read(past), past.types, self._model.max_length)
        user = self._model.encode_user(columns.vectors[rows], types)
        self._close(f"{name}.vector", user, golden["vector"])
        best = self._best(name, user, golden)
        moment = Moment(golden["now_ms"], golden["surface"])
        relevance = np.array(golden["relevance"], np.float32)
        features = ranker_features(past, best, relevance, columns, self._outcomes, moment)
        self._close(f"{name}.features", features, golden["features"])
        logits = self._model.rank(user, columns.vectors[best], features)
        self._close(f"{name}.logits", logits, golden["logits"])

    def _query(self, name: str, golden: Mapping[str, Any]) -> None:
        if text_tokens(golden["text"]).tolist() != golden["tokens"]:
            raise self._refusal(f"{name}: {golden['text']!r} has other words here than where it was exported")
        vector = self._model.encode_query(query_inputs(golden["text"], self._shapes)["tokens"])
        self._close(f"{name}.vector", vector, golden["vector"])
        self._best(name, vector, golden)

    def _best(self, name: str, vector: _F32, golden: Mapping[str, Any]) -> npt.NDArray[np.int32]:
        """Compares the scores of the golden best items, counts those that the index finds, and returns their rows."""
        best = self._catalog.rows(golden["item_ids"])
        if (best < 0).any():
            raise self._refusal(f"{name}: the catalogue lacks one of {golden['item_ids']}")
        scores = self._index.score(vector, best)
        self._close(f"{name}.relevance", scores, golden["relevance"])
        # Where scores are equal but for rounding, another item is as right.
        enough = scores.min() - TOLERANCE * max(1.0, float(np.abs(scores).max()))
        self._found += int((self._index.search(vector[None], best.size)[1] >= enough).sum())
        self._wanted += best.size
        return best

    def _close(self, name: str, found: _F32, golden: Sequence[Any]) -> None:
        difference = apart(found, np.array(golden, np.float32))
        if difference > TOLERANCE:
            raise self._refusal(f"{name} is {difference:.2g} away from the golden answer, the limit is {TOLERANCE:.2g}")

    def _refusal(self, reason: str) -> BundleError:
        return BundleError(f"{self._bundle.path / 'golden.json'}: {reason}; export the run again with this version")
