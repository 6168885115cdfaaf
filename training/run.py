"""A training run on disk, and how everything after training reads it back.

RUN/config.json          TrainConfig
RUN/config.yaml          the settings that were chosen by the data, for --config; only where they were
RUN/model.safetensors    user encoder (`user.`) and item encoder (`item.`), best by validation
RUN/query.safetensors    query encoder
RUN/ranker.safetensors   ranker, its calibration folded in
RUN/tables.safetensors   item vectors, popularity, item-to-item neighbours, by row
RUN/vocabulary.arrow     item id <-> row
RUN/data.json            fingerprint of the data set and, of a warehouse, log id and catalogue version it was read at
RUN/items.parquet        the items of a warehouse, as they were then
RUN/result.json          what `penchant train` printed, and what a bundle must know
RUN/evaluations.jsonl    every test evaluation ever made of this run
RUN/log.jsonl            one line per validation
RUN/report.html          all of this for a reader: learning curves, metrics next to baselines, the data and versions
RUN/tensorboard/         the learning curve for TensorBoard, if the configuration asks for it
RUN/checkpoint.safetensors   only while training: everything that an exact resume needs
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from features.catalog_columns import CatalogColumns, columns_of
from features.declared import Declared
from features.errors import TrainingError
from features.files import sync
from features.linear import ItemWeights, LinearSpec, LinearTerm
from features.model_inputs import ranker_width
from features.tables.conform import Intake
from features.tables.dataset import Dataset, open_dataset
from features.tables.intake import admit
from features.transforms import ItemInputShapes
from features.vocabulary import Vocabulary
from training.config import TrainConfig
from training.data.interactions import item_vocabulary
from training.models.encoders import ItemEncoder, QueryEncoder, UserEncoder
from training.models.extensions import encoder_of, shape_of
from training.models.ranker import Ranker

FORMAT = 1
_TESTED = (
    *("protocol", "test_share", "test_days", "cold_item_share", "target_types", "target_min_value", "seen_types"),
    *("repeats", "ordered", "actions", "methods"),
)
"""Settings that decide which events and impressions are held out, and what is asked of a run."""
_RENAMED_SETTINGS = {"validation_people": "validation_users", "hide_items": "cold_item_share"}
"""Settings under the names that earlier runs of this format wrote into config.json."""
_MOMENT = ("fingerprint", "until", "catalog_version")


class RunError(TrainingError):
    """A run directory that is missing, unfinished or does not fit its use."""


@dataclass(frozen=True)
class Modules:
    """The four networks of a run."""

    user: UserEncoder
    item: ItemEncoder
    query: QueryEncoder
    ranker: Ranker


@dataclass(frozen=True)
class LoadedRun:
    """A finished run: modules in eval mode on the CPU, tables by catalogue row.

    Attributes:
        path: The run's directory.
        config: The settings of its training.
        user_encoder: Its `last` maps vectors, types and lengths to `[B, dim]`.
        item_encoder: Its `forward` places an item by content alone.
        query_encoder: Maps tokens to `[B, dim]`.
        ranker: Calibrated logits per action.
        vocabulary: Item id <-> row, in the order of `items`.
        items: The canonical items table in row order.
        item_vectors: float32 `[N, dim]`.
        popularity: float32 `[N]`, log1p of the row's events in the training part.
        recent_popularity: float32 `[N]`, log1p of its events in the last `recent_days` of the training part.
        trained: bool `[N]`, False for a row that training has not seen, whose vector comes from content alone.
        statistics: float32 `[N, S]`, rates of users' actions on the row's item when shown, see `features.catalog`.
        neighbors: int32 `[N, K]` item-to-item, largest weight first, -1 padded.
        neighbor_scores: float32 `[N, K]`, their weights (`training.models.linear`).
        result: `result.json`: run, seconds, tokens_per_second, best_validation, parameters, blend, data,
            data_fingerprint, feature_fingerprint, features, event_types, actions, action_weights, base_rates,
            surface_rates, ranker_source, ranker, linear, seen_types, content, ordered_only, rejected, rejections,
            unread, future_events, stage_seconds, generations, extensions, and start of one that began from another run.
        dataset: The data set that it was trained on.
    """

    path: Path
    config: TrainConfig
    user_encoder: UserEncoder
    item_encoder: ItemEncoder
    query_encoder: QueryEncoder
    ranker: Ranker
    vocabulary: Vocabulary
    items: pa.Table
    item_vectors: npt.NDArray[np.float32]
    popularity: npt.NDArray[np.float32]
    recent_popularity: npt.NDArray[np.float32]
    trained: npt.NDArray[np.bool_]
    statistics: npt.NDArray[np.float32]
    neighbors: npt.NDArray[np.int32]
    neighbor_scores: npt.NDArray[np.float32]
    result: dict[str, Any]
    dataset: Dataset

    @property
    def declared(self) -> Declared:
        """The declared features of the ranker."""
        return Declared.of(self.result.get("features") or (), self.result["event_types"])

    @property
    def linear(self) -> LinearTerm:
        """The linear part of relevance."""
        return LinearTerm(linear_spec(self.result), ItemWeights.of(self.neighbors, self.neighbor_scores))


def linear_spec(result: Mapping[str, Any]) -> LinearSpec:
    """Returns the weights of the linear part of a run's result; a run of an earlier version has none."""
    return LinearSpec.of((result.get("linear") or {}).get("spec"))


def input_shapes(config: TrainConfig) -> ItemInputShapes:
    """Returns the sizes of the content encoders' inputs."""
    return ItemInputShapes(
        token_buckets=config.token_buckets,
        max_tokens=config.max_tokens,
        category_buckets=config.category_buckets,
        max_categories=config.max_categories,
        creator_buckets=config.creator_buckets,
    )


def build_modules(config: TrainConfig, items: int, event_types: int, actions: int, content: bool) -> Modules:
    """Builds the networks with their initial weights, drawn from torch's own random state."""
    return Modules(
        user=encoder_of(config, shape_of(config, event_types)),
        item=ItemEncoder(items, config.dim, input_shapes(config), content),
        query=QueryEncoder(config.token_buckets, config.dim),
        ranker=Ranker(
            config.dim,
            ranker_width(actions, len(Declared.of(config.features))),
            config.ranker_hidden,
            actions,
            members=config.ranker_members,
            bins=config.ranker_bins,
            dropout=config.ranker_dropout,
        ),
    )


def load_run(run: str | Path, data: str | Path | None = None) -> LoadedRun:
    """Reads a finished run; `data` replaces the data set's path when the data has moved.

    Raises:
        RunError: No finished run at `run`, or `data` is not the data set that it was trained on.
    """
    run = Path(run)
    result = read_result(run)
    config = read_config(run)
    dataset = open_dataset_of_run(Path(data or result["data"]), run)
    if dataset.info["fingerprint"] != result["data_fingerprint"]:
        raise RunError(
            f"{data or result['data']} is not the data set that {run} was trained on: its fingerprint is "
            f"{dataset.info['fingerprint'][:12]}, the run's {result['data_fingerprint'][:12]}; name the right one"
        )
    # The fingerprint matches, so the items come in the order of the run's rows.
    items, _ = item_vocabulary(dataset)
    vocabulary = Vocabulary.open(run / "vocabulary.arrow")
    modules = build_modules(
        config, len(vocabulary), len(result["event_types"]), len(result["actions"]), result["content"]
    )
    load_modules(run / "model.safetensors", {"user": modules.user, "item": modules.item})
    load_modules(run / "query.safetensors", {"query": modules.query})
    load_modules(run / "ranker.safetensors", {"ranker": modules.ranker})
    tables = {name: tensor.numpy() for name, tensor in _read_tensors(run / "tables.safetensors").items()}
    return LoadedRun(
        path=run,
        config=config,
        user_encoder=modules.user.eval(),
        item_encoder=modules.item.eval(),
        query_encoder=modules.query.eval(),
        ranker=modules.ranker.eval(),
        vocabulary=vocabulary,
        items=items,
        result=result,
        dataset=dataset,
        **tables,
    )


def load_runs(runs: Sequence[Path], data: Path | None = None) -> list[LoadedRun]:
    """Reads finished runs that are measured together; `data` as in `load_run`.

    Raises:
        RunError: As `load_run`; or they differ in the data set, or in a setting that decides what is tested.
    """
    loaded = [load_run(run, data) for run in runs]
    first = loaded[0]
    for run in loaded[1:]:
        if run.result["data_fingerprint"] != first.result["data_fingerprint"]:
            raise RunError(f"{run.path} and {first.path} were trained on different data sets: evaluate them one by one")
        # All are asked for what the first one held out: another that held out less was trained on some of it.
        for name in _TESTED:
            held, wanted = getattr(run.config, name), getattr(first.config, name)
            if held != wanted:
                raise RunError(
                    f"{run.path} was trained with {name} {held}, {first.path} with {wanted}, so they do not hold out "
                    "the same: evaluate them one by one"
                )
    return loaded


def read_config(run: Path) -> TrainConfig:
    """Reads the settings that a training was started with."""
    settings: dict[str, Any] = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return TrainConfig.model_validate({_RENAMED_SETTINGS.get(name, name): value for name, value in settings.items()})


def open_dataset_of_run(data: Path, run: Path) -> Dataset:
    """Reads a data set as it was when the run began; a run that has not begun takes it as it is.

    Raises:
        TablesError: The data set cannot be read.
    """
    identity, items = run / "data.json", run / "items.parquet"
    record = json.loads(identity.read_text(encoding="utf-8")) if identity.is_file() else {}
    if "until" not in record:
        return open_dataset(data)
    # A warehouse grows while a training is interrupted: the resumed one must see the events and items of its start,
    # and export must write the catalogue's version of that time into the bundle.
    dataset = open_dataset(data, until=record["until"], items_from=items)
    return dataclasses.replace(dataset, info=dataset.info | {"catalog_version": record["catalog_version"]})


def identity_of(dataset: Dataset) -> dict[str, Any]:
    """Returns the content of `RUN/data.json` for a run that begins on a data set as it is now."""
    return {name: dataset.info[name] for name in _MOMENT if name in dataset.info}


def columns_of_run(run: LoadedRun) -> CatalogColumns:
    """Returns the catalogue's columns as the run's bundle will hold them."""
    tables = {name: getattr(run, name) for name in ("popularity", "recent_popularity", "trained", "statistics")}
    tables["declared"] = run.declared.item_values(run.items)
    return dataclasses.replace(columns_of(run.items, run.item_vectors), **tables)


ALLOW = "penchant train --set max_rejected_share="
"""Start of the option that allows a training more rejected rows; the share follows."""


def admit_run(run: LoadedRun, **more: Intake) -> dict[str, Any]:
    """Reports the rows that were left out of a run's data, and refuses data that its training would have refused.

    Args:
        run: The run, whose `max_rejected_share` holds.
        more: Tables that are read besides those of `run.dataset`.

    Returns:
        See `features.tables.intake.admit`.

    Raises:
        TablesError: More of a table was rejected than the training allowed.
    """
    # A result without a number of rejected rows is older than the limit: its training accepted any.
    share = run.config.max_rejected_share if "rejected" in run.result else 1.0
    return admit({**run.dataset.intake, **more}, share, ALLOW, run.dataset.info.get("time_units"))


def write_items(run: Path, items: pa.Table) -> None:
    """Keeps the items of a data set whose items may change."""
    draft = run / "items.parquet.draft"
    pq.write_table(items, draft, compression="zstd")
    os.replace(draft, run / "items.parquet")


def read_result(run: Path) -> dict[str, Any]:
    """Reads the result of a finished training.

    Raises:
        RunError: It has not finished, or a newer Penchant wrote it.
    """
    file = run / "result.json"
    if not file.is_file():
        raise RunError(f"{run} holds no finished run (no result.json): run `penchant train DATA --out {run}`")
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if result.get("format") != FORMAT:
        raise RunError(f"{run} has format {result.get('format')}, this Penchant reads {FORMAT}: train again")
    return result


def save_modules(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """Writes the weights of several modules into one file, each under its name."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    write_tensors(path, tensors)


def load_modules(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """Reads what `save_modules` wrote into modules of the same shapes.

    Raises:
        RunError: The file is damaged, or its weights have other shapes.
    """
    tensors = _read_tensors(path)
    for name, module in modules.items():
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        try:
            module.load_state_dict(weights)
        except RuntimeError as error:
            raise RunError(f"{path} does not fit its configuration: train again ({error})") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file in one step: a reader sees the old file or the new one, never a part."""
    draft = path.with_name(f"{path.name}.draft")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, draft, metadata)
    _put(draft, path)


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes JSON in one step."""
    write_document(path, json.dumps(content, indent=1) + "\n")


def write_document(path: Path, text: str) -> None:
    """Writes a text in one step."""
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    _put(draft, path)


def _put(draft: Path, path: Path) -> None:
    """Gives a finished file its name; both survive a loss of power once this has returned."""
    sync(draft)
    os.replace(draft, path)
    sync(path.parent)


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over names, types, shapes and bytes, in the order of the names."""
    # Names, types and shapes are hashed too: two tensors of the same bytes may still differ.
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous()
        hasher.update(f"{name}:{array.dtype}:{list(array.shape)}\n".encode())
        hasher.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Adds one line of JSON to a log."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")


def note_evaluation(run: Path, evaluation: Mapping[str, Any]) -> None:
    """Adds the result of a test to the log of a run's evaluations."""
    append_line(run / "evaluations.jsonl", {"at": datetime.now(UTC).isoformat(timespec="seconds"), **evaluation})


def keep_lines(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Removes lines from a log, and a last line that was cut off; in one step."""
    if not path.exists():
        return
    # A line that a crash cut off has no end of line, and is no JSON.
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text("".join(line for line in lines if is_kept(json.loads(line))), encoding="utf-8")
    _put(draft, path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: train again ({error})") from error
