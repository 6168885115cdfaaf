"""A child of `penchant serve`: a worker with models, catalogue and gRPC server, or the projector.

Its orders come as one line of JSON on standard input; it says `{"ready": true}` or `{"error": ...}` on standard output,
once, and stops on SIGTERM or when standard input ends because the parent is gone.
"""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
import threading
from typing import Any

from features.errors import PenchantError
from serving.catalog_log import CatalogLog
from serving.config import ServeConfig
from serving.engine import Host, Surroundings, open_engine
from serving.errors import Unavailable
from serving.events import EventLog
from serving.experiments import Holdout
from serving.follower import Follower
from serving.hydrators import Progress
from serving.profiles import ProfileStore
from serving.projector import run as project
from serving.redis_client import connect
from serving.server import Server, Services
from serving.services.catalog import CatalogService
from serving.services.events import EventService
from serving.services.profiles import ProfileService
from serving.services.ranking import RankingService
from serving.side_effects import ImpressionWriter
from serving.telemetry import Telemetry, expose

WRITE_TIMEOUT_S = 1.0
"""Longest wait for the events Redis: it syncs to disk before it answers."""

_log = logging.getLogger(__name__)


def main() -> int:
    """Obeys the orders; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s")
    orders = json.loads(sys.stdin.readline())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    config = ServeConfig.load(**orders["settings"], token=orders["token"] or None)
    try:
        if orders["role"] == "projector":
            _say({"ready": True})
            return project(config.redis, config.events_redis, config.partitions, stop)
        serve(config, orders["number"], stop)
    except PenchantError as error:
        _say({"error": str(error)})
        return 2
    return 0


def serve(config: ServeConfig, number: int, stop: threading.Event) -> None:
    """Answers until `stop` is set.

    Raises:
        BundleError: The bundle is refused.
        ConfigError: The device or an address cannot be had.
    """
    telemetry, progress = Telemetry(), Progress()
    with (
        connect(config.redis, config.redis_timeout_ms / 1000) as profiles,
        connect(config.events_redis, WRITE_TIMEOUT_S) as events,
    ):
        store = ProfileStore(profiles, config.partitions, telemetry=telemetry)
        log = EventLog(events, config.partitions)
        _open(log)
        impressions = ImpressionWriter(log, config.impression_queue, telemetry) if config.impressions else None
        host = Host(open_engine(config.bundle, Surroundings(config, store, progress, telemetry, impressions)))
        changes = CatalogLog(events)
        follower = Follower(host, changes, progress)
        follower.start()
        server = Server(config, telemetry)
        holdout = Holdout(config.holdout_share, config.holdout_salt)
        services = Services(
            ranking=RankingService(host, holdout, config.default_deadline_ms / 1000),
            events=EventService(host, log, store, telemetry),
            profiles=ProfileService(host, log, store),
            catalog=CatalogService(host, changes, follower),
        )
        server.start(config.listen, services)
        if config.metrics_port:
            expose(telemetry, config.metrics_port + number)
        # What is loaded stays: the collector need not walk it with every sweep.
        gc.collect()
        gc.freeze()
        _say({"ready": True})
        stop.wait()
        server.stop()
        follower.stop()
        if impressions:
            impressions.close()


def _open(log: EventLog) -> None:
    try:
        log.open()
    except Unavailable as error:
        _log.warning("starting without the event log: %s", error)


def _watch_parent(stop: threading.Event) -> None:
    """Standard input ends when the parent is gone, however it went."""
    sys.stdin.read()
    stop.set()


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
