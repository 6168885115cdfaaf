"""Asks a loaded bundle the golden questions before it may serve: the same software, the same answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from features import strict_json
from features.action_rates import ActionRates
from features.assemble import chosen_rows, encoder_inputs, history, moment_at, ranker_features, rows_read
from features.bundle import Bundle
from features.catalog import Catalog
from features.controls import attribute_controls
from features.errors import BundleError
from features.golden import largest_difference, profile_of
from features.keys import event_type_key
from features.linear import ItemWeights, LinearTerm
from features.transforms import item_inputs, query_inputs, text_tokens
from serving.bundle.model import Model, ModelError
from serving.bundle.vector_index import Index

TOLERANCE = 1e-3
"""Largest difference from a golden answer, relative to its largest number: other processors round otherwise."""

RECALL = 0.9
"""Share of all golden best items that the index must find; export measured it on far more queries."""

_F32 = npt.NDArray[np.float32]
_MALFORMED = (ModelError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""Errors that a request raises if it is not of the form that export writes."""


def replay(bundle: Bundle, model: Model, catalog: Catalog, index: Index, weights: ItemWeights) -> None:
    """Sends the golden requests down the path of real ones, before the catalogue takes live changes.

    Raises:
        BundleError: An answer is not the golden one; the message says which, and by how much.
    """
    _Replay(bundle, model, catalog, index, weights).run()


class _Replay:
    """One pass over the golden requests; `_retrieved` of `_expected` best items came back from the index."""

    def __init__(self, bundle: Bundle, model: Model, catalog: Catalog, index: Index, weights: ItemWeights) -> None:
        self._linear = LinearTerm(bundle.model.linear, weights)
        self._bundle, self._model, self._index, self._catalog = bundle, model, index, catalog
        self._types = {event_type_key(name): 1 + at for at, name in enumerate(bundle.model.event_types)}
        self._shapes, self._rates = bundle.model.shapes, ActionRates.of_model(bundle.model)
        self._declared = bundle.model.declared
        self._retrieved = self._expected = 0

    def run(self) -> None:
        try:
            golden = strict_json.loads(self._bundle.read("golden.json"))
            # A catalogue without items has nothing to recommend or to search.
            for kind in ("people", "queries", "items") if self._catalog.size else ("items",):
                if not golden[kind]:
                    raise ValueError(f"there are no {kind}, so nothing shows that the models answer as at export")
            for at, user in enumerate(golden["people"]):
                self._user(f"people[{at}]", user)
            for at, query in enumerate(golden["queries"]):
                self._query(f"queries[{at}]", query)
            for at, item in enumerate(golden["items"]):
                vectors = self._model.encode_items(item_inputs([item["item"]], self._shapes))
                self._require_close(f"items[{at}].vector", vectors[0], item["vector"])
        except _MALFORMED as error:
            raise self._refusal(f"a request cannot be replayed: {error!r:.300}") from error
        if self._retrieved < RECALL * self._expected:
            recall = f"{self._retrieved} of {self._expected} best items"
            raise self._refusal(f"the index finds {recall}, fewer than {RECALL:.0%}")

    def _user(self, name: str, golden: Mapping[str, Any]) -> None:
        columns = self._catalog.columns
        profile = profile_of(golden["events"], self._catalog)
        past = history(profile, self._catalog, self._types)
        rows, types = encoder_inputs(rows_read(past), past.types, self._model.max_length)
        user = self._model.encode_user(columns.vectors[rows], types)
        self._require_close(f"{name}.vector", user, golden["vector"])
        best = self._best(name, user, golden)
        # A bundle of an earlier version has none.
        if (sums := golden.get("linear")) is not None:
            self._require_close(f"{name}.linear", self._linear.scores(chosen_rows(past)).of(best), sums)
        # A bundle of an earlier version has no context and no attributes.
        controls = attribute_controls(golden.get("user_attributes") or {})
        moment = moment_at(self._declared, golden["now_ms"], golden["surface"], golden.get("context"), controls)
        relevance = np.array(golden["relevance"], np.float32)
        features = ranker_features(past, best, relevance, columns, self._rates, moment)
        self._require_close(f"{name}.features", features, golden["features"])
        logits = self._model.rank(user, columns.vectors[best], features)
        self._require_close(f"{name}.logits", logits, golden["logits"])

    def _query(self, name: str, golden: Mapping[str, Any]) -> None:
        # Another version of Unicode can split a text into other words, and a search would miss them silently.
        if text_tokens(golden["text"]).tolist() != golden["tokens"]:
            raise self._refusal(f"{name}: {golden['text']!r} has other words here than at its export")
        vector = self._model.encode_query(query_inputs(golden["text"], self._shapes)["tokens"])
        self._require_close(f"{name}.vector", vector, golden["vector"])
        self._best(name, vector, golden)

    def _best(self, name: str, vector: _F32, golden: Mapping[str, Any]) -> npt.NDArray[np.int32]:
        """Compares the scores of the golden best items, counts those that the index finds, and returns their rows."""
        best = self._catalog.rows(golden["item_ids"])
        if (best < 0).any():
            raise self._refusal(f"{name}: the catalogue lacks one of {golden['item_ids']}")
        scores = self._index.score(vector, best)
        self._require_close(f"{name}.relevance", scores, golden["relevance"])
        # Scores are counted, not rows: if two are equal but for rounding, either item is right.
        least = scores.min() - TOLERANCE * max(1.0, float(np.abs(scores).max()))
        self._retrieved += int((self._index.search(vector[None], best.size)[1] >= least).sum())
        self._expected += best.size
        return best

    def _require_close(self, name: str, answer: _F32, golden: Sequence[Any]) -> None:
        difference = largest_difference(answer, np.array(golden, np.float32))
        if difference > TOLERANCE:
            raise self._refusal(f"{name} is {difference:.2g} away from the golden answer, the limit is {TOLERANCE:.2g}")

    def _refusal(self, reason: str) -> BundleError:
        return BundleError(f"{self._bundle.path / 'golden.json'}: {reason}; export the run again with this version")
