"""Lists every feature that a model reads, and its coverage in a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.action_rates import ActionRates
from features.arrays import pc
from features.assemble import encoder_inputs, history, moment_at, ranker_features, rows_read, type_index
from features.bundle import open_bundle
from features.bundle_tables import read_items
from features.catalog import Catalog
from features.decayed_counts import DIMENSIONS, HORIZONS, VISIT_MS
from features.declared import NONE_DECLARED, Declared
from features.feature_set import Feature
from features.model_inputs import ENCODER_FEATURES, FEATURES, RANKER_FEATURES
from features.profile import OLDER_ITEMS_CAP, RING, empty, fold
from features.profile_codec import FORMAT
from features.records import RECORD
from features.tables.dataset import Dataset, open_dataset
from features.tables.intake import require_few, summary, tell
from features.tables.order import codes
from features.tables.records import table_records
from features.vocabulary import Vocabulary

SAMPLE = 2000
"""Users whose newest event is looked at, drawn with a fixed seed."""


def features(data: Path | None = None, bundle: Path | None = None) -> dict[str, Any]:
    """Lists the features; with a data set or a bundle, also their coverage.

    Coverage is the share of rows in which a feature is neither 0 nor missing: of items for a feature of the item, of
    users just before their newest event for a feature of their past. It is None where it cannot be known: `relevance`
    needs a model and a user, a feature of an action needs a model with actions, and a past needs a data set.

    Args:
        data: Directory of a data set.
        bundle: Directory of a bundle; its catalogue is used if both are given.

    Returns:
        `features` [{`name`, `input`, `type`, `window`, `meaning`, `version`, `coverage`}] in the order of the model's
        input, `fingerprints` {`features`, `encoder`, `ranker`, `state`}; with a bundle, `fits`, True if it has these
        features; with a data set, the rows left out of it, as `features.tables.intake.summary` says.

    Raises:
        TablesError: The data set cannot be read, or no row of a table can.
        BundleError: The bundle is refused.
    """
    coverage: dict[str, float] = {}
    facts: dict[str, Any] = {}
    catalog: Catalog | None = None
    declared = NONE_DECLARED
    if bundle is not None:
        opened = open_bundle(bundle)
        table, declared = read_items(opened), opened.model.declared
        catalog = _catalog(table)
        facts["fits"] = opened.manifest.feature_fingerprint == declared.fingerprint()
    if data is not None:
        dataset = open_dataset(data)
        tell(dataset.intake, dataset.info.get("time_units"))
        require_few(dataset.intake, 1.0, "")
        facts |= summary(dataset.intake)
        catalog = catalog or _catalog(_counted(dataset))
        coverage |= _of_users(dataset, catalog, declared)
    if catalog is not None:
        coverage |= _of_items(catalog, declared)
    listed = [
        {
            "name": feature.name,
            "input": "encoder" if feature in ENCODER_FEATURES.features else "ranker",
            "type": feature.dtype,
            "window": feature.window,
            "meaning": feature.meaning,
            "version": feature.version,
            "coverage": coverage.get(feature.name),
        }
        for feature in (*FEATURES, *declared.as_features())
    ]
    sets = {"encoder": ENCODER_FEATURES, "ranker": RANKER_FEATURES}
    prints = {"features": declared.fingerprint()}
    prints |= {name: feature_set.fingerprint() for name, feature_set in sets.items()}
    return {"features": listed, "fingerprints": prints | {"state": state_fingerprint()}, **facts}


def state_fingerprint() -> str:
    """Returns the SHA-256 of everything that changes the fold: the record's fields and the sizes of the state."""
    facts = {"format": FORMAT, "record": RECORD.descr, "ring": RING, "evicted": OLDER_ITEMS_CAP}
    facts |= {"horizons": HORIZONS, "dimensions": DIMENSIONS, "visit": VISIT_MS}
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def _catalog(items: pa.Table) -> Catalog:
    names = [str(name) for name in items["item_id"].to_pylist()]
    return Catalog(items, Vocabulary.build(names), np.zeros((len(names), 1), np.float32))


def _counted(dataset: Dataset) -> pa.Table:
    """Returns the items with their popularity, as training would count it over all events."""
    item_ids, item_codes = codes(dataset.events["item_id"])
    position = pc.index_in(pa.array(item_ids, pa.string()), value_set=dataset.items["item_id"].combine_chunks())
    rows = pc.fill_null(position, -1).to_numpy()[item_codes]
    counts = np.bincount(rows[rows >= 0], minlength=dataset.items.num_rows)
    table = dataset.items.append_column("popularity", pa.array(np.log1p(counts).astype(np.float32)))
    return table.append_column("trained", pa.array(counts > 0))


def _of_items(catalog: Catalog, declared: Declared) -> dict[str, float]:
    """Returns the coverage of the features of an item."""
    rows = np.arange(catalog.size, dtype=np.int32)
    no_past = history(empty(), catalog, {})
    values = ranker_features(
        no_past, rows, np.zeros(catalog.size, np.float32), catalog.columns, _no_actions(()), moment_at(declared)
    )
    shares = _shares(values, declared)
    covered = {f.name: shares[f.name] for f in _listed(declared) if f.window == "item"}
    return covered | {"price": covered["price_known"]}


def _of_users(dataset: Dataset, catalog: Catalog, declared: Declared) -> dict[str, float]:
    """Returns the coverage of the features of a past: of a sample of users, before their newest event, for its item."""
    events = dataset.events
    user_ids, users = codes(events["user_id"])
    ends = np.cumsum(np.bincount(users, minlength=len(user_ids)))
    starts = np.concatenate([[0], ends[:-1]])
    records, rows = table_records(events, catalog, catalog.columns)
    event_types = sorted(codes(events["event_type"])[0])
    types = type_index(event_types)
    sample = np.random.default_rng(0).permutation(len(user_ids))[:SAMPLE]
    values: list[npt.NDArray[np.float32]] = []
    actions = _no_actions(event_types)
    past_events, encoded_events, typed_events = 0, 0, 0
    for user in np.sort(sample).tolist():
        start, last = int(starts[user]), int(ends[user]) - 1
        past = history(fold(empty(), records[start:last], last - start), catalog, types)
        encoded, encoded_types = encoder_inputs(rows_read(past), past.types, RING)
        past_events += len(past)
        encoded_events += encoded.size
        typed_events += int(np.count_nonzero(encoded_types))
        if rows[last] >= 0:
            now, row, relevance = (
                moment_at(declared, int(records["timestamp"][last])),
                rows[last : last + 1],
                np.zeros(1, np.float32),
            )
            values.append(ranker_features(past, row, relevance, catalog.columns, actions, now))
    shares = _shares(np.concatenate(values), declared) if values else {}
    covered = {f.name: shares[f.name] for f in _listed(declared) if f.window not in ("item", "request") and shares}
    every = max(past_events, 1)
    return covered | {"item_vector": encoded_events / every, "event_type": typed_events / every}


def _no_actions(event_types: Sequence[str]) -> ActionRates:
    """Returns rates of no action: those of a model are its own, and only the common features are looked at here."""
    return ActionRates.of({"event_types": list(event_types), "actions": []})


def _listed(declared: Declared) -> list[Feature]:
    """Returns the features of the ranker that no action has."""
    return [*RANKER_FEATURES, *declared.as_features()]


def _shares(values: npt.NDArray[np.float32], declared: Declared) -> Mapping[str, float]:
    """Returns, by name, the share of the rows [n, F] in which a feature of the ranker is neither 0 nor missing."""
    covered = np.isfinite(values) & (values != 0)
    return (
        dict(zip([f.name for f in _listed(declared)], covered.mean(axis=0).tolist(), strict=True))
        if len(values)
        else {}
    )
