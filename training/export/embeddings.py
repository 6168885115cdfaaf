"""Writes the vectors of a run's users and items as Arrow files, for use outside of Penchant.

DIR/users.arrow   user_id, vector: each user after their newest event
DIR/items.arrow   item_id, vector

The inner product of a user's vector and an item's is the encoders' part of the item's relevance, without the linear
part. It is no cosine: the length of an item's vector counts.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from features.errors import ExportError
from features.files import sync
from features.private_files import make_folders
from training.data.clock import report_future_events
from training.data.interactions import Interactions, read_interactions
from training.data.split import Targets
from training.models.scoring import slices, user_vectors
from training.run import LoadedRun, admit_run, load_run
from training.runtime import exact, prepared

BATCH_ROWS = 1 << 14
"""Rows of a record batch: no more users are in memory at once."""
USERS, ITEMS = "users.arrow", "items.arrow"


def embeddings(run: str | Path, out: str | Path, *, data: str | Path | None = None) -> dict[str, Any]:
    """Writes the vectors of users and items of a run, float32 in Arrow files (IPC) with a column of ids.

    Args:
        run: Directory of a finished run.
        out: Directory of `users.arrow` (`user_id`, `vector`) and `items.arrow` (`item_id`, `vector`); it must not exist
            or be empty, and appears when both files are whole.
        data: The data set, if it has moved since the training.

    Returns:
        `out`, `dim`, `users`, `items`, `users_without_events` (left out, because the encoder would have nothing to
        read: all that they did was held out with cold items), `items_without_vector` (left out, because neither an
        event nor content places them), `bytes`, `future_events`, `seconds`; with the fields of
        `features.tables.intake.summary`.

    Raises:
        RunError: No finished run at `run`, or `data` is not the data set that it was trained on.
        ExportError: `out` holds something, or a vector is not a number.
        TablesError: The data set cannot be read.
    """
    began = time.monotonic()
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not an empty directory: give another --out, or delete it")
    loaded = load_run(run, data)
    left_out = admit_run(loaded)
    with prepared(loaded.config.threads), exact(), _published(out) as staging:
        items = _write_items(loaded, staging / ITEMS)
        events = read_interactions(loaded.dataset, loaded.vocabulary, loaded.config, loaded.path)
        users = _write_users(loaded, events, staging / USERS)
        size = sum(file.stat().st_size for file in staging.iterdir())
    result = {"out": str(out), "dim": loaded.config.dim, "users": users, "items": items}
    without = {"users_without_events": len(events.users) - users}
    without |= {"items_without_vector": len(loaded.vocabulary) - items}
    for name, count in without.items():
        if count:
            print(f"{name.replace('_', ' ')}: {count:,} are left out of {out}", file=sys.stderr)
    future = report_future_events(events)
    return {**result, **without, "bytes": size, **future, "seconds": round(time.monotonic() - began, 3), **left_out}


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A private directory next to `out`, which takes its name at the end, and is gone after an error."""
    make_folders(out.absolute().parent)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        sync(staging)
        # Over an empty directory too; one that has been filled meanwhile stays as it is.
        os.rename(staging, out)
        sync(out.absolute().parent)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error.strerror or error}; give another --out") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_items(loaded: LoadedRun, file: Path) -> int:
    """Writes the vectors of the items that have one; returns their number."""
    # An item of neither events nor content still has the random vector that its training began with.
    rows = np.flatnonzero(loaded.trained | bool(loaded.result["content"]))
    with _writer(file, "item_id", loaded.config.dim) as write:
        for part in slices(rows.size, BATCH_ROWS):
            write(loaded.vocabulary.ids(rows[part]), loaded.item_vectors[rows[part]])
    return int(rows.size)


def _write_users(loaded: LoadedRun, data: Interactions, file: Path) -> int:
    """Writes the vectors of the users who have events; returns their number."""
    counts = np.diff(data.offsets)
    table = torch.from_numpy(loaded.item_vectors)
    written = 0
    with _writer(file, "user_id", loaded.config.dim) as write, _progress() as progress:
        task = progress.add_task("users", total=counts.size)
        for part in slices(counts.size, BATCH_ROWS):
            numbers = np.arange(part.start, part.stop)[counts[part] > 0]
            # Before the event that comes next, whatever that is: so all of the user's events are read.
            targets = Targets(numbers, counts[numbers])
            ids = data.users[part.start : part.stop]
            vectors = user_vectors(loaded.user_encoder, table, data, targets, loaded.config.max_length)
            write([ids[number - part.start] for number in numbers.tolist()], vectors)
            written += numbers.size
            progress.advance(task, part.stop - part.start)
    return written


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


@contextmanager
def _writer(file: Path, name: str, dim: int) -> Iterator[Any]:
    """Yields a function that adds a record batch of ids and vectors float32 `[n, dim]` to a new Arrow file."""
    # No item is null, so that the vectors of a batch are one array to every reader.
    vector = pa.field("vector", pa.list_(pa.field("item", pa.float32(), nullable=False), dim), nullable=False)
    fixed_size_lists: Any = pa.FixedSizeListArray.from_arrays
    schema = pa.schema([pa.field(name, pa.string(), nullable=False), vector])

    def write(ids: list[str], vectors: npt.NDArray[np.float32]) -> None:
        if not np.isfinite(vectors).all():
            raise ExportError(f"vectors of {name} hold NaN or infinity; the training went wrong, train again")
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        lists = fixed_size_lists(flat, type=vector.type)
        writer.write_batch(pa.record_batch([pa.array(ids, pa.string()), lists], schema=schema))

    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        yield write
    sync(file)
