"""One worker: the models, the catalogue and a gRPC server in a process of its own."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Mapping
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
from serving.observability.observer import RequestObserver
from serving.observability.telemetry import Telemetry
from serving.pipeline.side_effects import ImpressionWriter
from serving.privacy.certificates import Certificates
from serving.privacy.ledger import Ledger
from serving.privacy.rights import SubjectRights
from serving.processes.listen_sockets import stop_listening
from serving.processes.worker_health import HealthMonitor, parts_of
from serving.redis.client import connect
from serving.services.catalog import CatalogService
from serving.services.events import EventService
from serving.services.profiles import ProfileService
from serving.services.ranking import RankingService
from serving.services.server import Server, Services
from serving.services.streams import Streams
from serving.stores.catalog_log import CatalogLog, CatalogProgress
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore

if TYPE_CHECKING:
    from serving.processes.entrypoint import Control

WRITE_TIMEOUT_S = 1.0
"""Longest wait of a call that writes: the events Redis syncs to disk before it answers."""

_log = logging.getLogger(__name__)


def work(
    config: ServeConfig,
    telemetry: Telemetry,
    stop: threading.Event,
    ready: Callable[[], None],
    bundle_id: str = "",
    sealed: Mapping[str, int] | None = None,
    control: Control | None = None,
) -> None:
    """Answers until `stop` is set; calls `ready` when it begins to.

    Args:
        config: The settings.
        telemetry: Where its measurements go.
        stop: Set when it shall end.
        ready: Called once.
        bundle_id: The bundle that `config.bundle` has to hold; empty where any will do.
        sealed: Files of it that are in shared memory, see `features.bundle.Bundle.seal`.
        control: What the parent asks and is told, where there is one.

    Raises:
        BundleError: The bundle is refused.
        ConfigError: The device or an address cannot be had.
    """
    progress, turns = CatalogProgress(), ConcurrencyLimit(config.threads)
    telemetry.gauge("catalog_version", lambda: progress.version)
    with (
        connect(config.redis, config.redis_timeout_ms / 1000) as profiles,
        connect(config.redis, WRITE_TIMEOUT_S) as written,
        connect(config.events_redis, WRITE_TIMEOUT_S) as events,
        connect(config.redis, WRITE_TIMEOUT_S) as watched_profiles,
        connect(config.events_redis, WRITE_TIMEOUT_S) as watched_events,
    ):
        guarded = not config.unsafe_redis
        store = ProfileStore(profiles, config.partitions, telemetry=telemetry, guarded=guarded)
        # Who writes has more patience than who ranks, and none of its timeouts keeps a ranking from its profile.
        writer = ProfileStore(written, config.partitions, telemetry=telemetry, guarded=guarded, beside=store)
        # The monitor looks at the settings, with connections of its own: a late answer costs nobody else anything.
        watched = ProfileStore(watched_profiles, config.partitions, guarded=guarded, beside=store)
        log = EventLog(
            events,
            config.partitions,
            default=config.default_consent,
            user_cap=config.user_cap,
            times=config.log_times,
            unsafe=config.unsafe_redis,
        )
        certificates = Certificates(log, int(config.purge_hours * 3_600_000))
        people = SubjectRights(log, writer, certificates, Retention(config.retention_days), Ledger(config.ledger_path))
        _open(log)
        _open(store)
        impressions = _writer(config, log, telemetry) if config.impressions else None
        around = Dependencies(config, store, progress, telemetry, impressions, turns)
        host = EngineRef(open_engine(config.bundle, around, bundle_id, sealed))
        changes = CatalogLog(events, unsafe=config.unsafe_redis)
        follower = CatalogSync(host, changes, progress, config.worker_count)
        follower.start()
        surfaces = config.metrics_surfaces or host.engine.surfaces[:MOST_SURFACES]
        observer = RequestObserver(telemetry, config.access_log, surfaces)
        server = Server(config, turns, telemetry, observer)
        streams = Streams(max(1, config.max_concurrent // 4))
        holdout = Holdout(config.holdout_share, config.holdout_salt)
        services = Services(
            ranking=RankingService(host, holdout, config.default_deadline_ms / 1000),
            events=EventService(host, log, writer, telemetry, streams, config.refused_in_ids),
            profiles=ProfileService(host, people, certificates, writer),
            catalog=CatalogService(host, changes, follower),
        )
        watched_log = EventLog(watched_events, config.partitions, unsafe=config.unsafe_redis, beside=log)
        parts = parts_of(watched, watched_log, changes, follower, progress, config.unsafe_redis)
        tell = control.state if control else lambda _: None
        monitor = HealthMonitor(parts, server.say, tell, strict=config.strict_readiness)
        monitor.look()
        server.start(config.listen, services)
        # What is loaded stays: the collector need not walk it with every sweep.
        gc.collect()
        gc.freeze()
        expect_compiled()
        ready()
        monitor.start()

        def unready() -> None:
            monitor.hush()
            server.not_ready()

        def close() -> None:
            stop_listening(config.port)

        if control:
            control.obey({"unready": unready, "close": close})
        stop.wait()
        unready()
        close()
        streams.close()
        server.stop(control.hurry if control else None)
        monitor.close()
        follower.stop()
        if impressions:
            impressions.close()


def _writer(config: ServeConfig, log: EventLog, telemetry: Telemetry) -> ImpressionWriter:
    return ImpressionWriter(log, config.impression_queue, telemetry, config.impression_share)


def _open(part: EventLog | ProfileStore) -> None:
    try:
        part.open()
    except ConfigError:
        raise
    except Unavailable as error:  # of which each call to Redis speaks
        _log.debug("starting without %s: %s", type(part).__name__, error)
    except ServingError as error:  # it refuses its users for now
        _log.warning("starting without %s: %s", type(part).__name__, error)
