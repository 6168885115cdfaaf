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
from serving.config import ServeConfig

if TYPE_CHECKING:
    from serving.projector import Idle

LOG_FORMAT = "%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"


def main() -> int:
    """Obeys the orders; the exit status."""
    set_private_umask()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    # It tells at length which processor features it tries.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
    orders = json.loads(sys.stdin.readline())
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_watch_parent, args=(stop,), daemon=True).start()
    try:
        config = ServeConfig(**orders["settings"], token=orders["token"] or None)
        if orders["role"] == "projector":
            # Imported where they are needed: a projector has no use for models, an index or gRPC.
            from serving.projector import run

            _say({"ready": True})
            return run(
                config.redis,
                config.events_redis,
                config.partitions,
                stop,
                purge_s=config.purge_hours * 1800,
                idle=_idle(config) if config.idle_days else None,
            )
        if orders["role"] == "warehouse":
            from serving import warehouse
            from serving.erasure import Ledger

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
                ready=lambda _: _say({"ready": True}),
                bundle_id=orders["bundle_id"],
            )
            return 0
        from serving.worker import work

        work(config, orders["number"], stop, lambda: _say({"ready": True}), orders["bundle_id"], orders["sealed"])
    except PenchantError as error:
        _say({"error": str(error)})
        return 2
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


def _say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
