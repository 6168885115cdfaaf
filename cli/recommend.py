"""The command that answers many users at once, by a service's stores or by a data set: recommend."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import EventsRedis, ServeConfigFile, Settings, StateDir, print_result, use_cores

commands = typer.Typer()

_BatchRedis = Annotated[
    str | None,
    typer.Option(
        metavar="embedded|URL",
        help="Redis of the profiles: its URL, or one started on the data of a service that is stopped.",
    ),
]
_AnsweringBundle = Annotated[
    Path,
    typer.Argument(
        metavar="BUNDLE", exists=True, file_okay=False, help="Bundle directory; with --data a training run too."
    ),
]
_FileOfUsers = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", exists=True, help="Users: one id a line, or user_id in CSV, TSV, JSON (lines) or Parquet."
    ),
]
_HistoriesOf = Annotated[
    Path | None,
    typer.Option(
        metavar="DATA",
        exists=True,
        file_okay=False,
        help="Data set whose histories to answer from, without a service; the answers are printed.",
    ),
]

_Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Parquet file to write, unless --data is given.")]
_User = Annotated[list[str] | None, typer.Option(metavar="ID", help="With --data, a user to answer; repeat for more.")]
_Items = Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Items for each user.")]
_Channel = Annotated[str, typer.Option(metavar="NAME", help="Channel that the slates are logged with: email, push.")]
_Surface = Annotated[str, typer.Option(metavar="NAME", help="Surface that is asked for and logged.")]
_Log = Annotated[
    bool, typer.Option("--log/--no-log", help="Log the slates as impressions; without, they cannot be measured.")
]
_Fields = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="Field of the items to write too: title. Repeat for more.")
]


@commands.command()
def recommend(
    bundle: _AnsweringBundle,
    users: _FileOfUsers = None,
    out: _Output = None,
    data: _HistoriesOf = None,
    user: _User = None,
    config: ServeConfigFile = None,
    redis: _BatchRedis = None,
    events_redis: EventsRedis = None,
    state_dir: StateDir = None,
    items: _Items = 20,
    channel: _Channel = "batch",
    surface: _Surface = "",
    log: _Log = True,
    field: _Fields = None,
    settings: Settings = None,
) -> None:
    """Answers many users at once as the service would, for e-mail and other channels, and logs the slates.

    With --data it needs no service and no Redis: it prints the answers by the histories of a data set, and logs none.
    """
    use_cores(1)
    options = {"bundle": bundle, "redis": redis, "events_redis": events_redis, "state_dir": state_dir}
    if data is not None:
        if out is not None:
            raise typer.BadParameter("the answers by --data are printed: leave out --out", param_hint="--out")
        print_result(_by_data(options, config, settings, data, users, user or [], items, surface, field or ()))
        return
    # Refused and not ignored: without --data, users come from a file, and a name given here would have no answer.
    if user:
        raise typer.BadParameter("needs --data; without, name users in a file as --users", param_hint="--user")
    if users is None or out is None:
        name = "--users" if users is None else "--out"
        raise typer.BadParameter("is needed, unless --data prints the answers", param_hint=name)
    from serving.config import ServeConfig
    from serving.jobs.batch import recommend

    loaded = ServeConfig.load(config, settings or [], **options)
    print_result(recommend(loaded, users, out, items, channel=channel, surface=surface, log=log, fields=field or ()))


def _by_data(
    options: dict[str, Any],
    config: Path | None,
    settings: list[str] | None,
    data: Path,
    file: Path | None,
    names: list[str],
    items: int,
    surface: str,
    fields: Sequence[str],
) -> dict[str, Any]:
    """Answers users by the histories of a data set; prints a line of each before the result."""
    from features.tables.user_ids import read_users
    from serving.config import ServeConfig
    from serving.jobs.from_data import recommend_from_data

    if file is not None:
        listed = read_users(file)
        listed.tell()
        names = [*names, *listed.ids]
    with _bundle_of(options["bundle"]) as bundle:
        loaded = ServeConfig.load(config, settings or [], **{**options, "bundle": bundle})
        result = recommend_from_data(loaded, data, names, items, surface=surface, fields=fields)
    for row in result["answers"]:
        pairs = zip(row["item_ids"], row["scores"], strict=True)
        print(f"{row['user_id']} ({row['rung']}): {', '.join(f'{item} {score:.3f}' for item, score in pairs)}")
    return result


@contextlib.contextmanager
def _bundle_of(folder: Path) -> Iterator[Path]:
    """Yields a bundle: the folder itself, or one that is made of the training run in it, and removed."""
    if not (folder / "result.json").is_file():
        yield folder
        return
    from training.export.export import export

    with tempfile.TemporaryDirectory() as exported:
        export(folder, Path(exported) / "bundle")
        yield Path(exported) / "bundle"
