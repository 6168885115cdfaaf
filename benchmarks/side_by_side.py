"""Penchant's training and those of other libraries, side by side: processes that alternate on the same threads.

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

from benchmarks.peers.trainer_clock import SharedHistories
from features.errors import SettingsError
from features.limits import cores
from features.tables.dataset import open_dataset
from training.config import TrainConfig
from training.train import read_material

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers"


@dataclass(frozen=True)
class Sizes:
    """The sizes that `equal` trainers share with Penchant's configuration."""

    dim: int
    layers: int
    heads: int
    feed_forward: int
    length: int
    dropout: float

    @classmethod
    def of(cls, config: TrainConfig) -> Sizes:
        """Returns the sizes of a configuration."""
        return cls(config.dim, config.layers, config.heads, config.feed_forward, config.max_length, config.dropout)

    def rectools(self) -> dict[str, Any]:
        """Returns arguments of `SASRecModel`, whose feed-forward part is always as wide as its vectors."""
        return {
            "n_factors": self.dim,
            "n_blocks": self.layers,
            "n_heads": self.heads,
            "session_max_len": self.length,
            "dropout_rate": self.dropout,
            "loss": "softmax",
        }

    def recbole(self) -> dict[str, Any]:
        """Returns RecBole's settings."""
        return {
            "hidden_size": self.dim,
            "inner_size": self.feed_forward,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "MAX_ITEM_LIST_LENGTH": self.length,
            "hidden_dropout_prob": self.dropout,
            "attn_dropout_prob": self.dropout,
            "loss_type": "CE",
            # At length 200 its batches of 2,048 would need ten gigabytes for attention.
            "train_batch_size": max(64, 2048 * 50 // self.length),
        }


@dataclass
class Trainer:
    """One of the alternating processes; `lines` are its validations."""

    name: str
    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def run_for(self, seconds: float) -> bool:
        """Lets the process train for about `seconds`, or finish if 0; returns False if it is over.

        Raises:
            RuntimeError: It failed.
        """
        stdin, stdout = _pipe(self.process.stdin), _pipe(self.process.stdout)
        try:
            stdin.write(f"{seconds or ''}\n")
            stdin.flush()
        except BrokenPipeError:
            pass  # it ended by itself; its last validations are still in the other pipe
        for text in stdout:
            line = json.loads(text)
            if "paused" in line:
                return True
            self.lines.append(line)
            print(f"{self.name}: {text}", end="", file=sys.stderr, flush=True)
        if self.process.wait():
            raise RuntimeError(f"{self.name} failed with status {self.process.returncode}; see its messages above")
        return False

    def end(self) -> None:
        """Ends the process, whatever it is doing, and closes its pipes."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # a time slice that it did not read may still be in the pipe
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
    """Trains side by side, in time slices, until every trainer has had `budget` seconds or has come to its own end.

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
        own_settings = {**settings, "validation_users": max(1, histories.validated.size)}
        specs = _specs(peers, {"data": str(data.resolve()), "set": own_settings}, Sizes.of(config))
        specs = {name: spec for name, spec in specs.items() if not names or name in names}
        threads = config.threads or cores()
        options = ("--threads", str(threads), "--validate-every", str(validate_every))
        commands = {name: [*spec.command(file), *options] for name, spec in specs.items()}
        trainers = [Trainer(name, _start(command, threads)) for name, command in commands.items()]
        try:
            _alternate(trainers, budget, turn)
        finally:
            for trainer in trainers:
                trainer.end()
    return {
        **_compare({trainer.name: trainer.lines for trainer in trainers}),
        "settings": {name: spec.settings for name, spec in specs.items() if name != "penchant"},
        "config": config.model_dump(),
        **_sizes_of(histories),
        "budget_seconds": budget,
        "turn_seconds": turn,
        "method": _METHOD,
    }


_METHOD = (
    "each trainer is a process with the same threads; they alternate, and a clock stands still while others train; "
    "set-up is on the clock, the peers' validations are not, Penchant's are"
)


def _sizes_of(histories: SharedHistories) -> dict[str, int]:
    return {
        "users": int(histories.offsets.size - 1),
        "items": histories.items,
        "events": int(histories.rows.size),
        "validation_users": int(histories.validated.size),
    }


@dataclass(frozen=True)
class _Spec:
    """A trainer's interpreter (or the environment that holds it), its module in `benchmarks.peers`, its settings."""

    name: str
    place: Path
    module: str
    settings: dict[str, Any]

    def command(self, data: Path) -> list[str]:
        """Returns the command that trains on the histories in a file.

        Raises:
            SettingsError: The interpreter is missing.
        """
        interpreter = str(_interpreter(self.place, self.name))
        return [
            interpreter,
            "-m",
            f"benchmarks.peers.{self.module}",
            str(data),
            "--settings",
            json.dumps(self.settings),
        ]


def _specs(peers: Path, own_settings: dict[str, Any], sizes: Sizes) -> dict[str, _Spec]:
    rectools, recbole = peers / "rectools", peers / "recbole"
    specs = (
        _Spec("penchant", Path(sys.executable), "penchant_sasrec", own_settings),
        _Spec("rectools", rectools, "rectools_sasrec", {}),
        _Spec("rectools_equal", rectools, "rectools_sasrec", sizes.rectools()),
        _Spec("recbole", recbole, "recbole_sasrec", {}),
        _Spec("recbole_equal", recbole, "recbole_sasrec", sizes.recbole()),
    )
    return {spec.name: spec for spec in specs}


def _alternate(trainers: Sequence[Trainer], budget: float, seconds: float) -> None:
    # Slices of seconds, so that a slow moment of the machine hits all trainers alike.
    running, spent = list(trainers), 0.0
    while running and spent < budget:
        running = [trainer for trainer in running if trainer.run_for(min(seconds, budget - spent))]
        spent += seconds
    # Zero seconds let each print its last validation.
    for trainer in running:
        trainer.run_for(0)


def _compare(curves: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Returns rates, and seconds to the highest validation NDCG@10 that every curve reaches."""
    if any(not lines for lines in curves.values()):
        silent = ", ".join(name for name, lines in curves.items() if not lines)
        raise SettingsError(f"no validation of {silent} within its time: give --budget more, or validate more often")
    # The highest quality that every trainer reached, so that each has a time to it.
    goal = min(max(line["ndcg@10"] for line in lines) for lines in curves.values())
    trainers: dict[str, dict[str, Any]] = {}
    for name, lines in curves.items():
        # Rates are those of the steady state: set-up reads and compiles, and is told apart.
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
    penchant = trainers.get("penchant")
    ratios = {
        name: {
            "tokens_per_second": round(penchant["tokens_per_second"] / peer["tokens_per_second"], 2),
            "targets_per_second": round(penchant["targets_per_second"] / peer["targets_per_second"], 2),
            "seconds_to_goal": round(peer["seconds_to_goal"] / penchant["seconds_to_goal"], 2),
            "seconds_to_its_best": _to_its_best(penchant, peer),
        }
        for name, peer in trainers.items()
        if penchant is not None and name != "penchant"
    }
    return {"goal": goal, "trainers": trainers, "ratios": ratios}


def _to_its_best(penchant: Mapping[str, Any], peer: Mapping[str, Any]) -> float | None:
    """Returns a peer's seconds to its best NDCG@10 over Penchant's to the same; None if Penchant did not reach it."""
    peer_seconds = next(line["seconds"] for line in peer["curve"] if line["ndcg@10"] >= peer["best"])
    seconds = next((line["seconds"] for line in penchant["curve"] if line["ndcg@10"] >= peer["best"]), None)
    return None if seconds is None else round(peer_seconds / seconds, 2)


def _histories(data: Path, config: TrainConfig) -> tuple[SharedHistories, dict[str, Any]]:
    """Returns the training part that `config` makes of a data set, and the settings that differ from the defaults."""
    material = read_material(open_dataset(data), config, torch.device("cpu"))
    events, division = material.data, material.division
    starts = events.offsets[:-1]
    kept = np.arange(events.rows.size) - np.repeat(starts, np.diff(events.offsets)) < np.repeat(
        division.train_end, np.diff(events.offsets)
    )
    # The same users validate all trainers.
    targets = division.validation.sample(config.validation_users, config.seed)
    histories = SharedHistories(
        rows=events.rows[kept].astype(np.int64),
        offsets=np.concatenate([[0], np.cumsum(division.train_end)]).astype(np.int64),
        validated=targets.users,
        targets=targets.rows(events).astype(np.int64),
        items=events.items,
    )
    return histories, config.model_dump(mode="json", exclude_defaults=True, exclude={"device", "threads"})


def _interpreter(place: Path, name: str) -> Path:
    path = place if place.is_file() else place / "bin" / "python"
    if not path.exists():
        file = PEERS / f"{name.removesuffix('_equal')}.txt"
        raise SettingsError(f"{path} is missing: {file} says how to make the environment, or leave it out with --only")
    return path.absolute()  # not resolved: an environment is known by the place of its interpreter


def _start(command: Sequence[str], threads: int) -> subprocess.Popen[str]:
    # Peers live in environments of their own, and import the shared clock from this repository.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tempfile.gettempdir()
    )


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
