"""One worker: the models, the catalogue and a gRPC server in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from features.jit import expect_compiled
from features.profile import Retention
from serving.concurrency import ConcurrencyLimit
from serving.config import MOST_SURFACES, ServeConfig
from serving.engine.catalog_sync import CatalogSync
from serving.engine.engine import EngineRef, open_engine
from serving.engine.pipelines import Dependencies
from serving.errors import ConfigError, ServingError, Unavailable
from serving.experiments import Holdout
from serving.log_retention import HOUR_MS
from serving.observability.observer import RequestObserver
from serving.observability.telemetry import Telemetry
from serving.pipeline.side_effects import ImpressionWriter
from serving.privacy.certificates import Certificates
from serving.privacy.ledger import Ledger
from serving.privacy.rights import SubjectRights
from serving.processes.listen_sockets import stop_listening
from serving.processes.worker_health import HealthMonitor, health_checks
from serving.redis.client import connect
from serving.services.catalog import CatalogService
from serving.services.events import EventService
from serving.services.profiles import ProfileService
from serving.services.ranking import RankingService
from serving.services.server import Server, Services, stream_places
from serving.services.streams import Streams
from serving.stores.catalog_log import CatalogLog, CatalogProgress
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore

if TYPE_CHECKING:
    from serving.processes.entrypoint import ProcessControl

WRITE_TIMEOUT_S = 1.0
"""Longest wait of a call that writes: the events Redis syncs to disk before it answers."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Stores:
    """The stores of a worker.

    Attributes:
        profiles: Profiles for rankings, which go on without one that comes late.
        writer: The same profiles for calls that write, with more patience.
        log: The event log.
        changes: The catalogue log.
        checked_profiles: The profiles on a connection of the health checks.
        checked_log: The event log on a connection of the health checks.
    """

    profiles: ProfileStore
    writer: ProfileStore
    log: EventLog
    changes: CatalogLog
    checked_profiles: ProfileStore
    checked_log: EventLog


def work(
    config: ServeConfig,
    telemetry: Telemetry,
    stop: threading.Event,
    ready: Callable[[], None],
    bundle_id: str = "",
    sealed: Mapping[str, int] | None = None,
    control: ProcessControl | None = None,
) -> None:
    """Serves until `stop` is set; calls `ready` when it begins to.

    Args:
        config: The settings.
        telemetry: Takes its measurements.
        stop: Set when the worker is to end.
        ready: Called once.
        bundle_id: The bundle that `config.bundle` has to hold; empty if any is right.
        sealed: Handles of memory that the workers share, by name; see `serving.engine.preparation`.
        control: The link to the supervisor, if there is one.

    Raises:
        BundleError: The bundle is refused.
        ConfigError: The device or an address is not available.
    """
    progress, limit = CatalogProgress(), ConcurrencyLimit(config.threads)
    telemetry.gauge("catalog_version", lambda: progress.version)
    with _stores(config, telemetry) as stores, _impressions(config, stores.log, telemetry) as impressions:
        dependencies = Dependencies(config, stores.profiles, progress, telemetry, impressions, limit)
        engine_ref = EngineRef(open_engine(config.bundle, dependencies, bundle_id, sealed))
        catalog_sync = CatalogSync(engine_ref, stores.changes, progress, config.worker_count)
        catalog_sync.start()
        settle = impressions.settle if impressions else lambda: None
        server = Server(config, limit, telemetry, _observer(config, telemetry, engine_ref), settle)
        streams = Streams(stream_places(config))
        monitor = _checked_monitor(config, stores, catalog_sync, progress, server, control)
        holdout = Holdout(config.holdout_share, config.holdout_salt)
        ranking = RankingService(engine_ref, holdout, config.default_deadline_ms / 1000, progress, limit)
        server.start(config.listen, _services(config, stores, engine_ref, catalog_sync, telemetry, streams, ranking))
        _settle()
        ready()
        monitor.start()
        _serve_until(stop, config, server, monitor, streams, control)
        catalog_sync.stop()


@contextlib.contextmanager
def _stores(config: ServeConfig, telemetry: Telemetry) -> Iterator[_Stores]:
    """Yields the stores; their connections are open while the block runs."""
    guarded = not config.unsafe_redis
    with (
        connect(config.redis, config.redis_timeout_ms / 1000) as read,
        # Calls that write wait longer than rankings, and none of their timeouts keeps a ranking from its profile.
        connect(config.redis, WRITE_TIMEOUT_S) as written,
        connect(config.events_redis, WRITE_TIMEOUT_S) as events,
        # The health checks have connections of their own: a late reply delays no call.
        connect(config.redis, WRITE_TIMEOUT_S) as checked_profiles,
        connect(config.events_redis, WRITE_TIMEOUT_S) as checked_events,
    ):
        profiles = ProfileStore(read, config.partitions, telemetry=telemetry, guarded=guarded)
        log = EventLog(
            events,
            config.partitions,
            window_ms=int(config.retry_hours * HOUR_MS),
            default=config.default_consent,
            user_cap=config.user_cap,
            times=config.log_retention,
            unsafe=config.unsafe_redis,
        )
        _open(log)
        _open(profiles)
        yield _Stores(
            profiles,
            ProfileStore(written, config.partitions, telemetry=telemetry, guarded=guarded, shared_with=profiles),
            log,
            CatalogLog(events, unsafe=config.unsafe_redis),
            ProfileStore(checked_profiles, config.partitions, guarded=guarded, shared_with=profiles),
            EventLog(checked_events, config.partitions, unsafe=config.unsafe_redis, shared_with=log),
        )


def _services(
    config: ServeConfig,
    stores: _Stores,
    engine_ref: EngineRef,
    catalog_sync: CatalogSync,
    telemetry: Telemetry,
    streams: Streams,
    ranking: RankingService,
) -> Services:
    certificates = Certificates(stores.log, int(config.purge_hours * 3_600_000))
    ledger, retention = Ledger(config.ledger_path), Retention(config.retention_days)
    rights = SubjectRights(stores.log, stores.writer, certificates, retention, ledger)
    return Services(
        ranking=ranking,
        events=EventService(engine_ref, stores.log, stores.writer, telemetry, streams, config.refused_in_ids),
        profiles=ProfileService(engine_ref, rights, certificates, stores.writer),
        catalog=CatalogService(engine_ref, stores.changes, catalog_sync),
    )


def _observer(config: ServeConfig, telemetry: Telemetry, engine_ref: EngineRef) -> RequestObserver:
    # A label costs memory for ever; by default the surfaces that the ranker was trained on have one.
    surfaces = config.metrics_surfaces or engine_ref.engine.surfaces[:MOST_SURFACES]
    return RequestObserver(telemetry, config.access_log, surfaces)


def _checked_monitor(
    config: ServeConfig,
    stores: _Stores,
    catalog_sync: CatalogSync,
    progress: CatalogProgress,
    server: Server,
    control: ProcessControl | None,
) -> HealthMonitor:
    checks = health_checks(
        stores.checked_profiles, stores.checked_log, stores.changes, catalog_sync, progress, config.unsafe_redis
    )
    report_state = control.report_state if control else lambda _: None
    monitor = HealthMonitor(checks, server.set_serving, report_state, strict=config.strict_readiness)
    # Before the first call: a caller must not meet a service that says it serves and cannot.
    monitor.check()
    return monitor


def _settle() -> None:
    """Prepares the process for its steady state, just before it is ready."""
    # All that is loaded stays: no sweep of the collector needs to walk it.
    gc.collect()
    gc.freeze()
    # From here on a kernel that compiles delays a caller, so it is logged.
    expect_compiled()


def _serve_until(
    stop: threading.Event,
    config: ServeConfig,
    server: Server,
    monitor: HealthMonitor,
    streams: Streams,
    control: ProcessControl | None,
) -> None:
    """Serves until `stop` is set, then lets calls in progress finish."""

    def leave() -> None:
        monitor.mute()
        server.not_ready()

    def close() -> None:
        stop_listening(config.port)

    if control:
        control.handle({"unready": leave, "close": close})
    stop.wait()
    # The supervisor has sent both commands before; a worker that ends without them does the same.
    leave()
    close()
    streams.close()
    server.stop(control.hurry if control else None)
    monitor.close()


@contextlib.contextmanager
def _impressions(config: ServeConfig, log: EventLog, telemetry: Telemetry) -> Iterator[ImpressionWriter | None]:
    """Yields the writer of impressions, None if they are not logged; waiting slates are written at the end."""
    if not config.impressions:
        yield None
        return
    with contextlib.closing(
        ImpressionWriter(log, config.impression_queue, telemetry, config.impression_share)
    ) as writer:
        yield writer


def _open(store: EventLog | ProfileStore) -> None:
    """Opens a store; a worker starts without one that does not answer now, or refuses."""
    try:
        store.open()
    except ConfigError:
        raise
    except Unavailable as error:  # each call to Redis logs it
        _log.debug("starting without %s: %s", type(store).__name__, error)
    except ServingError as error:  # it refuses its users for now
        _log.warning("starting without %s: %s", type(store).__name__, error)
