"""Penchant's training and other people's, side by side: each a process, all on the same threads, taking turns.

`benchmarks/peers` says how the environments of RecTools and RecBole are made. Each of them trains twice: with its own
recommended settings, and with Penchant's width, blocks, heads, length, dropout and loss.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from benchmarks.peers.turns import Histories
from features.errors import SettingsError
from features.limits import cores
from features.tables.dataset import open_dataset
from training.config import TrainConfig
from training.train import read_material

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"


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
        return cls(config.dim, config.layers, config.heads, config.feed_forward, config.max_length, config.dropout)

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

    def end(self) -> None:
        """Ends the process, whatever it is doing, and lets go of its pipes."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a turn that it did not wait for may still lie in the pipe
            _pipe(self.process.stdin).close()
        _pipe(self.process.stdout).close()


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
        (validation NDCG@10), `ratios` {peer: {tokens_per_second, targets_per_second, seconds_to_goal,
        seconds_to_its_best}}, Penchant's figure over the peer's and the peer's seconds over Penchant's; the last of
        them to the highest NDCG@10 that this peer reached.

    Raises:
        SettingsError: A peer's environment is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        histories, settings = _histories(data, config)
        file = Path(folder) / "histories.npz"
        histories.save(file)
        ours = {"data": str(data.resolve()), "set": {**settings, "validation_users": max(1, histories.people.size)}}
        sizes = Sizes.of(config)
        asked: dict[str, tuple[Path, str, dict[str, Any]]] = {
            "penchant": (Path(sys.executable), "penchant_sasrec", ours),
            "rectools": (peers / "rectools", "rectools_sasrec", {}),
            "rectools_equal": (peers / "rectools", "rectools_sasrec", sizes.rectools()),
            "recbole": (peers / "recbole", "recbole_sasrec", {}),
            "recbole_equal": (peers / "recbole", "recbole_sasrec", sizes.recbole()),
        }
        asked = {name: one for name, one in asked.items() if not names or name in names}
        threads = config.threads or cores()
        commands = {
            name: [
                *(str(_interpreter(place, name)), "-m", f"benchmarks.peers.{module}", str(file)),
                *("--settings", json.dumps(told), "--threads", str(threads), "--validate-every", str(validate_every)),
            ]
            for name, (place, module, told) in asked.items()
        }
        trainers = [Trainer(name, _start(command, threads)) for name, command in commands.items()]
        try:
            _take_turns(trainers, budget, turn)
        finally:
            for one in trainers:
                one.end()
    return {
        **_compare({one.name: one.lines for one in trainers}),
        "settings": {name: told for name, (_, _, told) in asked.items() if name != "penchant"},
        "config": config.model_dump(),
        "people": int(histories.offsets.size - 1),
        "items": histories.items,
        "events": int(histories.rows.size),
        "validation_users": int(histories.people.size),
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
        raise SettingsError(f"no validation of {silent} within its time: give --budget more, or validate more often")
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
            "seconds_to_its_best": _to_its_best(ours, one),
        }
        for name, one in trainers.items()
        if ours is not None and name != "penchant"
    }
    return {"goal": goal, "trainers": trainers, "ratios": ratios}


def _to_its_best(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> float | None:
    """A peer's seconds to the best NDCG@10 that it reached, over ours to it; None where ours did not get there."""
    theirs = next(line["seconds"] for line in peer["curve"] if line["ndcg@10"] >= peer["best"])
    mine = next((line["seconds"] for line in ours["curve"] if line["ndcg@10"] >= peer["best"]), None)
    return None if mine is None else round(theirs / mine, 2)


def _histories(data: Path, config: TrainConfig) -> tuple[Histories, dict[str, Any]]:
    """The training part that `config` makes of a data set, and the settings that differ from the defaults."""
    material = read_material(open_dataset(data), config, torch.device("cpu"))
    events, division = material.data, material.division
    starts = events.offsets[:-1]
    kept = np.arange(events.rows.size) - np.repeat(starts, np.diff(events.offsets)) < np.repeat(
        division.train_end, np.diff(events.offsets)
    )
    targets = division.validation.sample(config.validation_users, config.seed)
    histories = Histories(
        rows=events.rows[kept].astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(division.train_end)]).astype(np.int64),
        people=targets.users,
        targets=targets.rows(events).astype(np.int64),
        items=events.items,
    )
    return histories, config.model_dump(mode="json", exclude_defaults=True, exclude={"device", "threads"})


def _interpreter(place: Path, name: str) -> Path:
    found = place if place.is_file() else place / "bin" / "python"
    if not found.exists():
        file = PEERS / f"{name.removesuffix('_equal')}.txt"
        raise SettingsError(f"{found} is missing: {file} says how to make the environment, or leave it out with --only")
    return found.absolute()  # not resolved: an environment is known by the place of its interpreter


def _start(command: Sequence[str], threads: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tempfile.gettempdir()
    )


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
