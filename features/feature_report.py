"""Every feature a model reads and every fact a profile remembers, as a person would want to see them."""

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
from features.assemble import (
    ENCODER_FEATURES,
    FEATURES,
    RANKER_FEATURES,
    Moment,
    encoder_inputs,
    history,
    ranker_features,
    rows_read,
    type_index,
)
from features.bundle import open_bundle
from features.bundle_tables import read_items
from features.catalog import Catalog
from features.decayed_counts import DIMENSIONS, HORIZONS, VISIT_MS
from features.keys import event_type_keys, item_keys
from features.profile import OLDER_ITEMS_CAP, RING, empty, fold
from features.profile_codec import FORMAT
from features.records import RECORD, make_records
from features.tables.dataset import Dataset, open_dataset
from features.tables.intake import require_few, summary, tell
from features.tables.order import codes, is_present
from features.vocabulary import Vocabulary

SAMPLE = 2000
"""People whose newest event is looked at, drawn with a fixed seed."""


def features(data: Path | None = None, bundle: Path | None = None) -> dict[str, Any]:
    """Lists the features; with a data set or a bundle, also for how many rows each of them says something.

    Coverage is the share of rows in which a feature is neither 0 nor missing: of items for what is about an item, of
    people just before their newest event for what is about their past. What cannot be known is None: `relevance` needs
    a model and a person, what is about an action a model with actions, and without a data set nobody has a past.

    Args:
        data: Directory of a data set.
        bundle: Directory of a bundle; its catalogue is the one looked at where both are given.

    Returns:
        `features` [{`name`, `input`, `type`, `window`, `meaning`, `version`, `coverage`}] in the order of the model's
        input, `fingerprints` {`features`, `encoder`, `ranker`, `state`}; with a bundle, whether it `fits`; with a
        data set, what was left out of it, as `features.tables.intake.summary` says.

    Raises:
        TablesError: The data set cannot be read, or no row of a table can.
        BundleError: The bundle is refused.
    """
    coverage: dict[str, float] = {}
    said: dict[str, Any] = {}
    catalog: Catalog | None = None
    if bundle is not None:
        opened = open_bundle(bundle)
        table = read_items(opened)
        catalog = _catalog(table)
        said["fits"] = opened.manifest.feature_fingerprint == FEATURES.fingerprint()
    if data is not None:
        dataset = open_dataset(data)
        tell(dataset.intake, dataset.info.get("time_units"))
        require_few(dataset.intake, 1.0, "")
        said |= summary(dataset.intake)
        catalog = catalog or _catalog(_counted(dataset))
        coverage |= _of_people(dataset, catalog)
    if catalog is not None:
        coverage |= _of_items(catalog)
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
        for feature in FEATURES
    ]
    sets = {"features": FEATURES, "encoder": ENCODER_FEATURES, "ranker": RANKER_FEATURES}
    prints = {name: one.fingerprint() for name, one in sets.items()}
    return {"features": listed, "fingerprints": prints | {"state": state_fingerprint()}, **said}


def state_fingerprint() -> str:
    """Sha256 over everything that changes what is folded: the record's fields and how much is remembered."""
    facts = {"format": FORMAT, "record": RECORD.descr, "ring": RING, "evicted": OLDER_ITEMS_CAP}
    facts |= {"horizons": HORIZONS, "dimensions": DIMENSIONS, "visit": VISIT_MS}
    return hashlib.sha256(json.dumps(facts, separators=(",", ":")).encode()).hexdigest()


def _catalog(items: pa.Table) -> Catalog:
    names = [str(name) for name in items["item_id"].to_pylist()]
    return Catalog(items, Vocabulary.build(names), np.zeros((len(names), 1), np.float32))


def _counted(dataset: Dataset) -> pa.Table:
    """The items with their popularity, as training would count it over all events."""
    named, which = codes(dataset.events["item_id"])
    position = pc.index_in(pa.array(named, pa.string()), value_set=dataset.items["item_id"].combine_chunks())
    rows = pc.fill_null(position, -1).to_numpy()[which]
    counts = np.bincount(rows[rows >= 0], minlength=dataset.items.num_rows)
    table = dataset.items.append_column("popularity", pa.array(np.log1p(counts).astype(np.float32)))
    return table.append_column("trained", pa.array(counts > 0))


def _of_items(catalog: Catalog) -> dict[str, float]:
    """Coverage of what is about an item."""
    everything = np.arange(catalog.size, dtype=np.int32)
    nobody = history(empty(), catalog, {})
    values = ranker_features(
        nobody, everything, np.zeros(catalog.size, np.float32), catalog.columns, _no_actions(()), Moment()
    )
    shares = _shares(values)
    covered = {f.name: shares[f.name] for f in RANKER_FEATURES if f.window == "item"}
    return covered | {"price": covered["price_known"]}


def _of_people(dataset: Dataset, catalog: Catalog) -> dict[str, float]:
    """Coverage of what is about a past: of a sample of people, just before their newest event, for its item."""
    events = dataset.events
    people, who = codes(events["user_id"])
    ends = np.cumsum(np.bincount(who, minlength=len(people)))
    starts = np.concatenate([[0], ends[:-1]])
    named, what = codes(events["item_id"])
    kinds, kind = codes(events["event_type"])
    rows = catalog.rows(named)[what]
    types = type_index(sorted(kinds))
    columns = catalog.columns
    timed = is_present(events["timestamp"])
    records = make_records(
        item_keys(named)[what],
        np.where(rows >= 0, columns.category[rows], np.uint64(0)),
        np.where(rows >= 0, columns.creator[rows], np.uint64(0)),
        pc.fill_null(events["timestamp"], 0).to_numpy() if timed else 0,
        events["value"].to_numpy(),
        event_type_keys(kinds)[kind],
    )
    drawn = np.random.default_rng(0).permutation(len(people))[:SAMPLE]
    lines: list[npt.NDArray[np.float32]] = []
    outcomes = _no_actions(sorted(kinds))
    known, meant, seen = 0, 0, 0
    for person in np.sort(drawn).tolist():
        start, last = int(starts[person]), int(ends[person]) - 1
        earlier = records[start:last]
        past = history(fold(empty(), earlier, last - start), catalog, types)
        encoded, kinds_encoded = encoder_inputs(rows_read(past), past.types, RING)
        known, meant, seen = known + encoded.size, meant + int(np.count_nonzero(kinds_encoded)), seen + len(past)
        if rows[last] >= 0:
            now = Moment(int(records["timestamp"][last]))
            lines.append(ranker_features(past, rows[last : last + 1], np.zeros(1, np.float32), columns, outcomes, now))
    shares = _shares(np.concatenate(lines)) if lines else {}
    covered = {f.name: shares[f.name] for f in RANKER_FEATURES if f.window not in ("item", "request") and shares}
    return covered | {"item_vector": known / max(seen, 1), "event_type": meant / max(seen, 1)}


def _no_actions(event_types: Sequence[str]) -> ActionRates:
    """What is about an action is a model's own; here only the common features are looked at."""
    return ActionRates.of({"event_types": list(event_types), "actions": []})


def _shares(values: npt.NDArray[np.float32]) -> Mapping[str, float]:
    """By name, the share of the lines [n, F] in which a feature of the ranker is neither 0 nor missing."""
    told = np.isfinite(values) & (values != 0)
    return dict(zip(RANKER_FEATURES.names, told.mean(axis=0).tolist(), strict=True)) if len(values) else {}
