"""Options that several commands share, and the form in which every command answers."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from features.limits import cores

DataDir = Annotated[Path, typer.Argument(metavar="DATA", exists=True, file_okay=False, help="Data set directory.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="Training run directory.")]
BundleDir = Annotated[Path, typer.Argument(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle directory.")]
MovedData = Annotated[
    Path | None,
    typer.Option(metavar="DATA", exists=True, file_okay=False, help="Data set, if it has moved since the training."),
]
SourceFile = Annotated[
    Path | None,
    typer.Option("--from", metavar="PATH", exists=True, help="The publisher's archive, or its tidy Parquet."),
]
TrainConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML file of settings, or the name of one that comes along: movielens."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A single setting, over those of the file; repeatable."),
]
ServeConfigFile = Annotated[
    Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="YAML file of settings.")
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="Where the models run; auto takes a GPU where one works."),
]
UsersFile = Annotated[
    Path,
    typer.Option(
        metavar="FILE", exists=True, help="Users: one id a line, or user_id in CSV, TSV, JSON (lines) or Parquet."
    ),
]

EmbeddedRedis = Annotated[
    str,
    typer.Option(metavar="embedded|URL", help="Redis of the profiles: its URL, or one started for this command."),
]
RedisUrl = Annotated[str, typer.Option("--redis", metavar="URL", help="Redis of the profiles.")]
EventsRedis = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Redis of the event log, if it is another than that of the profiles."),
]
Partitions = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Partitions of a new event log; of an existing one as it has."),
]
StateDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where an embedded Redis keeps its data.")]
MetricsListen = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Address of the metrics, for Prometheus; none without.")
]
LogFormat = Annotated[
    Literal["text", "json"] | None,
    typer.Option(metavar="text|json", help="Format of the log's lines on standard error."),
]


def use_cores(count: int | None = None) -> None:
    """Sets the number of threads before a numeric library reads it; what the environment sets already stands.

    Args:
        count: Threads of each library; None: every core that this process may use.
    """
    # Threads that spin while they wait take the cores of everything else, so they must sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # ONNX Runtime reports to its maker unless this is set before it is loaded.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        # By default a library counts the cores of the machine, of which a container may have a few only.
        os.environ.setdefault(name, str(count or cores()))


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """Returns `KEY=VALUE` texts as names and values, the values read as YAML."""
    import yaml

    pairs = [text.partition("=") for text in settings]
    for name, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"{name!r} is not a setting: write KEY=VALUE")
    # As YAML, like the files of settings, so that a value means the same in both.
    try:
        return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"a value is not YAML: {' '.join(str(error).split())}") from None


def print_ready(state: Mapping[str, Any], metrics: str | None) -> None:
    """Prints that a process is ready, and the address of its metrics."""
    print_result({**state, "metrics": metrics} if metrics else state)


def print_result(result: Mapping[str, Any]) -> None:
    """Prints the result as one line of JSON, the last of stdout."""
    # Progress on a terminal that both streams share must not end up below the result.
    sys.stderr.flush()
    text = json.dumps(_json_value(result), ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal without these letters, or a file's name that is no text
        text = json.dumps(_json_value(result), allow_nan=False)
    print(text, flush=True)


def _json_value(value: Any) -> Any:
    """Returns a value in JSON's own types; a number that JSON does not have becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    if hasattr(value, "tolist"):  # numpy, which is not imported for this
        return _json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
