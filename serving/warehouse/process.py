"""The warehouse as a process, and the end of it: its consumer group is dropped."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.bundle import FILES, Bundle, open_bundle
from features.profile import EVERY_PURPOSE, Purpose
from serving.errors import ConfigError, ServingError
from serving.observability.telemetry import Telemetry
from serving.privacy.certificates import Certificates
from serving.privacy.ledger import Ledger
from serving.redis.client import connect
from serving.restart import Report, Trouble, keep_running, stop_on_signals
from serving.stores.catalog_log import CatalogLog
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.meta import awaited_partitions, partitions_for
from serving.stores.warehouse_positions import WarehousePositions
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.items import ItemTable
from serving.warehouse.place import GROUP, WarehousePlace
from serving.warehouse.writer import FLUSH_S, WarehouseWriter

_TIMEOUT_S = 5.0
_COUNTED = {"events": "rows.events", "impressions": "rows.impressions", "erased": "erased", "damaged": "damaged"}


def run(
    events_redis_url: str,
    out: Path,
    bundle: Path | None = None,
    partitions: int | None = None,
    *,
    flush_s: float = FLUSH_S,
    once: bool = False,
    days: float | None = None,
    default: Purpose = EVERY_PURPOSE,
    ledger: Ledger | None = None,
    stop: threading.Event | None = None,
    ready: Callable[[dict[str, Any]], None] = lambda _: None,
    bundle_id: str = "",
    telemetry: Telemetry | None = None,
    trouble: Trouble | None = None,
) -> dict[str, Any]:
    """Runs until SIGTERM or SIGINT, or until `stop` is set; unless `once`, an error starts it again.

    Args:
        events_redis_url: The events Redis.
        out: Directory of the warehouse.
        bundle: Names the items that were never put while the service ran.
        partitions: Partitions of the event log; None: as the log says, which is waited for unless `once`.
        flush_s: Longest time that an entry waits to be written, in seconds.
        once: Write what the log holds now, then end.
        days: Days after which the rows of a day are deleted; None keeps them for ever.
        default: Consent of users who never set theirs.
        ledger: The erasures that the files must have been through.
        stop: Ends it.
        ready: Told `pid`, `partitions` and `lag` when it begins.
        bundle_id: Id of the bundle that `bundle` has to hold; empty for any.
        telemetry: Counts what a `WarehouseWriter` counts.
        trouble: Told what it waits for; with it, errors that only a caller can end are waited for as well.

    Returns:
        `partitions`, `lag` (entries that are not in a file, None if the log does not answer), and how many `events` and
        `impressions` were written, `erased` and `damaged`.

    Raises:
        OtherPlace: The warehouse of this log is another directory.
        ConfigError: The URL is wrong, or the log has other partitions; with `once`, another process holds a part of it.
        BundleError: The bundle is refused.
        EventLogUnavailable: With `once`, the events Redis does not answer.
    """
    stop, telemetry = stop or threading.Event(), telemetry or Telemetry()
    if trouble is None:
        stop_on_signals(stop)
    # Opened now and not when the log first answers: until then a link may have moved.
    # It reads the items only, and what is read is hashed then.
    opened = open_bundle(bundle, bundle_id, later=FILES) if bundle else None
    with connect(events_redis_url, _TIMEOUT_S) as client:
        partitions = partitions_for(client, partitions) if once else awaited_partitions(client, partitions, stop)
        log = EventLog(client, partitions, default=default)
        settings = {"flush_s": flush_s, "days": days, "ledger": ledger, "telemetry": telemetry}
        new_writer = partial(_new_writer, log, out, CatalogLog(client), opened, settings)
        lag = _run_once(new_writer()) if once else _run_until(stop, new_writer, ready, trouble)
    counters = telemetry.counters()
    counts = {name: counters.get(f"warehouse_{counter}", 0) for name, counter in _COUNTED.items()}
    return {"out": str(out), "partitions": partitions, "lag": lag, **counts}


def drop(events_redis_url: str, partitions: int | None = None) -> dict[str, Any]:
    """Drops the warehouse's consumer group for good: the log keeps nothing for it any more.

    A warehouse that is started later begins with the oldest entry that the log still holds.

    Args:
        events_redis_url: The events Redis.
        partitions: Partitions of the event log; None: as the log says.

    Returns:
        `partitions`, and how many consumer `groups` were dropped.

    Raises:
        ConfigError: The URL is wrong, a warehouse runs, or some erasures have not reached its files.
        EventLogUnavailable: The events Redis does not answer; a repeat is safe.
    """
    with connect(events_redis_url, _TIMEOUT_S) as client:
        partitions = partitions_for(client, partitions)
        log = EventLog(client, partitions)
        log.open()
        # Their certificates would wait for a group that is gone.
        waiting = [
            certificate
            for certificate in Certificates(log).pending()
            if any(receipt.store == GROUP and not receipt.purged_at for receipt in certificate.stores)
        ]
        if waiting:
            raise ConfigError(
                f"{len(waiting)} erasures have not reached the Parquet: run penchant warehouse --once first"
            )
        dropped = Consumer(log, GROUP, "").drop() + Consumer(log, GROUP, "", stream="impressions").drop()
        WarehousePositions(log).forget(range(partitions))
        return {"partitions": partitions, "groups": dropped}


def _new_writer(
    log: EventLog, out: Path, catalog: CatalogLog, bundle: Bundle | None, settings: dict[str, Any]
) -> WarehouseWriter:
    # The system's pool can give back what it has freed; Arrow's own grows for hours with the files of a day.
    pa.set_memory_pool(pa.system_memory_pool())
    files = WarehouseFiles(out)
    items = ItemTable(out / "items.parquet", catalog, bundle)
    return WarehouseWriter(log, files, items, place=WarehousePlace(log, files), **settings)


def _run_once(writer: WarehouseWriter) -> int | None:
    """Writes what the log holds now; returns the lag afterwards."""
    try:
        writer.open()
        writer.drain()
    finally:
        writer.close()
    return _lag(writer)


def _run_until(
    stop: threading.Event,
    new_writer: Callable[[], WarehouseWriter],
    ready: Callable[[dict[str, Any]], None],
    trouble: Trouble | None,
) -> int | None:
    """Writes until `stop` is set; returns the lag afterwards."""
    patient, first = trouble is not None, new_writer()
    reporter = (trouble or Trouble(lambda _: None)).reporter("warehouse")

    def write(report: Report) -> None:
        # A writer that has failed has given up what it held: the next attempt takes a new one.
        new_writer().run(stop, report, patient=patient)

    ready({"pid": os.getpid(), "partitions": first.partitions, "lag": _lag(first)})
    keep_running("warehouse", write, stop, reporter, patient=patient)
    return _lag(first)


def _lag(writer: WarehouseWriter) -> int | None:
    try:
        return sum(writer.lag())
    except ServingError:  # the log is unreachable, or no warehouse has read it yet
        return None
