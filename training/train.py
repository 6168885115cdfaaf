"""Trains a run: the encoders, then the query encoder on their item vectors, then the ranker on their candidates."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.assemble import FEATURES
from features.catalog_columns import CatalogColumns, columns_of
from features.errors import TrainingError
from features.private_files import make_folders
from features.tables.dataset import Dataset
from features.tables.intake import admit
from features.transforms import item_inputs
from features.vocabulary import Vocabulary
from training.config import Action, TrainConfig
from training.data.clock import tell_future
from training.data.impressions import read_shown, read_slates
from training.data.interactions import Interactions, item_vocabulary, read_interactions
from training.data.point_in_time import PointInTimeStatistics, StatisticsSnapshot
from training.data.split import Split, cut_of, split
from training.fitting.encoders import Fit, OnStep
from training.fitting.ranker_candidates import CandidateBuilder, fit_query_encoder, fit_ranker
from training.fitting.ranker_impressions import learn, read_feed
from training.models.baselines import counts_of, neighbors_of, popularity_of, recent_popularity_of
from training.models.encoders import ItemBags
from training.models.warm_start import near_vectors
from training.report import write_report
from training.run import (
    ALLOW,
    FORMAT,
    Modules,
    RunError,
    build_modules,
    input_shapes,
    load_modules,
    open_moment,
    save_modules,
    write_items,
    write_json,
    write_tensors,
)
from training.runtime import circumstances, exact, prepared

WARM_EVENTS = 1 << 20
"""Events that the vectors to start from are made of at most."""
_CONTENT = ("title", "description", "categories", "creator_id", "price")
_MOMENT = ("fingerprint", "until", "catalog_version")


@dataclasses.dataclass(frozen=True)
class Material:
    """What a training learns from.

    Attributes:
        dataset: The canonical tables.
        items: The items table in row order.
        vocabulary: Item id <-> row.
        data: The events as arrays.
        division: What of them is trained on.
        inputs: The item encoder's inputs for all items, on the training device; None where items say nothing.
        actions: What the ranker predicts.
    """

    dataset: Dataset
    items: pa.Table
    vocabulary: Vocabulary
    data: Interactions
    division: Split
    inputs: dict[str, torch.Tensor] | None
    actions: tuple[Action, ...]


def train(data: Path, out: Path, config: TrainConfig, on_step: OnStep | None = None) -> dict[str, Any]:
    """Trains a model on a data set; a training that was interrupted goes on where it stood.

    Args:
        data: Directory of the canonical tables.
        out: Directory of the run.
        config: How to train.
        on_step: Called with the number of steps made, after each step of the encoders.

    Returns:
        What `RUN/result.json` holds: `run`, `seconds`, `tokens_per_second`, `best_validation`, `parameters`, `blend`...

    Raises:
        RunError: `out` holds a finished run, or an unfinished one with another configuration or data set.
        TablesError: The data set cannot be read, or more of its rows are malformed than `max_rejected_share` allows.
        TrainingError: The data set cannot be trained on as configured.
    """
    began = time.monotonic()
    device = config.resolved_device()
    with prepared(config.threads, device):
        torch.manual_seed(config.seed)
        dataset = open_moment(data, out)
        left_out = _admit(data, dataset, config)
        _claim(out, config, dataset)
        material = read_material(dataset, config, device, out)
        left_out |= tell_future(material.data)
        modules = initial_modules(material, config, device, fresh=not (out / "checkpoint.safetensors").exists())
        bags = None if material.inputs is None else ItemBags.build(modules.item, material.inputs)
        progress = Fit(out, config, material.data, material.division, modules, bags, on_step).run()
        load_modules(out / "model.safetensors", {"user": modules.user, "item": modules.item})
        with exact():
            tables = _tables(material, modules, bags, config)
        table = torch.from_numpy(tables["item_vectors"]).to(device)
        fit_query_encoder(modules.query, modules.item, table, material.inputs, config)
        with exact():
            weights = action_weights(material.actions, config)
            columns = _columns(material, tables)
            learned, said = _learn_from_impressions(data, material, modules, table, columns, config)
            tables["statistics"] = learned.statistics
            columns = dataclasses.replace(columns, statistics=learned.statistics)
            asker = CandidateBuilder(
                modules, table, material.data, columns, learned.outcomes, material.actions, config, bool(said)
            )
            blend, gain = fit_ranker(asker, material.division, weights)
    save_modules(out / "query.safetensors", {"query": modules.query})
    save_modules(out / "ranker.safetensors", {"ranker": modules.ranker})
    write_tensors(out / "tables.safetensors", {name: torch.from_numpy(array) for name, array in tables.items()})
    material.vocabulary.save(out / "vocabulary.arrow")
    seconds = progress.pop("seconds_before") + time.monotonic() - began
    result = {"format": FORMAT, "run": str(out), "protocol": config.protocol, "seconds": round(seconds, 3), **progress}
    result |= {"parameters": sum(p.numel() for module in vars(modules).values() for p in module.parameters())}
    result |= {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"}
    result |= {"blend": blend, "ranker_ndcg@10": gain, "data": str(data.resolve()), **_facts(material, weights)}
    result |= {"ranker_source": "impressions" if said else "candidates", "ranker": said, **learned.facts()}
    result |= left_out
    write_json(out / "result.json", result)
    write_report([out])
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    return result


def _admit(path: Path, dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Tells what was left out of all tables that are read, before any work; refuses too much of it."""
    intakes = dict(dataset.intake)
    # Impressions are read when the encoders are trained: hours of work must not end in a refusal.
    if _reads_impressions(config) and (slates := read_slates(path)) is not None:
        intakes["impressions"] = slates.intake
    return admit(intakes, config.max_rejected_share, ALLOW, dataset.info.get("time_units"))


def _reads_impressions(config: TrainConfig) -> bool:
    """Returns True if the ranker may learn from impressions.

    These are cut by time: one that is not later than another's test could tell of it.
    """
    return bool(config.ranker_steps) and not config.hide_items and config.protocol != "leave-one-out"


def _learn_from_impressions(
    path: Path, material: Material, modules: Modules, table: torch.Tensor, columns: CatalogColumns, config: TrainConfig
) -> tuple[StatisticsSnapshot, dict[str, Any]]:
    """Trains the ranker on impressions where there are enough; what is known of what people do with what they see.

    Returns:
        What was learned up to the test, and what `learn` says of the ranker, empty where it learned nothing here.
    """
    data, said = material.data, {}
    shown = None
    if _reads_impressions(config) and not data.ordered_only:
        shown = read_shown(path, material.dataset, material.vocabulary, data, material.actions, config.methods)
    teller = PointInTimeStatistics(data, columns, material.actions, shown, material.division.fit_end)
    if shown is not None:
        feed = read_feed(teller, shown, modules.user, table, config)
        said = learn(modules.ranker.cpu(), feed, config) if feed is not None else {}
    return teller.at(1 if data.ordered_only else cut_of(data, config) + 1), said


def read_material(dataset: Dataset, config: TrainConfig, device: torch.device, folder: Path | None = None) -> Material:
    """Turns a data set into what a training learns from; `folder` has room for the events (`interactions.Disk`).

    Raises:
        TrainingError: Nobody has two events left to train on.
    """
    items, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, config, folder)
    inputs = None
    if config.content and any(items[name].null_count < len(items) for name in _CONTENT):
        arrays = item_inputs(items.select(["item_id", *_CONTENT]).to_pylist(), input_shapes(config))
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    division = split(data, config)
    if division.train_end.max(initial=0) < 2:
        raise TrainingError(
            "no user has two training events, so there is no next item to predict; use a data set with longer histories"
        )
    return Material(
        dataset=dataset,
        items=items,
        vocabulary=vocabulary,
        data=data,
        division=division,
        inputs=inputs,
        actions=config.actions or default_actions(data),
    )


def default_actions(data: Interactions) -> tuple[Action, ...]:
    """One action per event type that is ever predicted."""
    names = _types_of(data, data.target)
    return tuple(Action.model_validate({"name": name, "event_type": name}) for name in names)


def _types_of(data: Interactions, chosen: npt.NDArray[np.bool_]) -> list[str]:
    """The names of the event types that occur among the chosen events, sorted."""
    counts = np.zeros(1 + len(data.event_types), np.int64)
    for block in data.blocks():
        counts += np.bincount(data.types[block.events][chosen[block.events]], minlength=counts.size)
    return [name for name, count in zip(data.event_types, counts[1:], strict=True) if count]


def _claim(out: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Makes `out` this run's, or makes sure that it already is."""
    make_folders(out)
    if (out / "result.json").exists():
        raise RunError(f"{out} holds a finished run: give another --out, or delete it")
    described = json.loads(config.model_dump_json())
    started = out / "config.json"
    identity = out / "data.json"
    found: dict[str, Any] = {name: dataset.info[name] for name in _MOMENT if name in dataset.info}
    if started.exists() and identity.exists():
        # Where and with how many threads is free: a checkpoint moves between devices.
        place = {"device": config.device, "threads": config.threads}
        before = TrainConfig.model_validate_json(started.read_text(encoding="utf-8")).model_copy(update=place)
        same = before == config
        if not same or json.loads(identity.read_text(encoding="utf-8")) != found:
            what = "data set" if same else "configuration"
            raise RunError(f"{out} holds an unfinished run with another {what}: give another --out, or delete it")
    if "until" in found:
        write_items(out, dataset.items)
    write_json(started, described)
    write_json(identity, found)


def initial_modules(material: Material, config: TrainConfig, device: torch.device, fresh: bool) -> Modules:
    """The networks before the first step; what a checkpoint will replace need not be warm."""
    data, content = material.data, material.inputs is not None
    modules = build_modules(config, data.items, len(data.event_types), len(material.actions), content)
    if config.warm_start and fresh:
        some = data.sample(material.division.train_end, WARM_EVENTS, config.seed)
        start = near_vectors(some, np.ones(some.rows.size, bool), config)
        with torch.no_grad():
            modules.item.ids.weight.copy_(start)
    for module in vars(modules).values():
        module.to(device)
    return modules


def _tables(
    material: Material, modules: Modules, bags: ItemBags | None, config: TrainConfig
) -> dict[str, npt.NDArray[Any]]:
    """What a run keeps by row of the catalogue; see `LoadedRun`."""
    data, ends = material.data, material.division.train_end
    trained = counts_of(data, ends) > 0
    with torch.inference_mode():
        vectors = modules.item.eval().table(bags, torch.from_numpy(trained).to(modules.item.ids.weight.device))
    neighbors, scores = neighbors_of(data, ends, config.neighbors, config.seed)
    return {
        "item_vectors": vectors.float().cpu().numpy().copy(),
        "popularity": np.log1p(popularity_of(data, ends)).astype(np.float32),
        "recent_popularity": np.log1p(recent_popularity_of(data, ends, config.recent_days)).astype(np.float32),
        "trained": trained,
        "neighbors": neighbors,
        "neighbor_scores": scores,
    }


def _columns(material: Material, tables: dict[str, npt.NDArray[Any]]) -> CatalogColumns:
    """The catalogue as serving will see it."""
    learned = {name: tables[name] for name in ("popularity", "recent_popularity", "trained")}
    return dataclasses.replace(columns_of(material.items, tables["item_vectors"]), **learned)


def _facts(material: Material, weights: list[float]) -> dict[str, Any]:
    """What a bundle must know of the data."""
    data = material.data
    return {
        "data_fingerprint": material.dataset.info["fingerprint"],
        "feature_fingerprint": FEATURES.fingerprint(),
        "people": len(data.people),
        "items": data.items,
        "events": int(data.rows.size),
        "event_types": data.event_types,
        "seen_types": _types_of(data, data.seen),
        "actions": [action.model_dump() for action in material.actions],
        "action_weights": weights,
        "content": material.inputs is not None,
        "ordered_only": data.ordered_only,
        "circumstances": circumstances(),
    }


def action_weights(actions: tuple[Action, ...], config: TrainConfig) -> list[float]:
    """The worth of each action, scaled so that the positive ones sum to 1."""
    weights = [config.action_weights.get(action.name, 1.0) for action in actions]
    total = sum(weight for weight in weights if weight > 0) or 1.0
    return [weight / total for weight in weights]
