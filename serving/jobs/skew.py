"""Assembles what was served once more, from the warehouse, and compares it with the values that were logged.

The same stages read the same profile, only that it is folded from Parquet. Anything that differs is skew: a model would
be trained on other values than it is served with.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from features.assemble import encoder_digest, history, ranker_names, type_index
from features.bundle import Bundle, open_bundle
from features.catalog import Catalog
from features.kernels import dot_rows
from features.keys import item_keys
from features.profile import Profile
from features.subjects import subject_of
from features.tables.files import table_path
from serving.bundle.model import Model
from serving.engine.engine import personal, read_items
from serving.pipeline.hydrators import UserVector
from serving.pipeline.query import Query
from serving.projection.histories import LoggedHistories

ALLOWED = 0.01
"""Share of slates that may differ: what somebody took back or was made to forget is not in the warehouse any more."""

_COLUMNS = ["request_id", "user_id", "timestamp", "item_ids", "surface", "bundle_id", "profile_version"]
_COLUMNS += ["catalog_version", "features", "encoder_digest"]
_NEAR = 1e-5


class Replay:
    """Assembles the inputs of a bundle's models for slates of the past."""

    def __init__(self, bundle: Bundle, model: Model, catalog: Catalog) -> None:
        """Takes the models, and the catalogue as it was when the slates were served."""
        self._catalog, self._types = catalog, type_index(bundle.model.event_types)
        self._user, self._personal = UserVector(model, catalog), personal(bundle, model, catalog)
        self.names = ranker_names(bundle.model.action_names)

    def differing(self, slate: Mapping[str, Any], profile: Profile) -> list[str]:
        """The inputs that are not those that were served; none where all are, bit for bit.

        `relevance` comes out of a model, whose last bits are the machine's: it may differ by 1e-5.

        Args:
            slate: A row of the impressions, with its features.
            profile: The person's profile, replayed to the slate's `profile_version`.
        """
        query = Query(slate["request_id"], subject_of(slate["user_id"]), slate["timestamp"], math.inf, 1)
        query.surface = slate["surface"] or ""
        query.profile, query.history = profile, history(profile, self._catalog, self._types)
        if not self._user.enable(query):
            return ["history"]
        self._user.hydrate(query)
        assert query.encoded is not None
        assert query.user_vector is not None
        encoded, types = query.encoded
        served = np.array(slate["features"], np.float32)
        judged = ~np.isnan(served).all(axis=1)
        rows = self._catalog.rows(slate["item_ids"])[judged]
        again = self._personal.read(query, rows, dot_rows(self._catalog.columns.vectors, rows, query.user_vector))
        differs = again.view(np.uint32) != served[judged].view(np.uint32)
        differs[:, 0] = ~np.isclose(again[:, 0], served[judged, 0], _NEAR, _NEAR)
        found = [name for name, other in zip(self.names, differs.any(axis=0).tolist(), strict=True) if other]
        digest = encoder_digest(item_keys(self._catalog.ids(encoded)), types)
        return found if digest == slate["encoder_digest"] else ["encoder", *found]


def replay(data: Path, bundle: Path, allowed: float = ALLOWED) -> dict[str, Any]:
    """Replays every slate of a warehouse that was logged with its features.

    Only slates of this bundle are compared, and of the catalogue that it came with: what items were like later is not
    in the warehouse.

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
    catalog, _ = read_items(opened)
    again, histories = Replay(opened, Model(opened, "cpu"), catalog), LoggedHistories(data)
    served = opened.bundle_id, opened.manifest.catalog_version
    inputs: Counter[str] = Counter()
    slates = differing = elsewhere = 0
    where = table_path(data, "impressions")
    for path in sorted(where.rglob("p*.parquet")) if where else ():
        for slate in logged_slates(path):
            if (slate["bundle_id"], slate["catalog_version"]) != served:
                elsewhere += 1
                continue
            profile = histories.of(subject_of(slate["user_id"])).replayed(slate["profile_version"])
            found = again.differing(slate, profile)
            slates, differing = slates + 1, differing + bool(found)
            inputs.update(found)
    said = f"{differing} of {slates} slates were served with other values than their events give"
    if inputs:
        said += f", most often {', '.join(name for name, _ in inputs.most_common(3))}: training would learn from those"
    return {
        "name": "served_features",
        "passed": differing <= allowed * slates,
        "detail": said,
        "slates": slates,
        "differing": differing,
        "elsewhere": elsewhere,
        "inputs": dict(inputs),
    }


def logged_slates(path: Path) -> list[dict[str, Any]]:
    """The slates of one file of impressions that have their features."""
    with pq.ParquetFile(path) as file:
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        rows: list[dict[str, Any]] = file.read(columns=names).to_pylist()
    return [row for row in rows if row.get("features")]
