"""Begins a training where an earlier run ended: its weights by name, a short schedule, and what it saves.

Item vectors move with their items, by id, and event types by name. An item that the earlier run was not trained on
begins as in a fresh training, by co-occurrence; but those vectors lie in axes of their own, so they are mapped into the
earlier run's by the items that both know.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from features.declared import Declared
from features.errors import LeakError
from features.linear import LinearSpec
from features.vocabulary import Vocabulary
from training.config import Action, TrainConfig
from training.data.generations import Generation
from training.data.interactions import Interactions
from training.data.split import Split
from training.fitting.encoders import Schedule
from training.models.linear import LinearPart
from training.models.warm_start import initial_vectors
from training.run import (
    Modules,
    RunError,
    linear_spec,
    read_config,
    read_result,
    sha256_of,
)

SHAPE = (
    *("encoder", "dim", "layers", "heads", "feed_forward", "max_length", "ordered"),
    *("token_buckets", "category_buckets", "creator_buckets"),
)
"""Settings that decide which weights there are, or what they mean."""
_RANKER_SHAPE = ("ranker_hidden", "ranker_members", "ranker_bins")
_PLACE = ("device", "threads")
_WARM_UP = 0.05
"""Share of the steps over which the learning rate rises: the optimizer begins without moments."""
_LEAST = 0.25
"""Share of what `start_share` allows that the encoders have in any case."""
_RIDGE = 1e-3
"""Ridge of the map from vectors of co-occurrence to learned ones, relative to the size of the former."""


@dataclass(frozen=True)
class Course:
    """The cost and the result of the last full training of a line of runs.

    Attributes:
        seconds: Seconds of the whole training.
        epochs: Passes of its encoders over the events.
        stages: Seconds by stage; empty for a run of an earlier version.
        validation: NDCG@10 of its best weights; None if nothing validated them.
    """

    seconds: float
    epochs: float
    stages: Mapping[str, float]
    validation: float | None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Course:
        """Returns that of a run's result: its own, or that of the line which it continues."""
        if "start" in result:
            return cls(**result["start"]["full"])
        validation = result["best_validation"].get("ndcg@10")
        return cls(result["seconds"], result["epochs"], result.get("stage_seconds", {}), validation)

    def as_json(self) -> dict[str, Any]:
        """Returns the values by name."""
        return {**vars(self), "stages": dict(self.stages)}

    def epochs_within(self, share: float) -> float:
        """Returns how many epochs fit into a share of the time, once the other stages have had theirs.

        They are at most that share of the epochs, so that weights which are good already are not trained for long.
        """
        usual = share * self.epochs
        if not self.stages:
            # Not known are the stages that do not become shorter, so half of the time is left to them.
            return usual / 2
        encoders = self.stages["encoders"]
        # The ranker is kept, and the query encoder makes a share of its steps; all else costs what it cost.
        rest = self.seconds - encoders - self.stages.get("ranker", 0.0)
        rest -= (1 - share) * self.stages.get("query", 0.0)
        epochs = (share * self.seconds - rest) / max(encoders, 1e-9) * self.epochs
        return min(usual, max(epochs, usual * _LEAST))


@dataclass(frozen=True)
class EarlierRun:
    """A finished run that another training begins from.

    Attributes:
        path: Its directory.
        config: Its settings.
        result: Its `result.json`.
        vocabulary: Its item ids by row.
        generations: What it, and the runs that it continued, were trained on.
    """

    path: Path
    config: TrainConfig
    result: dict[str, Any]
    vocabulary: Vocabulary
    generations: tuple[Generation, ...]

    @classmethod
    def open(cls, run: Path) -> EarlierRun:
        """Reads a run.

        Raises:
            RunError: It has not finished, or a newer Penchant wrote it.
        """
        result = read_result(run)
        vocabulary = Vocabulary.open(run / "vocabulary.arrow")
        return cls(run, read_config(run), result, vocabulary, Generation.read(result))

    @functools.cached_property
    def sha256(self) -> str:
        """The fingerprint of its encoders' weights."""
        return sha256_of(load_file(self.path / "model.safetensors"))

    @functools.cached_property
    def course(self) -> Course:
        """The last full training of its line."""
        return Course.of(self.result)

    def settings(self, asked: TrainConfig, automatic: bool) -> TrainConfig:
        """Returns the settings of a training that begins here.

        Args:
            asked: Its settings.
            automatic: Take those of the run, but for what is explicit in `asked`, and the machine.

        Raises:
            RunError: A setting of `SHAPE` differs; the message names all that do.
            LeakError: The run was trained on what these settings hold out.
        """
        config = asked
        if automatic:
            explicit = {name: getattr(asked, name) for name in (*_PLACE, *asked.model_fields_set)}
            config = TrainConfig.model_validate({**self.config.model_dump(), **explicit})
        self._require_same_shape(config)
        self._refuse_leak(config)
        return config

    def _refuse_leak(self, config: TrainConfig) -> None:
        # By time only the events tell, see `split_again`.
        held_out = "cold items" if config.cold_item_share else ""
        if config.protocol == "leave-one-out" and self.config.protocol != config.protocol:
            held_out = "the last events of users (protocol leave-one-out)"
        if held_out:
            raise LeakError(
                f"this training holds out {held_out}, which {self.path} was trained on: train without --from, or hold "
                "out nothing that it has learned"
            )

    def _require_same_shape(self, config: TrainConfig) -> None:
        different = [name for name in SHAPE if getattr(config, name) != getattr(self.config, name)]
        if different:
            self._refuse(
                " and ".join(f"{name} {getattr(self.config, name)}" for name in different),
                " and ".join(f"{name} {getattr(config, name)}" for name in different),
            )

    def require_same_items(self, vocabulary: Vocabulary, content: bool) -> None:
        """Refuses data of other items, or whose items have content where its own had none, or the other way round.

        Raises:
            RunError: They differ.
        """
        if not (self._places(vocabulary) >= 0).any():
            raise RunError(f"{self.path} knows none of the items of this data set: train without --from")
        if content != self.result["content"]:
            words = {True: "with content", False: "without content"}
            self._refuse(f"items {words[not content]}", f"items {words[content]} (setting content, and the data)")

    def _refuse(self, then: str, now: str) -> None:
        raise RunError(
            f"{self.path} was trained with {then}, this training has {now}, so its weights do not fit: train without "
            f"--from, or with the settings of {self.path}"
        )

    def schedule(self, config: TrainConfig) -> Schedule:
        """Returns the short schedule of a training that begins here."""
        return Schedule(
            epochs=self.course.epochs_within(config.start_share),
            rate=config.learning_rate * config.start_rate,
            warm_up=_WARM_UP,
            begins_trained=True,
        )

    def begin(
        self,
        modules: Modules,
        vocabulary: Vocabulary,
        data: Interactions,
        division: Split,
        actions: Sequence[Action],
        config: TrainConfig,
    ) -> dict[str, Any]:
        """Copies the weights into networks that were just built.

        Returns:
            Its part of the result, see `facts`: `items`, and `kept`, the parts that are not trained again. These are
            the ranker, if it reads the same features and predicts the same actions, and the linear part where nothing
            validates another.
        """
        items = self.copy_into(modules, vocabulary, data, division, config)
        kept = [] if len(division.validation) else ["linear"]
        keeps_ranker = self.keep_ranker(modules, actions, config)
        return {"items": items, "kept": kept + (["ranker"] if keeps_ranker else [])}

    def copy_into(
        self, modules: Modules, vocabulary: Vocabulary, data: Interactions, division: Split, config: TrainConfig
    ) -> dict[str, int]:
        """Copies the weights of encoders and query encoder into networks that were just built.

        Args:
            modules: On any device.
            vocabulary: The item ids of the new training.
            data: Its events.
            division: Their split.
            config: Its settings, see `settings` and `require_same_items`.

        Returns:
            `kept`, items whose vectors were copied, `new`, those that the earlier run was not trained on, and
            `vanished`, items of the earlier run that the data no longer has.
        """
        weights = load_file(self.path / "model.safetensors")
        trained = load_file(self.path / "tables.safetensors")["trained"].numpy()
        # By place in the new catalogue: the row of the earlier one, -1 where there is none.
        places = self._places(vocabulary)
        kept = (places >= 0) & trained[places]
        ids = weights.pop("item.ids.weight")
        self._copy_types(weights, modules, data.event_types)
        vectors = modules.item.ids.weight.detach().cpu().clone()
        vectors[torch.from_numpy(kept)] = ids[torch.from_numpy(places[kept].astype(np.int64))]
        if config.warm_start and not kept.all():
            first = initial_vectors(data, division.train_end, config)
            vectors[torch.from_numpy(~kept)] = _mapped(first, vectors, torch.from_numpy(kept))
        weights["item.ids.weight"] = vectors
        for name, module in (("user", modules.user), ("item", modules.item)):
            prefix = f"{name}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        query = load_file(self.path / "query.safetensors")
        modules.query.load_state_dict({key.removeprefix("query."): value for key, value in query.items()})
        vanished = len(self.vocabulary) - int((places >= 0).sum())
        return {"kept": int(kept.sum()), "new": int((~kept).sum()), "vanished": vanished}

    def keep_ranker(self, modules: Modules, actions: Sequence[Action], config: TrainConfig) -> bool:
        """Copies the ranker's weights where it reads the same features and predicts the same actions; else False."""
        fits = (
            [action.model_dump(mode="json") for action in actions] == self.result["actions"]
            and self.result["feature_fingerprint"] == Declared.of(config.features).fingerprint()
            and all(getattr(config, name) == getattr(self.config, name) for name in _RANKER_SHAPE)
        )
        if fits:
            weights = load_file(self.path / "ranker.safetensors")
            modules.ranker.load_state_dict({key.removeprefix("ranker."): value for key, value in weights.items()})
            modules.ranker.eval()
        return fits

    def linear_part(self, vocabulary: Vocabulary) -> LinearPart:
        """Returns its linear part for the rows of another catalogue, where nothing validates a new one."""
        tables = load_file(self.path / "tables.safetensors")
        neighbors, scores = tables["neighbors"].numpy(), tables["neighbor_scores"].numpy()
        now = np.append(vocabulary.rows(self.vocabulary.ids(np.arange(len(self.vocabulary)))), -1).astype(np.int32)
        places = self._places(vocabulary)
        # Rows by the new numbers; the last of `now` is for the padding -1, and vanished items leave a gap.
        rows = np.where((places >= 0)[:, None], now[neighbors[places]], -1)
        weights = np.where(rows >= 0, scores[places], 0).astype(np.float32)
        order = np.argsort(rows < 0, axis=1, kind="stable")
        spec: LinearSpec = linear_spec(self.result)
        facts = {name: value for name, value in (self.result.get("linear") or {}).items() if name != "spec"}
        return LinearPart(spec, np.take_along_axis(rows, order, 1), np.take_along_axis(weights, order, 1), facts)

    def facts(self, begun: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the result of a training says of its start.

        Args:
            begun: What `begin` returned.
            result: `seconds`, and of the validations `first_validation` and `best_validation`.

        Returns:
            `run`, `sha256` (the fingerprint of its encoders' weights), `items` (see `copy_into`), `kept` (see
            `begin`), `full` (the last full training of the line, see `Course`), `share_of_time` of that training, and
            `validation`, NDCG@10 of relevance by the encoders: `full`, that of this training; `earlier`, that of the
            run that it began from, both on the targets of their time; `before` the first step and `after` the last
            one on today's, None where nothing validates.
        """
        full = self.course
        return {
            "run": str(self.path),
            "sha256": self.sha256,
            **begun,
            "full": full.as_json(),
            "share_of_time": round(result["seconds"] / max(full.seconds, 1e-9), 4),
            "validation": {
                "full": full.validation,
                "earlier": self.result["best_validation"].get("ndcg@10"),
                "before": result.get("first_validation"),
                "after": result["best_validation"].get("ndcg@10"),
            },
        }

    def _places(self, vocabulary: Vocabulary) -> npt.NDArray[np.int32]:
        """Returns the row here of each item of another catalogue, -1 where there is none; int32 `[N]`."""
        return self.vocabulary.rows(vocabulary.ids(np.arange(len(vocabulary))))

    def _copy_types(self, weights: dict[str, Tensor], modules: Modules, event_types: Sequence[str]) -> None:
        """Puts the vectors of the event types into the order of `event_types`; a new type keeps its first vector."""
        if "user.types.weight" not in weights:  # an encoder of another package, which may keep them as it likes
            if list(event_types) != self.result["event_types"]:
                self._refuse(f"event types {self.result['event_types']}", f"event types {list(event_types)}")
            return
        then = {name: 1 + number for number, name in enumerate(self.result["event_types"])}
        types = modules.user.types.weight.detach().cpu().clone()
        for number, name in enumerate(event_types):
            if name in then:
                types[1 + number] = weights["user.types.weight"][then[name]]
        weights["user.types.weight"] = types


def _mapped(first: Tensor, learned: Tensor, kept: Tensor) -> Tensor:
    """Maps first vectors of new items into the space of learned ones, by least squares over the items that have both.

    Args:
        first: By co-occurrence, zeros for an item without events; float `[N, D]`.
        learned: Right where `kept`; float `[N, D]`.
        kept: bool `[N]`.

    Returns:
        The vectors where `kept` is False; float `[n, D]`.
    """
    both = kept & (first != 0).any(1)
    source, goal = first[both].double(), learned[both].double()
    gram = source.T @ source
    gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean().clamp(min=1e-12)))
    mapped: Tensor = first[~kept].double() @ torch.linalg.solve(gram, source.T @ goal)
    return mapped.float()
