"""Commands from data to a bundle: data, validate, features, train, tune, evaluate, embeddings, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.options import (
    DataDir,
    Device,
    MovedData,
    RunDir,
    Settings,
    SourceFile,
    TrainConfigFile,
    parse_settings,
    print_result,
    use_cores,
)

commands = typer.Typer()

_ValidateBundle = Annotated[
    Path | None,
    typer.Option(
        metavar="BUNDLE",
        exists=True,
        file_okay=False,
        help="With --live, the bundle that names the items; with a warehouse, the one whose inputs to replay.",
    ),
]


# Each command imports its own modules after `use_cores`: a numeric library reads its number of threads once, when it
# is loaded, and training may use every core.
@commands.command()
def data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a known data set; an unknown one lists them.")],
    out: Annotated[Path, typer.Option(metavar="DATA", help="Directory to write.")],
    source: SourceFile = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of that data set; an unknown one lists them; repeatable."
        ),
    ] = None,
) -> None:
    """Converts a known data set to the canonical tables."""
    use_cores()
    from training.data.datasets import prepare

    print_result(prepare(name, source, out, **parse_settings(options or [])))


@commands.command()
def validate(
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", exists=True, file_okay=False, help="Data set directory.")
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Redis of the event log of a running service, instead of a data set."),
    ] = None,
    bundle: _ValidateBundle = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK=SHARE", help="Share of rows, 0 to 1, that a check lets pass; repeatable."),
    ] = None,
) -> None:
    """Checks a data set, or what a running service logs.

    A check that fails says what to correct. The status is 1 if one fails, or if there was nothing to check.
    """
    use_cores()
    if (data is None) == (live is None):
        raise typer.BadParameter("give either DATA or --live URL", param_hint="DATA")
    limits = parse_settings(allow or [])
    # To Python, `true` is the number 1.
    numbers = {name for name, share in limits.items() if isinstance(share, int | float) and not isinstance(share, bool)}
    if wrong := sorted(limits.keys() - numbers):
        raise typer.BadParameter(f"{wrong[0]} needs a number: write CHECK=SHARE", param_hint="--allow")
    if data is not None:
        report = _validate_data(data, bundle, limits)
    else:
        from serving.jobs.live_checks import validate_live

        # Certain by the test above, which the type checker cannot follow over two variables.
        assert live is not None
        report = validate_live(live, bundle, limits)
    # Printed whatever the outcome: a script reads the last line, whether the checks pass or not.
    _print_checks(report)
    print_result(report)
    raise typer.Exit(0 if report["passed"] else 1)


def _validate_data(data: Path, bundle: Path | None, limits: dict[str, float]) -> dict[str, Any]:
    """Checks a data set; with a bundle also that its logged features are those that a replay computes."""
    from features.tables.validate import validate

    # This limit is the replay's; the checks of a data set would refuse the name.
    allowed = limits.pop("served_features", None) if bundle else None
    report: dict[str, Any] = validate(data, limits)
    if bundle is not None:
        from serving.jobs.skew import ALLOWED, replay

        check = replay(data, bundle, ALLOWED if allowed is None else allowed)
        if check["slates"]:
            report["checks"].append(check)
        else:
            report["skipped"][check["name"]] = "no slate of this bundle was logged with its features (log_features)"
    return report


def _print_checks(report: dict[str, Any]) -> None:
    """Prints a line for each check, and adds to the report whether all of them passed."""
    for check in report["checks"]:
        print(f"{'PASS' if check['passed'] else 'FAIL'}  {check['name']}: {check['detail']}")
    for name, reason in report["skipped"].items():
        print(f"SKIP  {name}: {reason}")
    # A check of nothing proves nothing, so it does not pass.
    report["passed"] = bool(report["checks"]) and all(check["passed"] for check in report["checks"])
    if not report["checks"]:
        print("FAIL  nothing was checked: a data set or a log needs events")


@commands.command()
def features(
    data: Annotated[
        Path | None, typer.Option(metavar="DATA", exists=True, file_okay=False, help="Data set to measure coverage in.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle whose items to measure.")
    ] = None,
) -> None:
    """Lists every feature: type, window, meaning and, over a data set or a bundle, coverage."""
    use_cores(1)
    from features.feature_report import features

    report = features(data, bundle)
    for row in report["features"]:
        share = "" if row["coverage"] is None else f" ({row['coverage']:.0%})"
        print(f"{row['input']:8}{row['name']:22}{row['type']:9}{row['window']:20}{row['meaning']}{share}")
    print_result(report)


@commands.command()
def train(
    data: DataDir,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Directory of the run; an unfinished one is resumed.")],
    config: TrainConfigFile = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of everything random.")] = None,
    settings: Settings = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            exists=True,
            file_okay=False,
            help="Earlier run to begin from, as of yesterday.",
        ),
    ] = None,
) -> None:
    """Trains the encoders and the ranker.

    Without --config the settings are chosen by the data, told on standard error and written to RUN/config.yaml; with
    --from they are those of the earlier run.
    """
    use_cores()
    from training.config import load_config
    from training.train import train

    given = load_config(config, settings or [], device, seed)
    print_result(train(data, out, given, automatic=config is None, start=start))


@commands.command()
def tune(
    data: DataDir,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Directory of the search; an unfinished one goes on.")],
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="Minutes that the search may take; the first trial always ends. [default: 15]"),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Trials, the start included: the same end on every machine and call."),
    ] = None,
    space: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="YAML file of the settings to search."),
    ] = None,
    config: TrainConfigFile = None,
    device: Device = None,
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Seed of the search and of its trainings.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Searches settings that validate better than those chosen by the data, and writes them to RUN/config.yaml.

    The first trial has the settings that `penchant train DATA` chooses, or those of --config. What --set or a variable
    sets is not searched. Killed or stopped, the same command goes on; --trials then ends as if it had never been.
    """
    use_cores()
    from training.config import load_config
    from training.tuning.tune import tune

    # Read here, because `tune` takes values and the command line has texts.
    pins = load_config(None, settings or [], device, seed)
    values = {name: getattr(pins, name) for name in pins.model_fields_set}
    print_result(tune(data, out, config, minutes=minutes, trials=trials, space=space, **values))


@commands.command()
def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", exists=True, file_okay=False, help="Training runs; several are seeds of one."),
    ],
    protocol: Annotated[
        Literal["leave-one-out", "temporal-successive", "temporal-last", "impressions", "search", "cold-items"] | None,
        typer.Option(help="How the test part is cut and asked; leave-one-out without."),
    ] = None,
    data: MovedData = None,
    test: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            exists=True,
            help="Parquet, CSV or TSV of user_id, item_id and perhaps timestamp to rank in place of a protocol.",
        ),
    ] = None,
) -> None:
    """Measures runs by ranking the full catalogue, and the baselines on the same targets."""
    use_cores()
    from training.evaluation.evaluate import evaluate
    from training.evaluation.table import evaluation_table

    evaluation = evaluate(runs, protocol, data, test)
    # For the reader; on stderr, because programs read stdout.
    print(evaluation_table(evaluation), file=sys.stderr)
    print_result(evaluation)


@commands.command()
def embeddings(
    run: RunDir,
    out: Annotated[Path, typer.Option(metavar="DIR", help="New directory for users.arrow and items.arrow.")],
    data: MovedData = None,
) -> None:
    """Writes the vectors of a run's users, after their newest events, and of its items as Arrow files."""
    use_cores()
    from training.export.embeddings import embeddings

    print_result(embeddings(run, out, data=data))


@commands.command()
def export(
    run: RunDir,
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Directory of the new bundle.")],
    data: MovedData = None,
    recall: Annotated[
        float, typer.Option(min=0.5, max=1.0, help="Share of the exactly best items that the index must find.")
    ] = 0.98,
) -> None:
    """Makes a bundle of a run, if it passes every parity gate."""
    use_cores()
    from training.export.export import export

    print_result(export(run, out, data=data, recall=recall))
