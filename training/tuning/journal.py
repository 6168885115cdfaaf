"""A study on disk: what it searches, and every trial that has ended. Nothing else survives a kill, nor has to.

RUN/study.json     the data set, the start and the space, as they were when the study began
RUN/trials.json    the trials that have ended, in order
RUN/space.yaml     the space, for `--space`
RUN/automatic/     `config.yaml` of the automatic choice, where the study starts from it
RUN/trial-0007/    the training of the trial at work, with its checkpoint; removed once the trial has ended
RUN/config.yaml    the chosen settings, for `penchant train --config`
RUN/tuning.json    what `penchant tune` printed
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from features.private_files import make_folders, open_private
from training.config import TrainConfig
from training.run import RunError, read_config, write_json

FORMAT = 1
TABLE_FILE = "trials.json"
PARTS = 10
"""Parts of a training at whose ends the curves of trials are compared, whatever their epochs."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended.

    Attributes:
        number: Place in the order of trials, from 0.
        state: complete; pruned, because its curve lay below the median of the complete ones; or failed.
        settings: The values of the settings that are searched.
        value: NDCG@10 of relevance on the validation targets; None unless complete.
        encoder: The best NDCG@10 of the encoders alone; None before a validation.
        curve: The best so far of that, by the part of the training passed, 0 to `PARTS`.
        seconds: Duration of the training.
        tail_seconds: Those of them after the last validation; 0 unless complete.
        reason: The error of one that failed.
    """

    number: int
    state: Literal["complete", "pruned", "failed"]
    settings: dict[str, Any]
    value: float | None = None
    encoder: float | None = None
    curve: dict[int, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    tail_seconds: float = 0.0
    reason: str | None = None


def best_of(records: list[TrialRecord]) -> TrialRecord:
    """Returns the complete trial of the highest value; of equal ones the first, so that a start that is equal stays."""
    return max(
        (record for record in records if record.value is not None), key=lambda record: (record.value, -record.number)
    )


def read_records(out: Path) -> list[TrialRecord]:
    """Reads the trials that have ended."""
    file = out / TABLE_FILE
    if not file.exists():
        return []
    lines: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    # JSON has texts as keys.
    return [TrialRecord(**{**line, "curve": {int(at): value for at, value in line["curve"].items()}}) for line in lines]


def write_records(out: Path, records: list[TrialRecord]) -> None:
    """Writes all trials that have ended, in one step: a kill leaves the old table or the new one."""
    write_json(out / TABLE_FILE, [asdict(record) for record in records])


def read_study(out: Path) -> dict[str, Any] | None:
    """Reads `RUN/study.json`; None if no study has begun there, because its first training was refused.

    Raises:
        RunError: A newer Penchant wrote it, or `out` holds a training.
    """
    file = out / "study.json"
    if not file.is_file():
        if (out / "config.json").exists() or (out / "result.json").exists():
            raise RunError(f"{out} holds a training: give another --out")
        return None
    study: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if study.get("format") != FORMAT:
        raise RunError(f"{out} has format {study.get('format')}, this Penchant reads {FORMAT}: give another --out")
    is_begun = (out / TABLE_FILE).exists() or (trial_folder(out, 0) / "config.json").exists()
    return study if is_begun else None


def trial_folder(out: Path, number: int) -> Path:
    """Returns the directory of a trial's training."""
    return out / f"trial-{number:04d}"


def make_trial_folder(out: Path, number: int, config: TrainConfig) -> Path:
    """Makes the directory of a trial's training, which reads the data set as it was when the study began."""
    folder = trial_folder(out, number)
    if (folder / "config.json").exists():
        place = {"device": config.device, "threads": config.threads}
        if read_config(folder).model_copy(update=place) != config:
            # Another version of Optuna, or of Penchant, has proposed other settings before a kill.
            shutil.rmtree(folder)
    make_folders(folder)
    # The identity comes last: with it there, a training relies on the items.
    for name in ("items.parquet", "data.json"):
        if (out / name).exists() and not (folder / name).exists():
            draft = folder / f"{name}.draft"
            shutil.copyfile(out / name, draft)
            os.replace(draft, folder / name)
    return folder


def remove_ended(out: Path, records: list[TrialRecord]) -> None:
    """Removes the trainings of trials that have ended, also what a kill left of one."""
    for record in records:
        shutil.rmtree(trial_folder(out, record.number), ignore_errors=True)


def curve_of(log: list[Mapping[str, Any]], epochs: int) -> dict[int, float]:
    """Returns the best NDCG@10 so far by the part of the training passed, from the lines of its log."""
    curve: dict[int, float] = {}
    best = 0.0
    for line in log:
        best = max(best, line["ndcg@10"])
        # The first validation at or after the end of a part, where several fall into it.
        curve.setdefault(int(PARTS * line["epoch"] / epochs + 1e-6), best)
    return curve


def read_log(folder: Path) -> list[Mapping[str, Any]]:
    """Reads the validations of a training, those before an interruption too."""
    file = folder / "log.jsonl"
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    # A kill may have cut off the last line.
    return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keeps other processes from working on the same study.

    Raises:
        RunError: One does already.
    """
    make_folders(out)
    # The system ends the lock with the process, however that ends.
    with open_private(out / "tune.lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"another penchant tune works in {out}: wait for its end, or give another --out") from None
        yield
