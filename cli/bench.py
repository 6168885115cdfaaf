"""The demonstration, and the measurements of `penchant bench`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.options import (
    BundleDir,
    DataDir,
    EmbeddedRedis,
    MovedData,
    RunDir,
    Settings,
    TrainConfigFile,
    print_result,
    use_cores,
)

commands = typer.Typer()
bench = typer.Typer(help="Measurements; each states its machine and its method.", no_args_is_help=True)

_Peers = Annotated[
    Path, typer.Option(metavar="DIR", help="Holds the environments of benchmarks/peers: rectools, recbole (speed).")
]
_Trainers = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Trainers: penchant, rectools, recbole, and each with _equal; repeatable."),
]


# Each command imports its own module after `use_cores`: a numeric library reads its number of threads once, when it is
# loaded. Where a service is timed, that is one, as a worker has, which leaves the other cores to the service; training
# takes all of them.
@commands.command()
def demo(
    dataset: Annotated[str, typer.Option(metavar="NAME", help="Data set to go through.")] = "movielens-1m",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for data, run and bundle.")] = Path("build/demo"),
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", exists=True, help="Where the data set lies; else it is downloaded."),
    ] = None,
) -> None:
    """Runs the whole chain in minutes: data, training, bundle, service, measurement."""
    use_cores()
    from benchmarks.demo import demo

    print_result(demo(dataset, out, source))


@bench.command()
def stages(
    bundle: BundleDir,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests to run.")] = 1000,
    redis: EmbeddedRedis = "embedded",
) -> None:
    """Measures what a request costs without a server around it, stage by stage."""
    use_cores(1)
    from benchmarks.stages import stages

    print_result(stages(bundle, requests=requests, redis=redis))


@bench.command()
def sizing(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...", exists=True, file_okay=False, help="Bundles, best of different sizes."),
    ],
    users: Annotated[int, typer.Option(min=1, metavar="N", help="Users to make.")] = 2000,
    events: Annotated[int, typer.Option(min=1, metavar="N", help="Events of each.")] = 100,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests for a slate.")] = 5000,
) -> None:
    """Measures what to provide for: memory, disk and processor time by item, user, event, slate and request."""
    use_cores(1)
    from benchmarks.sizing import sizing

    print_result(sizing(bundles, users=users, events=events, requests=requests))


@bench.command("profiles")
def bench_profiles(
    users: Annotated[int, typer.Option(min=1, metavar="N", help="Users to store.")] = 1_000_000,
    events: Annotated[int, typer.Option(min=1, metavar="N", help="Events of each.")] = 100,
    reads: Annotated[int, typer.Option(min=1, metavar="N", help="Reads of each measurement.")] = 2000,
) -> None:
    """Measures what a profile costs: bytes, reading, folding, ingesting, and whether it costs more with more users."""
    use_cores(1)
    from benchmarks.profiles import profiles

    print_result(profiles(users=users, events=events, reads=reads))


@bench.command()
def fidelity(
    run: RunDir,
    bundle: BundleDir,
    protocol: Annotated[str, typer.Option(metavar="NAME", help="What the run held out.")] = "leave-one-out",
    users: Annotated[int, typer.Option(min=1, metavar="N", help="Users to ask for, one target each.")] = 1000,
) -> None:
    """Measures quality through a running service, and compares it with what evaluation says of the same users."""
    use_cores()
    from benchmarks.fidelity import fidelity

    print_result(fidelity(run, bundle, protocol=protocol, users=users))


@bench.command()
def freshness(
    bundle: BundleDir,
    pairs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Events, each followed by another worker's answer.")
    ] = 2000,
    callers: Annotated[int, typer.Option(min=1, metavar="N", help="Callers at once.")] = 1,
) -> None:
    """Measures how long it takes until an event counts in answers, and checks that it does every time."""
    use_cores(1)
    from benchmarks.freshness import freshness

    print_result(freshness(bundle, pairs=pairs, callers=callers))


@bench.command()
def growth(
    sizes: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Numbers of events, each a training; of items with --serving."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, metavar="S", help="Seconds of each training to measure.")] = 60.0,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Rounds that these are divided into.")] = 3,
    items: Annotated[
        str,
        typer.Option(metavar="N,N,...", help="Numbers of items, each a training with the first number of events."),
    ] = "",
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="Where there is room for 50 bytes an event."),
    ] = None,
    serving: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", exists=True, file_okay=False, help="Measure services of bundles grown from it."),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.1, metavar="R", help="Requests a second (--serving).")] = 20.0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", dir_okay=False, help="File for the result of --serving.")
    ] = None,
) -> None:
    """Measures whether training costs as much per event however many events or items there are, or serving."""
    use_cores(1 if serving else None)
    if serving:
        print_result(_growth_of_serving(serving, sizes or "1e4,1e5,1e6,1e7", folder, rate, out))
        return
    from benchmarks.growth import growth, growth_of_catalogs

    counts = _numbers(sizes or "1e6,1e7,1e8")
    if items:
        catalogs = _numbers(items)
        print_result(growth_of_catalogs(catalogs, events=counts[0], seconds=seconds, rounds=rounds, folder=folder))
    else:
        print_result(growth(counts, seconds=seconds, rounds=rounds, folder=folder))


def _growth_of_serving(
    template: Path, sizes: str, folder: Path | None, rate: float, out: Path | None
) -> dict[str, Any]:
    from benchmarks.latency import save
    from benchmarks.serving_growth import serving_growth

    with tempfile.TemporaryDirectory(dir=folder) as bundles:
        result = serving_growth(template, _numbers(sizes), Path(bundles), rate=rate)
    if out:
        save(out, result)
    return result


def _numbers(texts: str) -> list[int]:
    # Through float, so that 1e8 is a number as well.
    return [int(float(text)) for text in texts.split(",") if text]


@bench.command()
def impressions(
    run: RunDir,
    python: Annotated[
        Path, typer.Option(metavar="FILE", help="Interpreter that has lightgbm, as benchmarks/peers/lightgbm.txt says.")
    ] = Path("build/peers/lightgbm/bin/python"),
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="Settings of LightGBM to try for each action.")] = 30,
    data: MovedData = None,
) -> None:
    """Measures the ranker on a feed's last day, against LightGBM on the same features and plain rates."""
    use_cores()
    from benchmarks.impressions import impressions

    print_result(impressions(run, python, trials=trials, data=data))


@bench.command()
def continued(
    data: DataDir,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the data sets and runs.")],
    config: TrainConfigFile = None,
    settings: Settings = None,
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Seeds to train.")] = "1,2,3",
    new_days: Annotated[
        float, typer.Option(min=0.01, metavar="DAYS", help="Days of events that yesterday's run lacks.")
    ] = 1.0,
    test_days: Annotated[
        float, typer.Option(min=0.01, metavar="DAYS", help="Days of events, the last, that test.")
    ] = 1.0,
) -> None:
    """Measures a training from yesterday's run against a full one on a day of new events: time and quality."""
    use_cores()
    from benchmarks.continued import continued
    from training.config import load_config

    given, numbers = load_config(config, settings or []), [int(seed) for seed in seeds.split(",")]
    days = {"new_days": new_days, "test_days": test_days}
    print_result(continued(data, given, out, automatic=config is None, seeds=numbers, **days))


@bench.command()
def kills(
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Trainings to kill.")] = 20,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the moments.")] = 0,
) -> None:
    """Kills a training again and again, resumes it, and compares its end with that of an undisturbed one."""
    use_cores()
    from benchmarks.kills import kills

    print_result(kills(count, seed=seed))


@bench.command()
def training(
    data: DataDir,
    part: Annotated[
        Literal["speed", "quality", "cold", "arithmetic"],
        typer.Option(help="Speed against other trainers, quality of seeds, cold items, or arithmetic rate."),
    ] = "speed",
    config: TrainConfigFile = None,
    settings: Settings = None,
    budget: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds of training for each trainer (speed, arithmetic).")
    ] = 600,
    turn: Annotated[
        float,
        typer.Option(min=1, metavar="S", help="Seconds that a trainer trains before the next one's turn (speed)."),
    ] = 60,
    validate_every: Annotated[
        float, typer.Option(min=0.1, metavar="S", help="Seconds between validations of the peers (speed).")
    ] = 30,
    peers: _Peers = Path("build/peers"),
    only: _Trainers = None,
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Seeds to train (quality, cold).")] = "1,2,3",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the runs (quality, cold).")] = Path(
        "build/bench-training"
    ),
) -> None:
    """Measures training: its speed against RecTools and RecBole, its quality, cold items, its arithmetic rate."""
    use_cores()
    from benchmarks.training import training
    from training.config import load_config

    # Each part has its own options: speed and arithmetic measure for a given time, quality and cold train whole runs.
    speed = {"peers": peers, "budget": budget, "turn": turn, "validate_every": validate_every, "names": only or ()}
    runs = {"seeds": [int(seed) for seed in seeds.split(",")], "out": out}
    options: dict[str, dict[str, Any]] = {"speed": speed, "arithmetic": {"budget": budget}}
    print_result(training(part, data, load_config(config, settings or []), **options.get(part, runs)))
