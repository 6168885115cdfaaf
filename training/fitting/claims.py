"""Claims the directory of a run, so that no other training writes there, and gives it back if the data is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from features.errors import PenchantError
from features.private_files import make_folders
from features.tables.dataset import Dataset
from training.config import TrainConfig
from training.fitting.start import EarlierRun
from training.run import RunError, identity_of, read_config, write_items, write_json

_CLAIMS = ("config.json", "config.yaml", "data.json", "items.parquet")


@contextmanager
def claimed(out: Path, config: TrainConfig, dataset: Dataset, earlier: EarlierRun | None = None) -> Iterator[None]:
    """Claims `out` for a run, see `claim`; if what follows refuses the data, a run that is new leaves nothing there."""
    # Only what this call has written is removed: an unfinished run of the same name keeps its claim.
    is_new = not (out / "config.json").exists()
    claim(out, config, dataset, earlier)
    try:
        yield
    except PenchantError:
        if is_new:
            for name in _CLAIMS:
                (out / name).unlink(missing_ok=True)
            with suppress(OSError):  # it holds what was there before
                out.rmdir()
        raise


def claim(out: Path, config: TrainConfig, dataset: Dataset, earlier: EarlierRun | None = None) -> None:
    """Claims `out` for this run, or checks that it is already this run's."""
    make_folders(out)
    if (out / "result.json").exists():
        raise RunError(f"{out} holds a finished run: give another --out, or delete it")
    described = json.loads(config.model_dump_json())
    started = out / "config.json"
    identity = out / "data.json"
    moment = identity_of(dataset) | ({} if earlier is None else {"start": earlier.sha256})
    if started.exists() and identity.exists():
        # The device and the number of threads may differ: a checkpoint moves between devices.
        place = {"device": config.device, "threads": config.threads}
        is_same_config = read_config(out).model_copy(update=place) == config
        begun = json.loads(identity.read_text(encoding="utf-8"))
        if not is_same_config or begun != moment:
            is_same_start = begun.get("start") == moment.get("start")
            difference = "configuration" if not is_same_config else "data set" if is_same_start else "start (--from)"
            raise RunError(f"{out} holds an unfinished run with another {difference}: give another --out, or delete it")
    if "until" in moment:
        write_items(out, dataset.items)
    write_json(started, described)
    write_json(identity, moment)
