"""Training: how fast beside other trainers, how good, how well it places new items, how near the machine's arithmetic.

speed       Penchant, RecTools and RecBole take turns on the same two threads, data and validation targets; real tokens
            a second, and seconds to the highest validation NDCG@10 that all of them reach within their time
quality     several seeds of one configuration, measured by `training.evaluate`
cold        the same with a share of the items hidden, measured by its protocol `cold-items`
arithmetic  floating point operations of the model a second, over those of the machine's own matrix products
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from benchmarks.peers.turns import Histories
from benchmarks.report import facts
from features.errors import ConfigError
from features.tables import open_dataset
from training.config import TrainConfig, load_config
from training.evaluate import evaluate
from training.machine import exact, prepared
from training.train import read_material, train

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"
PRODUCT_SIZE = 2048
PRODUCT_ROUNDS = 12


@dataclass(frozen=True)
class Sizes:
    """What `equal` trainers share with Penchant's configuration."""

    dim: int
    layers: int
    heads: int
    feed_forward: int
    length: int
    dropout: float

    @classmethod
    def of(cls, config: TrainConfig) -> Sizes:
        """The sizes of a configuration."""
        return cls(
            config.dim, config.layers, config.heads, config.feed_forward, config.max_length, config.dropout
        )

    def rectools(self) -> dict[str, Any]:
        """As arguments of `SASRecModel`; its feed-forward part is as wide as its vectors, whatever one asks."""
        return {
            "n_factors": self.dim,
            "n_blocks": self.layers,
            "n_heads": self.heads,
            "session_max_len": self.length,
            "dropout_rate": self.dropout,
            "loss": "softmax",
        }

    def recbole(self) -> dict[str, Any]:
        """As RecBole's settings; at length 200 its batches of 2,048 would need ten gigabytes for attention."""
        return {
            "hidden_size": self.dim,
            "inner_size": self.feed_forward,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "MAX_ITEM_LIST_LENGTH": self.length,
            "hidden_dropout_prob": self.dropout,
            "attn_dropout_prob": self.dropout,
            "loss_type": "CE",
            "train_batch_size": max(64, 2048 * 50 // self.length),
        }


@dataclass
class Trainer:
    """One process that takes turns; `lines` are its validations."""

    name: str
    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def turn(self, seconds: float) -> bool:
        """Lets it train for about `seconds`, or to its end if 0; False when it is over.

        Raises:
            RuntimeError: It failed.
        """
        said, heard = _pipe(self.process.stdin), _pipe(self.process.stdout)
        try:
            said.write(f"{seconds or ''}\n")
            said.flush()
        except BrokenPipeError:
            pass  # it ended by itself; what it said is still to be read
        for text in heard:
            line = json.loads(text)
            if "paused" in line:
                return True
            self.lines.append(line)
            print(f"{self.name}: {text}", end="", file=sys.stderr, flush=True)
        if self.process.wait():
            raise RuntimeError(f"{self.name} failed with status {self.process.returncode}; what it said stands above")
        return False


def speed(
    data: Path,
    config: TrainConfig,
    peers: Path,
    budget: float,
    turn: float,
    validate_every: float,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains side by side, by turns, until everybody has had `budget` seconds or has come to its own end.

    Returns:
        `trainers` {name: {tokens_per_second, targets_per_second, seconds_to_goal, best, setup_seconds, curve}}, `goal`
        (validation NDCG@10), `ratios` {peer: {tokens_per_second, seconds_to_goal}}, Penchant's figure over the peer's
        and the peer's seconds over Penchant's.

    Raises:
        ConfigError: A peer's environment is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        histories, settings = _histories(data, config)
        file = Path(folder) / "histories.npz"
        histories.save(file)
        ours = {"data": str(data.resolve()), "set": {**settings, "validation_people": max(1, histories.people.size)}}
        sizes = Sizes.of(config)
        asked: dict[str, tuple[Path, str, dict[str, Any]]] = {
            "penchant": (Path(sys.executable), "penchant_sasrec", ours),
            "rectools": (peers / "rectools", "rectools_sasrec", {}),
            "rectools_equal": (peers / "rectools", "rectools_sasrec", sizes.rectools()),
            "recbole": (peers / "recbole", "recbole_sasrec", {}),
            "recbole_equal": (peers / "recbole", "recbole_sasrec", sizes.recbole()),
        }
        asked = {name: one for name, one in asked.items() if not names or name in names}
        threads = config.threads or len(os.sched_getaffinity(0))
        commands = {
            name: [str(_interpreter(place, name)), "-m", f"benchmarks.peers.{module}", str(file)]
            + ["--settings", json.dumps(told), "--threads", str(threads), "--validate-every", str(validate_every)]
            for name, (place, module, told) in asked.items()
        }
        trainers = [Trainer(name, _start(command, threads)) for name, command in commands.items()]
        try:
            _take_turns(trainers, budget, turn)
        finally:
            for one in trainers:
                one.process.kill()
                one.process.wait()
    return {
        **_compare({one.name: one.lines for one in trainers}),
        "settings": {name: told for name, (_, _, told) in asked.items() if name != "penchant"},
        "config": config.model_dump(),
        "people": int(histories.offsets.size - 1),
        "items": histories.items,
        "events": int(histories.rows.size),
        "validation_people": int(histories.people.size),
        "budget_seconds": budget,
        "turn_seconds": turn,
        "method": "each trainer is a process with the same threads; they take turns, and a clock stands still while "
        "others train; set-up is on the clock, the peers' validations are not, Penchant's are",
    }


def _take_turns(trainers: Sequence[Trainer], budget: float, turn: float) -> None:
    going, spent = list(trainers), 0.0
    while going and spent < budget:
        going = [one for one in going if one.turn(min(turn, budget - spent))]
        spent += turn
    for one in going:
        one.turn(0)


def _compare(curves: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rates, and seconds to the highest validation NDCG@10 that every curve reaches."""
    if any(not lines for lines in curves.values()):
        silent = ", ".join(name for name, lines in curves.items() if not lines)
        raise ConfigError(f"no validation of {silent} within its time: give --budget more, or validate more often")
    goal = min(max(line["ndcg@10"] for line in lines) for lines in curves.values())
    trainers: dict[str, dict[str, Any]] = {}
    for name, lines in curves.items():
        last, steady = lines[-1], lines[-1]["seconds"] - lines[-1]["setup_seconds"]
        trainers[name] = {
            "tokens_per_second": round(last["tokens"] / steady, 1),
            "targets_per_second": round(last["targets"] / steady, 1),
            "seconds_to_goal": next(line["seconds"] for line in lines if line["ndcg@10"] >= goal),
            "best": max(line["ndcg@10"] for line in lines),
            "setup_seconds": last["setup_seconds"],
            "seconds": last["seconds"],
            "curve": lines,
        }
    ours = trainers.get("penchant")
    ratios = {
        name: {
            "tokens_per_second": round(ours["tokens_per_second"] / one["tokens_per_second"], 2),
            "targets_per_second": round(ours["targets_per_second"] / one["targets_per_second"], 2),
            "seconds_to_goal": round(one["seconds_to_goal"] / ours["seconds_to_goal"], 2),
        }
        for name, one in trainers.items()
        if ours is not None and name != "penchant"
    }
    return {"goal": goal, "trainers": trainers, "ratios": ratios}


def _histories(data: Path, config: TrainConfig) -> tuple[Histories, dict[str, Any]]:
    """The training part that `config` makes of a data set, and the settings that differ from the defaults."""
    material = read_material(open_dataset(data), config, torch.device("cpu"))
    events, division = material.data, material.division
    starts = events.offsets[:-1]
    kept = np.arange(events.rows.size) - np.repeat(starts, np.diff(events.offsets)) < np.repeat(
        division.train_end, np.diff(events.offsets)
    )
    targets = division.validation.sample(config.validation_people, config.seed)
    histories = Histories(
        rows=events.rows[kept].astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(division.train_end)]).astype(np.int64),
        people=targets.people,
        targets=targets.rows(events).astype(np.int64),
        items=events.items,
    )
    defaults = TrainConfig().model_dump()
    changed = {name: value for name, value in json.loads(config.model_dump_json()).items() if value != defaults[name]}
    return histories, {name: value for name, value in changed.items() if name not in ("device", "threads")}


def _interpreter(place: Path, name: str) -> Path:
    found = place if place.is_file() else place / "bin" / "python"
    if not found.exists():
        file = PEERS / f"{name.removesuffix('_equal')}.txt"
        raise ConfigError(f"{found} is missing: {file} says how to make the environment, or leave it out with --only")
    return found


def _start(command: Sequence[str], threads: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tempfile.gettempdir()
    )


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def quality(data: Path, config: TrainConfig, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Trains each seed into `OUT/seed-N` (a finished one stands) and measures them together on the test part."""
    runs = _runs(data, config, seeds, out)
    protocol = {"leave-one-out": "leave-one-out", "temporal": "temporal-successive"}.get(config.protocol)
    if protocol is None:
        raise ConfigError("protocol is none, so nothing is held out to measure: take a configuration that holds out")
    return {**evaluate(runs, protocol, data), "training": _trained(runs), "config": config.model_dump()}


def cold(data: Path, config: TrainConfig, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """The same with a tenth of the items hidden (unless the configuration says how many), measured as `cold-items`."""
    config = config if config.hide_items else config.model_copy(update={"hide_items": 0.1})
    runs = _runs(data, config, seeds, out)
    return {**evaluate(runs, "cold-items", data), "training": _trained(runs), "config": config.model_dump()}


def _runs(data: Path, config: TrainConfig, seeds: Sequence[int], out: Path) -> list[Path]:
    runs = []
    for seed in seeds:
        run, wanted = out / f"seed-{seed}", config.model_copy(update={"seed": seed})
        if (run / "result.json").exists():
            if TrainConfig.model_validate_json((run / "config.json").read_text()) != wanted:
                raise ConfigError(f"{run} was trained with another configuration: give another --out, or delete it")
        else:
            train(data, run, wanted)
        runs.append(run)
    return runs


def _trained(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """What each training cost."""
    results = [json.loads((run / "result.json").read_text()) for run in runs]
    names = ("seconds", "tokens_per_second", "epochs", "best_validation", "parameters")
    return [{name: result[name] for name in names} for result in results]


def arithmetic(data: Path, config: TrainConfig, budget: float) -> dict[str, Any]:
    """The model's operations a second over `budget` seconds of training, beside the machine's matrix products.

    Counted are two operations per weight of every linear map of the user encoder and per element of the scores of
    attention (twice: scores and mixture) and of the softmax over all items, three times over for the gradients; nothing
    for content, norms or the optimizer.
    """
    with prepared(config.threads):
        before = _products()
    seconds, tokens, per_token = _train_for(data, config, budget)
    with prepared(config.threads):
        after = _products()
    achieved = tokens / seconds * per_token["total"]
    products = {name: max(before[name], after[name]) for name in before}
    return {
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds": round(seconds, 1),
        "flops_per_token": per_token,
        "achieved_gflops": round(achieved / 1e9, 2),
        "product_gflops": {name: round(rate / 1e9, 2) for name, rate in products.items()},
        "share": {name: round(achieved / rate, 4) for name, rate in products.items()},
        "config": config.model_dump(),
        "method": f"products of {PRODUCT_SIZE} x {PRODUCT_SIZE}, the better of before and after; `narrow` is bf16 of "
        "4,096 tokens by the vectors of all items, the largest product of a step",
    }


def _train_for(data: Path, config: TrainConfig, budget: float) -> tuple[float, int, dict[str, float]]:
    """Steady seconds, tokens of them, and operations per token."""
    material = read_material(open_dataset(data), config, config.resolved_device())
    begun: list[tuple[float, int]] = []

    class _EnoughError(Exception):
        pass

    from training.data import TrainingBatches
    from training.run import build_modules

    batches = TrainingBatches(material.data, material.division.train_end, config, torch.device("cpu"))
    plan = batches.epoch(0)
    sizes = [sum(end - start - 1 for start, end in windows) for windows in plan]
    lengths = np.array([end - start - 1 for windows in plan for start, end in windows], np.float64)
    modules = build_modules(config, material.data.items, len(material.data.event_types), len(material.actions), False)
    warm = min(20, len(sizes) // 4)

    def on_step(step: int) -> None:
        if step == warm:
            begun.append((time.monotonic(), step))
        elif step > warm and (time.monotonic() - begun[0][0] >= budget or step >= len(sizes)):
            begun.append((time.monotonic(), step))
            raise _EnoughError

    with tempfile.TemporaryDirectory() as folder:
        long = config.model_copy(update={"validate_every": 1e6, "checkpoint_seconds": 1e6})
        try:
            train(data, Path(folder) / "run", long, on_step)
        except _EnoughError:
            pass
    linear = sum(one.weight.numel() for one in modules.user.modules() if isinstance(one, nn.Linear))
    attended = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    parts = {
        "linear": 2.0 * linear,
        "attention": 4.0 * attended * config.dim * config.layers,
        "softmax": 2.0 * config.dim * (config.negatives or material.data.items),
    }
    (first, low), (last, high) = begun
    return last - first, sum(sizes[low:high]), {**parts, "total": 3 * sum(parts.values())}


def _products() -> dict[str, float]:
    """Operations a second of matrix products, the median of a few."""
    size = PRODUCT_SIZE
    square, narrow = torch.randn(size, size), torch.randn(4096, 64)
    rates = {}
    with exact():
        rates["float32"] = _rate(square, square)
    rates["bfloat16"] = _rate(square.bfloat16(), square.bfloat16())
    rates["narrow"] = _rate(narrow.bfloat16(), torch.randn(64, size * 2).bfloat16())
    return rates


def _rate(left: torch.Tensor, right: torch.Tensor) -> float:
    out, seconds = torch.empty(left.shape[0], right.shape[1], dtype=left.dtype), []
    for _ in range(PRODUCT_ROUNDS):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - began)
    return 2.0 * left.shape[0] * left.shape[1] * right.shape[1] / float(np.median(seconds))


def training(part: str, data: Path, config: TrainConfig, **options: Any) -> dict[str, Any]:
    """One part of the benchmark, with its circumstances.

    Args:
        part: `speed`, `quality`, `cold` or `arithmetic`.
        data: Directory of the canonical tables.
        config: How Penchant trains.
        options: What the part takes beyond these.
    """
    parts = {"speed": speed, "quality": quality, "cold": cold, "arithmetic": arithmetic}
    return {"part": part, **parts[part](data, config, **options), **facts()}


__all__ = ["arithmetic", "cold", "load_config", "quality", "speed", "training"]
