"""Commands around a service: serve, projector, warehouse, erase, hosts, and the stored profiles."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options import (
    BundleDir,
    DataDir,
    Device,
    EventsRedis,
    LogFormat,
    MetricsListen,
    Partitions,
    RedisUrl,
    ServeConfigFile,
    Settings,
    StateDir,
    parse_settings,
    print_ready,
    print_result,
    use_cores,
)

if TYPE_CHECKING:
    from features.profile import Purpose

commands = typer.Typer()
profiles = typer.Typer(help="The stored profiles of users.", no_args_is_help=True)

_Listen = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Address to serve; port 0 takes a free one."),
]
_ServeRedis = Annotated[
    str | None,
    typer.Option(metavar="embedded|URL", help="Redis of the profiles: its URL, or one started here."),
]
_Workers = Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes that serve; else one per core.")]
_Insecure = Annotated[
    bool | None, typer.Option("--insecure", help="Allow an address beyond this machine without TLS and token.")
]
_TlsCertificate = Annotated[
    Path | None,
    typer.Option("--tls-cert", metavar="FILE", exists=True, dir_okay=False, help="PEM certificate chain."),
]
_TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="PEM private key.")]
_TokenFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", exists=True, dir_okay=False, help="File with the token that each call must carry."),
]
_Holdout = Annotated[
    float | None,
    typer.Option(min=0, max=1, metavar="SHARE", help="Share of users, 0 to 1, who get the unpersonalised answer."),
]
_AccessLog = Annotated[
    Literal["off", "errors", "all"] | None,
    typer.Option(
        metavar="off|errors|all",
        help="Requests with a line in the log; of errors one a minute for each method and code.",
    ),
]
_HealthListen = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="Address of /healthz and /readyz over HTTP; none without."),
]
_SharePort = Annotated[
    bool | None,
    typer.Option("--share-port", help="Listen where another instance listens already, to take over from it."),
]
_ItemsBundle = Annotated[
    Path | None,
    typer.Option(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle whose items are in the catalogue."),
]
_EvictAfterDays = Annotated[
    float | None, typer.Option(min=0, metavar="DAYS", help="Days after which an inactive profile is evicted.")
]
_RestoreFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="DATA", exists=True, file_okay=False, help="With --evict-after-days: restores the evicted profiles."
    ),
]
_UnsafeRedis = Annotated[
    bool,
    typer.Option("--unsafe-redis", envvar="PENCHANT_UNSAFE_REDIS", help="Accept a Redis whose settings may lose data."),
]
_Retention = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TYPE=DAYS",
        help="Leave events of a type that are older than this out of rebuilt and restored profiles; repeatable.",
    ),
]
_RetentionDays = Annotated[
    float | None, typer.Option(min=1, metavar="DAYS", help="Delete days that are older; none are without.")
]
_DefaultPurposes = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...", help="Purposes that users allow until they set their consent, as `serve` has them."
    ),
]
_LedgerFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="The service's ledger of erasures, for files put back from a backup."),
]
_Forget = Annotated[
    bool, typer.Option("--forget", help="Drop the warehouse for good, so that the log keeps nothing for it; end.")
]


# Each command imports its own modules, so that help answers at once, and only after `use_cores`: a numeric library
# reads its number of threads once, when it is loaded. Here that is one, because a service scales by its processes.
@commands.command()
def serve(
    bundle: BundleDir,
    config: ServeConfigFile = None,
    listen: _Listen = None,
    redis: _ServeRedis = None,
    events_redis: EventsRedis = None,
    workers: _Workers = None,
    device: Device = None,
    state_dir: StateDir = None,
    insecure: _Insecure = None,
    tls_cert: _TlsCertificate = None,
    tls_key: _TlsKey = None,
    token_file: _TokenFile = None,
    holdout: _Holdout = None,
    metrics_listen: MetricsListen = None,
    log_format: LogFormat = None,
    access_log: _AccessLog = None,
    health_listen: _HealthListen = None,
    share_port: _SharePort = None,
    settings: Settings = None,
) -> None:
    """Serves a bundle over gRPC until a signal stops it.

    docs/settings.md lists every setting with its default; options win over --set, and that over variables and the file.
    """
    use_cores(1)
    from serving.config import ServeConfig
    from serving.processes.supervisor import serve

    # Options that are None were not given: the file, a variable or the default of the settings holds, and no default is
    # written down twice.
    loaded = ServeConfig.load(
        config,
        settings or [],
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
    raise typer.Exit(serve(loaded))


@commands.command()
def projector(
    redis: RedisUrl,
    events_redis: EventsRedis = None,
    partitions: Partitions = None,
    evict_after_days: _EvictAfterDays = None,
    warehouse: _RestoreFrom = None,
    retention: _Retention = None,
    metrics_listen: MetricsListen = None,
    log_format: LogFormat = None,
    unsafe_redis: _UnsafeRedis = False,
) -> None:
    """Brings events into profiles until a signal stops it, if `serve` leaves that to another process."""
    use_cores(1)
    if evict_after_days and warehouse is None:
        raise typer.BadParameter("needs --warehouse, to restore evicted profiles from", param_hint="--evict-after-days")
    from serving.observability.logs import configure
    from serving.observability.telemetry import Telemetry
    from serving.processes.metrics_page import exposed
    from serving.projection.eviction import Eviction
    from serving.projection.process import run

    eviction = None
    if evict_after_days and warehouse:
        from features.profile import Retention
        from serving.projection.restore import restore_profiles

        eviction = Eviction(evict_after_days, partial(restore_profiles, warehouse, Retention(_days_by_type(retention))))
    # The first line of the log must have the chosen format, so this comes before anything that logs.
    configure(log_format or "text", "projector")
    telemetry = Telemetry()
    with exposed(metrics_listen or "", "projector", telemetry) as metrics:
        events = events_redis or redis
        ready = partial(print_ready, metrics=metrics)
        status = run(
            redis, events, partitions, eviction=eviction, ready=ready, telemetry=telemetry, unsafe=unsafe_redis
        )
        raise typer.Exit(status)


@commands.command()
def warehouse(
    redis: RedisUrl,
    out: Annotated[
        Path | None, typer.Option(metavar="DATA", help="Directory of the Parquet: a data set that grows.")
    ] = None,
    events_redis: EventsRedis = None,
    bundle: _ItemsBundle = None,
    partitions: Partitions = None,
    flush: Annotated[
        float | None, typer.Option(min=0.1, metavar="S", help="Longest wait to be written, in seconds.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Write what the log holds now, then end.")] = False,
    retention: _RetentionDays = None,
    default_purposes: _DefaultPurposes = None,
    ledger: _LedgerFile = None,
    forget: _Forget = False,
    metrics_listen: MetricsListen = None,
    log_format: LogFormat = None,
) -> None:
    """Writes the log to Parquet until a signal stops it, if `serve` leaves that to another process."""
    use_cores(1)
    from serving.folder_identity import local_folder
    from serving.observability.logs import configure
    from serving.observability.telemetry import Telemetry
    from serving.privacy.ledger import Ledger
    from serving.processes.metrics_page import exposed
    from serving.warehouse.process import drop, run

    events = events_redis or redis
    # Before --out is asked for: what is dropped is the warehouse's place in the log, and no directory is touched.
    if forget:
        print_result(drop(events, partitions))
        return
    if out is None:
        raise typer.BadParameter("say where the Parquet goes", param_hint="--out")
    # Options that were not given are left out rather than passed as None, so that `run` alone has the defaults.
    options: dict[str, Any] = {"once": once, "days": retention, "ledger": None if ledger is None else Ledger(ledger)}
    options |= {} if flush is None else {"flush_s": flush}
    options |= {} if default_purposes is None else {"default": _purposes(default_purposes)}
    configure(log_format or "text", "warehouse")
    telemetry = Telemetry()
    with exposed(metrics_listen or "", "warehouse", telemetry) as metrics:
        ready = partial(print_ready, metrics=metrics)
        result = run(events, local_folder(out), bundle, partitions, ready=ready, telemetry=telemetry, **options)
    print_result(result)


def _purposes(names: str) -> Purpose:
    from features.profile import Purpose

    try:
        # An empty text is a choice too: no purpose at all.
        return Purpose.of(name for name in names.split(",") if name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--default-purposes") from None


@commands.command()
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
    use_cores(1)
    from serving.jobs.hosts import replay_everywhere

    result = replay_everywhere(replay, redis, events_redis or redis, partitions)
    for place in result["places"]:
        print(f"{place['result']}: {place['place']} on {place['host']}, {place['rows']} rows")
    print_result(result)
    # A folder "in use" is no failure: its own warehouse makes the erasures hold there.
    unreached = [place for place in result["places"] if place["result"] not in ("erased", "in use", "retired")]
    raise typer.Exit(1 if unreached else 0)


@commands.command()
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
    use_cores(1)
    from serving.jobs.hosts import hosts

    result = hosts(redis, retire or [], partitions)
    for copy in result["copies"]:
        label = " (the log's own)" if copy["own"] else ""
        waiting = f", {copy['waiting']} erasures wait for it" if copy["waiting"] else ""
        place = f"{copy['host']}:{copy['place']}{label}"
        # The beginning of an id is enough: --retire takes it as well, unless two copies share it.
        print(f"{copy['copy_id'][:12]}  {copy['kind']:10}{place}: {copy['state']}{waiting}")
    print_result(result)


@profiles.command()
def rebuild(
    data: DataDir,
    redis: RedisUrl,
    events_redis: EventsRedis = None,
    partitions: Partitions = None,
    retention: _Retention = None,
    max_rejected_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, metavar="SHARE", help="Share of a table's rows that may be malformed."),
    ] = None,
) -> None:
    """Builds the profiles from a data set, such as the warehouse, in place of those that are stored."""
    use_cores(1)
    from features.profile import Retention
    from serving.projection.rebuild import rebuild

    options = {} if max_rejected_share is None else {"max_rejected_share": max_rejected_share}
    result = rebuild(
        data, redis, events_redis, partitions=partitions, retention=Retention(_days_by_type(retention)), **options
    )
    print_result(result)


def _days_by_type(assignments: list[str] | None) -> dict[str, float]:
    return {name: _days(name, value) for name, value in parse_settings(assignments or []).items()}


def _days(name: str, value: Any) -> float:
    # To Python, `true` is the number 1.
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise typer.BadParameter(f"{name}: a number of days above 0, not {value!r}", param_hint="--retention")
    return float(value)


@profiles.command()
def show(
    user: Annotated[
        str, typer.Argument(metavar="USER", help="Id of the user; of an anonymous user a: and the anonymous id.")
    ],
    redis: RedisUrl,
    bundle: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", exists=True, file_okay=False, help="Bundle that names items, not keys."),
    ] = None,
    partitions: Partitions = None,
) -> None:
    """Shows one profile as a user would read it; of a damaged one what is wrong, and the status is 1."""
    use_cores(1)
    from serving.projection.profile_view import show

    profile = show(user, redis, bundle, partitions=partitions)
    print_result(profile)
    raise typer.Exit(1 if profile["damage"] else 0)
