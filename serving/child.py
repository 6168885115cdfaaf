"""The main function of every child of `penchant serve`: a worker, the projector, or the warehouse.

Its orders come as one line of JSON on standard input; it says `{"ready": true}` or `{"error": ...}` on standard output,
once, and stops on SIGTERM or when standard input ends because the parent is gone.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from features.errors import PenchantError
from features.private_files import set_private_umask
from serving import logs
from serving.config import ServeConfig
from serving.reporting import report
from serving.telemetry import Telemetry

if TYPE_CHECKING:
    from serving.projector import Idle

_log = logging.getLogger("serving.child")


def main() -> int:
    """Obeys the orders; the exit status."""
    set_private_umask()
    orders = json.loads(sys.stdin.readline())
    logs.configure(orders["settings"]["log_format"], orders["role"], orders.get("number"))
    telemetry = Telemetry()
    report(orders["report_fd"], telemetry)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    try:
        config = ServeConfig(**orders["settings"], token=orders["token"] or None)
        if orders["role"] == "projector":
            # Imported where they are needed: a projector has no use for models, an index or gRPC.
            from serving.projector import run

            _ready(orders)
            run(
                config.redis,
                config.events_redis,
                config.partitions,
                stop,
                purge_s=config.purge_hours * 1800,
                idle=_idle(config) if config.idle_days else None,
                telemetry=telemetry,
                patient=True,
            )
        elif orders["role"] == "warehouse":
            from serving import warehouse
            from serving.ledger import Ledger

            warehouse.run(
                config.events_redis,
                config.warehouse_path,
                config.bundle,
                config.partitions,
                flush_s=config.warehouse_flush_s,
                days=config.warehouse_days,
                default=config.default_consent,
                ledger=Ledger(config.ledger_path),
                stop=stop,
                ready=lambda _: _ready(orders),
                bundle_id=orders["bundle_id"],
                telemetry=telemetry,
                patient=True,
            )
        else:
            from serving.worker import work

            work(config, telemetry, stop, lambda: _ready(orders), orders["bundle_id"], orders["sealed"])
    except PenchantError as error:
        _say({"error": str(error)})
        return 2
    _log.info("the %s has stopped", _name(orders))
    return 0


def _idle(config: ServeConfig) -> Idle:
    """When profiles are dropped, and how they come back."""
    # Imported where it is needed: a projector that drops nothing has no use for Arrow.
    from features.profile import Retention
    from serving.projector import Idle
    from serving.rebuild import rehydrate

    return Idle(config.idle_days, partial(rehydrate, config.warehouse_path, Retention(config.retention_days)))


def _watch_parent(stop: threading.Event) -> None:
    """Standard input ends when the parent is gone, however it went."""
    # Not sys.stdin.read(): a thread that waits in there keeps the interpreter from ending.
    while os.read(sys.stdin.fileno(), 1):
        pass
    stop.set()


def _ready(orders: dict[str, Any]) -> None:
    _log.info("the %s is ready", _name(orders))
    _say({"ready": True})


def _name(orders: dict[str, Any]) -> str:
    return f"{orders['role']} {orders['number']}" if "number" in orders else str(orders["role"])


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
