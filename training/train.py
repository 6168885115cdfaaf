"""Trains a run: the encoders, then the query encoder on their item vectors, then the ranker on their candidates.

Each stage is trained on the finished stage before it, which no longer changes: the ranker reads relevance as serving
will compute it.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from features.catalog_columns import CatalogColumns, columns_of
from features.errors import TrainingError
from features.linear import ItemWeights, LinearTerm
from features.tables.dataset import Dataset
from features.tables.intake import admit
from features.transforms import item_inputs
from features.vocabulary import Vocabulary
from training.automatic import default_actions, settle, types_of
from training.config import Action, TrainConfig, resolve_config
from training.data.clock import report_future_events
from training.data.generations import generations_now, split_again
from training.data.impressions import read_examples, read_slates
from training.data.interactions import Interactions, item_vocabulary, read_interactions
from training.data.moments import UserMoments, declared_of, user_moments
from training.data.point_in_time import PointInTimeStatistics, StatisticsSnapshot
from training.data.split import Split, cut_of, last_target, split
from training.fitting.claims import claimed
from training.fitting.encoders import EncoderTrainer, OnStep, OnValidation
from training.fitting.query_encoder import fit_query_encoder
from training.fitting.ranker_candidates import CandidateBuilder, fit_ranker
from training.fitting.ranker_impressions import fit_on_impressions, read_ranker_dataset
from training.fitting.start import EarlierRun
from training.models.baselines import counts_of, popularity_of, recent_popularity_of
from training.models.encoders import ItemBags
from training.models.extensions import extensions_of, require_extensions
from training.models.linear import LinearPart, LinearTrial, fit_linear
from training.models.neighbors import neighbors_of
from training.models.scoring import user_vectors
from training.models.warm_start import initial_vectors
from training.report import write_report
from training.run import (
    ALLOW,
    FORMAT,
    Modules,
    build_modules,
    input_shapes,
    load_modules,
    open_dataset_of_run,
    save_modules,
    write_json,
    write_tensors,
)
from training.runtime import StageClock, circumstances, exact, prepared

_INPUT_ITEMS = 1 << 14
"""Items whose content is read at once."""
_CONTENT = ("title", "description", "categories", "creator_id", "price")
_OF_RANKER = ("blend", "ranker_ndcg@10", "ranker_source", "ranker")


@dataclasses.dataclass(frozen=True)
class Material:
    """The data that a training learns from.

    Attributes:
        dataset: The canonical tables.
        items: The items table in row order.
        vocabulary: Item id <-> row.
        data: The events as arrays.
        division: Their split into training, validation and test.
        inputs: The item encoder's inputs for all items, on the training device; None if items have no content.
        actions: The actions that the ranker predicts.
        moments: The declared features of the ranker, and the attributes of users that they read.
    """

    dataset: Dataset
    items: pa.Table
    vocabulary: Vocabulary
    data: Interactions
    division: Split
    inputs: dict[str, torch.Tensor] | None
    actions: tuple[Action, ...]
    moments: UserMoments


@dataclasses.dataclass(frozen=True)
class _Job:
    """A training that was asked for.

    Attributes:
        data: Directory of the canonical tables.
        out: Directory of the run.
        config: The settings, complete.
        device: The device of the networks.
        earlier: The run that it begins from.
        clock: Measures its stages.
    """

    data: Path
    out: Path
    config: TrainConfig
    device: torch.device
    earlier: EarlierRun | None
    clock: StageClock
    on_step: OnStep | None
    on_validation: OnValidation | None


def train(
    data: str | Path,
    out: str | Path,
    config: TrainConfig | str | Path | None = None,
    on_step: OnStep | None = None,
    on_validation: OnValidation | None = None,
    *,
    automatic: bool | None = None,
    report: bool = True,
    start: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains a model on a data set; a training that was interrupted resumes from its checkpoint.

    Args:
        data: Directory of the canonical tables.
        out: Directory of the run.
        config: The settings, a YAML file of them, or the name of one that comes with Penchant (`movielens`).
        on_step: Called with the number of steps so far, after each step of the encoders.
        on_validation: Called with each line of `RUN/log.jsonl`. What a callback raises ends the training, and the same
            call resumes it.
        automatic: Choose by the data what no setting says, see `training.automatic`; None: if there is no `config`.
        report: Write `RUN/report.html`.
        start: Directory of an earlier run to begin from: its weights, and with `automatic` its settings.
        settings: Settings by name, over those of `config`: `train("data", "run", epochs=5, device="cpu")`.

    Returns:
        The content of `RUN/result.json`: `run`, `seconds`, `best_validation`, `blend`, `start` (`EarlierRun.facts`)...

    Raises:
        RunError: `out` is another run's, finished or not; or the weights of `start` do not fit.
        SettingsError: A setting is unknown, its value is not allowed, or this machine lacks the device.
        TablesError: The data set cannot be read, or more of its rows are malformed than `max_rejected_share` allows.
        TrainingError: The data set cannot be trained on as configured.
    """
    began = time.monotonic()
    automatic = config is None if automatic is None else automatic
    data, out, config, clock = Path(data), Path(out), resolve_config(config, settings), StageClock()
    if earlier := None if start is None else EarlierRun.open(Path(start)):
        # Its settings stand in for a survey of the data, which could come out differently today.
        config, automatic = earlier.settings(config, automatic), False
    require_extensions(config)
    # Whatever may refuse the training comes before its first step: the device, the data, the directory.
    device = config.resolved_device()
    with prepared(config.threads, device):
        torch.manual_seed(config.seed)
        dataset = open_dataset_of_run(data, out)
        left_out = _admit(data, dataset, config)
        config = settle(dataset, out, config) if automatic else config
        with claimed(out, config, dataset, earlier):
            material = read_material(dataset, config, device, out, earlier)
        left_out |= report_future_events(material.data)
        job = _Job(data, out, config, device, earlier, clock, on_step, on_validation)
        modules, progress, facts, begun = _fit(material, job)
    before = progress.pop("seconds_before")
    clock.seconds["encoders"] += before
    progress["seconds"] = round(before + time.monotonic() - began, 3)
    return _finish(job, progress | _circumstances(job, material, modules) | facts | left_out, begun, report)


def _finish(job: _Job, result: dict[str, Any], begun: dict[str, Any], report: bool) -> dict[str, Any]:
    """Writes what makes a run finished; returns its result."""
    out = job.out
    if job.earlier is not None:
        result["start"] = job.earlier.facts(begun, result)
    # result.json is what makes a run finished, so it is written when every other file is there; the checkpoint goes
    # after it, so that an interruption in between costs nothing.
    write_json(out / "result.json", result)
    if report:
        write_report([out])
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    return result


def _circumstances(job: _Job, material: Material, modules: Modules) -> dict[str, Any]:
    """Returns the part of a run's result that tells what was trained, where, by which stages, and on what."""
    return {
        "format": FORMAT,
        "run": str(job.out),
        "protocol": job.config.protocol,
        "parameters": sum(p.numel() for module in vars(modules).values() for p in module.parameters()),
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu",
        "data": str(job.data.resolve()),
        "stage_seconds": job.clock.seconds,
        "extensions": extensions_of(job.config),
        **generations_now(material.data, job.config, job.earlier.generations if job.earlier else ()),
        **_facts(material),
    }


def _fit(material: Material, job: _Job) -> tuple[Modules, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Trains the networks stage by stage and writes them.

    Returns:
        The networks; the encoders' and the ranker's parts of the result; and that of the start (`EarlierRun.facts`).
    """
    config, out, earlier, clock = job.config, job.out, job.earlier, job.clock
    clock.end("read")
    is_fresh = not (out / "checkpoint.safetensors").exists()
    modules = initial_modules(material, config, job.device, fresh=is_fresh and earlier is None)
    begun: dict[str, Any] = (
        {"kept": []}
        if earlier is None
        else earlier.begin(modules, material.vocabulary, material.data, material.division, material.actions, config)
    )
    bags = None if material.inputs is None else ItemBags.build(modules.item, material.inputs)
    clock.end("initial")
    schedule = None if earlier is None else earlier.schedule(config)
    trainer = EncoderTrainer(
        out, config, material.data, material.division, modules, bags, job.on_step, job.on_validation, schedule
    )
    progress = trainer.run()
    clock.end("encoders")
    # The best weights by validation, which need not be the last.
    load_modules(out / "model.safetensors", {"user": modules.user, "item": modules.item})
    with exact():
        tables = _tables(material, modules, bags, config)
        clock.end("tables")
        linear = _fit_linear(material, modules, tables, config, earlier)
        clock.end("linear")
    table = torch.from_numpy(tables["item_vectors"]).to(job.device)
    fit_query_encoder(modules.query, modules.item, table, material.inputs, config, begins_trained=earlier is not None)
    clock.end("query")
    with exact():
        keeps_ranker = "ranker" in begun["kept"]
        tables["statistics"], facts = _train_ranker(material, modules, table, tables, linear, job, keeps_ranker)
    clock.end("ranker")
    _write_models(out, material, modules, tables)
    return modules, progress, facts, begun


def _write_models(out: Path, material: Material, modules: Modules, tables: dict[str, npt.NDArray[Any]]) -> None:
    """Writes the parts of a run that the encoders' training has not written yet."""
    save_modules(out / "query.safetensors", {"query": modules.query})
    save_modules(out / "ranker.safetensors", {"ranker": modules.ranker})
    write_tensors(out / "tables.safetensors", {name: torch.from_numpy(array) for name, array in tables.items()})
    material.vocabulary.save(out / "vocabulary.arrow")


def _train_ranker(
    material: Material,
    modules: Modules,
    table: torch.Tensor,
    tables: dict[str, npt.NDArray[Any]],
    linear: LinearPart,
    job: _Job,
    is_kept: bool,
) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """Trains the ranker, on impressions if there are enough, else on candidates, unless an earlier run's is kept.

    Returns:
        The items' statistics up to the test, and the ranker's part of the run's result.
    """
    # The features come from the functions that serving calls, so that the ranker sees the same numbers there.
    config, weights = job.config, action_weights(material.actions, job.config)
    columns = _columns(material, tables)
    term = LinearTerm(linear.spec, ItemWeights.of(linear.neighbors, linear.scores))
    snapshot, known, training = _learn_from_impressions(material, modules, table, term, columns, job, is_kept)
    facts = {
        "action_weights": weights,
        "linear": {"spec": linear.spec.as_json(), **linear.facts},
        **snapshot.facts(),
    }
    if job.earlier is not None and is_kept:
        return snapshot.statistics, facts | {name: job.earlier.result[name] for name in _OF_RANKER}
    columns = dataclasses.replace(columns, statistics=known.statistics)
    data, actions, moments = material.data, material.actions, material.moments
    builder = CandidateBuilder(
        modules, table, term, data, columns, known.action_rates, actions, config, moments, bool(training)
    )
    blend, ndcg_by_blend = fit_ranker(builder, material.division, weights)
    source = "impressions" if training else "candidates"
    values = (blend, ndcg_by_blend, source, training)
    return snapshot.statistics, facts | dict(zip(_OF_RANKER, values, strict=True))


def _admit(path: Path, dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Reports the rows that were left out of all tables that are read; refuses if they are too many."""
    intakes = dict(dataset.intake)
    # Impressions are read only once the encoders are trained: hours of work must not end in a refusal.
    if _reads_impressions(config) and (slates := read_slates(path)) is not None:
        intakes["impressions"] = slates.intake
    return admit(intakes, config.max_rejected_share, ALLOW, dataset.info.get("time_units"))


def _reads_impressions(config: TrainConfig) -> bool:
    """Returns True if the ranker may learn from impressions."""
    # Impressions are split by time. Leave-one-out tests events of any time, so an impression before the cut may show
    # the very item that is tested; and the impressions of cold items would teach what their events must not.
    return bool(config.ranker_steps) and not config.cold_item_share and config.protocol != "leave-one-out"


def _learn_from_impressions(
    material: Material,
    modules: Modules,
    table: torch.Tensor,
    linear: LinearTerm,
    columns: CatalogColumns,
    job: _Job,
    keeps_ranker: bool,
) -> tuple[StatisticsSnapshot, StatisticsSnapshot, dict[str, Any]]:
    """Trains the ranker on impressions if there are enough, unless an earlier run's is kept.

    Returns:
        The statistics up to the test; the same of what the encoders were trained on; and the result of
        `fit_on_impressions`, empty if the ranker was not trained.
    """
    data, config, training = material.data, job.config, {}
    examples = None
    if _reads_impressions(config) and not data.ordered_only:
        examples = read_examples(
            job.data, material.dataset, material.vocabulary, data, material.actions, config.methods, material.moments
        )
    statistics = PointInTimeStatistics(data, columns, material.actions, examples, material.division.fit_end)
    if examples is not None and not keeps_ranker:
        dataset = read_ranker_dataset(statistics, examples, modules.user, table, linear, config)
        training = fit_on_impressions(modules.ranker.cpu(), dataset, config) if dataset is not None else {}
    moment = 1 if data.ordered_only else cut_of(data, config) + 1
    # Candidates are made for the validation targets: a rate that counted these would tell which of them it is.
    return statistics.at(moment), statistics.at(moment, material.division.train_end), training


def read_material(
    dataset: Dataset,
    config: TrainConfig,
    device: torch.device,
    folder: Path | None = None,
    earlier: EarlierRun | None = None,
) -> Material:
    """Reads a data set for a training; `folder` has room for the events (`interactions.Disk`).

    Raises:
        TrainingError: No user has an event left to train on that could be predicted from an earlier one; or the
            weights of `earlier` do not fit the items.
        SettingsError: A declared feature names an event type that the data set does not have.
    """
    items, vocabulary = item_vocabulary(dataset)
    data = read_interactions(dataset, vocabulary, config, folder)
    inputs = None
    if config.content and any(items[name].null_count < len(items) for name in _CONTENT):
        inputs = _inputs_of(items.select(["item_id", *_CONTENT]), config, device)
    division = split(data, config) if earlier is None else split_again(data, config, earlier.generations)
    # Of two events the second need not be a target: an item that its user has had, or only saw, is none.
    if last_target(data, division.train_end).max(initial=-1) < 1:
        raise TrainingError(
            "no user has two training events of which the second could be predicted, so there is no next item to learn "
            "from; use a data set with longer histories, or set target_types or repeats"
        )
    if earlier is not None:
        earlier.require_same_items(vocabulary, inputs is not None)
    return Material(
        dataset=dataset,
        items=items,
        vocabulary=vocabulary,
        data=data,
        division=division,
        inputs=inputs,
        actions=config.actions or default_actions(data, config),
        moments=user_moments(declared_of(config.features, data.event_types), dataset.users, data.users),
    )


def _inputs_of(items: pa.Table, config: TrainConfig, device: torch.device) -> dict[str, torch.Tensor]:
    """Returns the item encoder's inputs, one row per item."""
    inputs: dict[str, torch.Tensor] = {}
    at = 0
    # In parts, because an item as a dictionary takes ten times the memory of its inputs.
    for batch in items.to_batches(max_chunksize=_INPUT_ITEMS):
        for name, array in item_inputs(batch.to_pylist(), input_shapes(config)).items():
            part = torch.from_numpy(array)
            whole = inputs.setdefault(name, part.new_empty((len(items), *part.shape[1:]), device=device))
            whole[at : at + batch.num_rows] = part
        at += batch.num_rows
    return inputs


def initial_modules(material: Material, config: TrainConfig, device: torch.device, fresh: bool) -> Modules:
    """Builds the networks before the first step.

    Without `fresh` the initial item vectors are left out: a checkpoint is about to replace them.
    """
    data, content = material.data, material.inputs is not None
    modules = build_modules(config, data.items, len(data.event_types), len(material.actions), content)
    if config.warm_start and fresh:
        with torch.no_grad():
            modules.item.ids.weight.copy_(initial_vectors(data, material.division.train_end, config))
    for module in vars(modules).values():
        module.to(device)
    return modules


def _tables(
    material: Material, modules: Modules, bags: ItemBags | None, config: TrainConfig
) -> dict[str, npt.NDArray[Any]]:
    """Computes the tables that a run keeps by row of the catalogue; see `LoadedRun`."""
    data, ends = material.data, material.division.train_end
    trained = counts_of(data, ends) > 0
    with torch.inference_mode():
        vectors = modules.item.eval().finished_table(bags, torch.from_numpy(trained).to(modules.item.ids.weight.device))
    # All tables count the training events alone: a table that knew the test would leak it into features and rungs.
    neighbors, scores = neighbors_of(data, ends, config.neighbors, config.seed)
    return {
        "item_vectors": vectors.float().cpu().numpy().copy(),
        # Logarithms, since a popular item has a thousand times the events of another and not its worth.
        "popularity": np.log1p(popularity_of(data, ends)).astype(np.float32),
        "recent_popularity": np.log1p(recent_popularity_of(data, ends, config.recent_days)).astype(np.float32),
        "trained": trained,
        "neighbors": neighbors,
        "neighbor_scores": scores,
    }


def _fit_linear(
    material: Material,
    modules: Modules,
    tables: dict[str, npt.NDArray[Any]],
    config: TrainConfig,
    earlier: EarlierRun | None,
) -> LinearPart:
    """Fits the linear part on the training events; its table takes the place of the cosines.

    Where nothing validates a training that begins from an earlier run, that run's linear part is kept.
    """
    data, division = material.data, material.division
    targets = division.validation.sample(config.validation_users, config.seed)
    table = torch.from_numpy(tables["item_vectors"]).to(modules.item.ids.weight.device)
    users = user_vectors(modules.user.eval(), table, data, targets, config.max_length)
    unscored = ~tables["trained"] & (material.inputs is None)
    cosines = tables["neighbors"], tables["neighbor_scores"]
    trial = LinearTrial(data, targets, users, tables["item_vectors"], unscored, config.repeats)
    if earlier is not None and not len(targets):
        linear = earlier.linear_part(material.vocabulary)
    else:
        linear = fit_linear(data, division.train_end, trial, cosines, config.seed)
    tables["neighbors"], tables["neighbor_scores"] = linear.neighbors, linear.scores
    return linear


def _columns(material: Material, tables: dict[str, npt.NDArray[Any]]) -> CatalogColumns:
    """Returns the catalogue's columns as serving will see them."""
    counts = {name: tables[name] for name in ("popularity", "recent_popularity", "trained")}
    counts["declared"] = material.moments.declared.item_values(material.items)
    return dataclasses.replace(columns_of(material.items, tables["item_vectors"]), **counts)


def _facts(material: Material) -> dict[str, Any]:
    """Returns the facts about the data that a bundle needs."""
    data = material.data
    return {
        "data_fingerprint": material.dataset.info["fingerprint"],
        "feature_fingerprint": material.moments.declared.fingerprint(),
        "features": material.moments.declared.as_json(),
        "people": len(data.users),
        "items": data.items,
        "events": int(data.rows.size),
        "event_types": data.event_types,
        "seen_types": types_of(data, data.seen),
        "actions": [action.model_dump() for action in material.actions],
        "content": material.inputs is not None,
        "ordered_only": data.ordered_only,
        "circumstances": circumstances(),
    }


def action_weights(actions: tuple[Action, ...], config: TrainConfig) -> list[float]:
    """Returns the worth of each action, scaled so that the positive ones sum to 1.

    The ranker's utility is then the log-odds of a probability, whatever the scale of the settings (`models.ranker`).
    """
    weights = [config.action_weights.get(action.name, 1.0) for action in actions]
    total = sum(weight for weight in weights if weight > 0) or 1.0
    return [weight / total for weight in weights]
