"""Assembles the served features once more, from the warehouse, and compares them with the values that were logged.

The same stages read the same profile, only that it is folded from Parquet. A difference is skew: a model would be
trained on other values than it is served with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from features.assemble import encoder_digest, history, type_index
from features.bundle import Bundle, open_bundle
from features.catalog import Catalog
from features.controls import attributes_of_text
from features.keys import item_keys
from features.linear import ItemWeights, LinearTerm
from features.model_inputs import ranker_names
from features.profile import Profile
from features.subjects import subject_of
from features.tables.files import table_path
from serving.bundle.model import Model
from serving.bundle.tables import read_tables
from serving.engine.pipelines import personal_ranker
from serving.pipeline.hydrators import UserVectorHydrator
from serving.pipeline.request import Request, UserState
from serving.projection.histories import LoggedHistories

ALLOWED = 0.01
"""Share of slates that may differ: events that a user has undone or erased since are not in the warehouse any more."""

_COLUMNS = ["request_id", "user_id", "timestamp", "item_ids", "surface", "bundle_id", "profile_version"]
_CONTEXT = ["device", "channel", "locale", "time_zone", "attributes"]
_COLUMNS += ["catalog_version", "features", "encoder_digest", "user_attributes", *_CONTEXT]
_NEAR = 1e-5


class FeatureReplay:
    """Assembles the inputs of a bundle's models for slates of the past."""

    def __init__(self, bundle: Bundle, model: Model, catalog: Catalog, weights: ItemWeights) -> None:
        """Takes the models, the catalogue as it was when the slates were served, and the item-to-item weights."""
        linear = LinearTerm(bundle.model.linear, weights)
        self._catalog, self._types = catalog, type_index(bundle.model.event_types)
        self._user_vector = UserVectorHydrator(model, catalog, linear)
        self._ranker = personal_ranker(bundle, model, catalog)
        self.names = ranker_names(bundle.model.action_names, bundle.model.declared.names)

    def differing(self, slate: Mapping[str, Any], profile: Profile) -> list[str]:
        """Returns the inputs that are not those that were served; empty where all are, bit for bit.

        `relevance` comes out of a model, whose last bits are the machine's: it may differ by 1e-5.

        Args:
            slate: A row of the impressions, with its features.
            profile: The user's profile, replayed to the slate's `profile_version`.
        """
        request = Request(
            request_id=slate["request_id"],
            subject=subject_of(slate["user_id"]),
            now_ms=slate["timestamp"],
            deadline=math.inf,
            page_size=1,
            surface=slate["surface"] or "",
            context={name: slate[name] for name in _CONTEXT if slate.get(name)},
        )
        past = history(profile, self._catalog, self._types)
        user = UserState(profile=profile, history=past, controls=attributes_of_text(slate.get("user_attributes") or ""))
        if not self._user_vector.enable(request, user):
            return ["history"]
        user, _ = self._user_vector.hydrate(request, user)
        assert user.encoded is not None
        assert user.vector is not None
        encoded, types = user.encoded
        served = np.array(slate["features"], np.float32)
        # The ranker judged the page only if nothing moved the order; the other rows are NaN.
        judged = ~np.isnan(served).all(axis=1)
        rows = self._catalog.rows(slate["item_ids"])[judged]
        replayed = self._ranker.features(request, user, rows, self._ranker.relevance(user, rows))
        differs = replayed.view(np.uint32) != served[judged].view(np.uint32)
        differs[:, 0] = ~np.isclose(replayed[:, 0], served[judged, 0], _NEAR, _NEAR)
        names = [name for name, different in zip(self.names, differs.any(axis=0).tolist(), strict=True) if different]
        digest = encoder_digest(item_keys(self._catalog.ids(encoded)), types)
        return names if digest == slate["encoder_digest"] else ["encoder", *names]


def replay(data: Path, bundle: Path, allowed: float = ALLOWED) -> dict[str, Any]:
    """Replays every slate of a warehouse that was logged with its features.

    Only slates of this bundle are compared, and of the catalogue that it came with: later changes of
    items are not in the warehouse.

    Args:
        data: Directory of the warehouse.
        bundle: The bundle that served.
        allowed: Share of slates that may differ.

    Returns:
        A check as `penchant validate` has them (`name`, `passed`, `detail`), with `slates` compared, `differing` among
        them, `elsewhere` (of another bundle or a later catalogue) and `inputs` {name: number of slates}.

    Raises:
        TablesError: The data set cannot be read.
        BundleError: The bundle is refused.
    """
    opened = open_bundle(bundle)
    tables = read_tables(opened)
    catalog, histories = tables.catalog, LoggedHistories(data)
    features = FeatureReplay(opened, Model(opened, "cpu"), catalog, tables.neighbors.weights)
    served = opened.bundle_id, opened.manifest.catalog_version
    inputs: Counter[str] = Counter()
    slates = differing = elsewhere = 0
    impressions = table_path(data, "impressions")
    for path in sorted(impressions.rglob("p*.parquet")) if impressions else ():
        for slate in logged_slates(path):
            if (slate["bundle_id"], slate["catalog_version"]) != served:
                elsewhere += 1
                continue
            profile = histories.of(subject_of(slate["user_id"])).replayed(slate["profile_version"])
            names = features.differing(slate, profile)
            slates, differing = slates + 1, differing + bool(names)
            inputs.update(names)
    detail = f"{differing} of {slates} slates were served with other values than their events give"
    if inputs:
        detail += (
            f", most often {', '.join(name for name, _ in inputs.most_common(3))}: training would learn from those"
        )
    return {
        "name": "served_features",
        "passed": differing <= allowed * slates,
        "detail": detail,
        "slates": slates,
        "differing": differing,
        "elsewhere": elsewhere,
        "inputs": dict(inputs),
    }


def logged_slates(path: Path) -> list[dict[str, Any]]:
    """Returns the slates of one file of impressions that have their features."""
    with pq.ParquetFile(path) as file:
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        rows: list[dict[str, Any]] = file.read(columns=names).to_pylist(maps_as_pydicts="lossy")
    return [row for row in rows if row.get("features")]
