"""The checks of a data set, made on the newest entries of a running service's log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from features.bundle import open_bundle
from features.bundle_tables import read_items
from features.tables.dataset import conform
from features.tables.evidence import Evidence
from features.tables.schema import EVENTS, EVENTS_REQUIRED, IMPRESSIONS, IMPRESSIONS_REQUIRED
from features.tables.validate import judge
from serving.redis.client import connect
from serving.stores.catalog_log import CatalogLog
from serving.stores.event_log import EventLog
from serving.stores.log_entries import Entry
from serving.stores.meta import partitions_of
from serving.warehouse.tables import event_tables, impression_table

MOST = 100_000
"""Newest events that are checked by default."""

_TIMEOUT_S = 5.0
_PAGE = 1000


def validate_live(
    events_redis_url: str, bundle: Path | None = None, allow: Mapping[str, float] | None = None, most: int = MOST
) -> dict[str, Any]:
    """Checks the newest events of a log, and the slates it still holds.

    Args:
        events_redis_url: The events Redis, as `penchant serve` names it when it is ready.
        bundle: Names the items that were never put while the service ran; without it items are not checked.
        allow: Shares that take the place of those in `features.tables.validate.LIMITS`.
        most: Number of newest events to check.

    Returns:
        See `features.tables.validate.judge`.

    Raises:
        ConfigError: The URL is wrong, or no event log is there.
        EventLogUnavailable: Redis does not answer.
        BundleError: The bundle is refused.
    """
    with connect(events_redis_url, _TIMEOUT_S) as client:
        log = EventLog(client, partitions_of(client))
        entries = _newest(log, most)
        slates = [entry for partition in range(log.partitions) for entry in _slates(log, partition)]
        items = None if bundle is None else _items(CatalogLog(client), bundle)
        now_ms = log.now_ms()
    events, _, damaged = event_tables(entries)
    impression_rows, damaged_slates = impression_table(slates)
    loaded = conform(events, EVENTS, EVENTS_REQUIRED, "the event log")
    impressions = conform(impression_rows, IMPRESSIONS, IMPRESSIONS_REQUIRED, "the impression log")
    evidence = Evidence(
        loaded.table, items, impressions.table, [*loaded.rejected, *impressions.rejected], now_ms=now_ms
    )
    return judge(evidence, allow) | {"damaged": damaged + damaged_slates}


def _newest(log: EventLog, most: int) -> list[Entry]:
    """Returns the newest events of all partitions, each partition's in log order."""
    entries: list[Entry] = []
    for partition in range(log.partitions):
        entries += log.newest(partition, most)
    if len(entries) <= most:
        return entries
    # Log ids begin with the time, so they compare across partitions.
    first = sorted(entry.log_id for entry in entries)[-most]
    return [entry for entry in entries if entry.log_id >= first]


def _slates(log: EventLog, partition: int) -> list[Entry]:
    slates: list[Entry] = []
    while page := log.read_impressions(partition, slates[-1].log_id if slates else 0, _PAGE):
        slates += page
    return slates


def _items(changes: CatalogLog, bundle: Path) -> pa.Array[Any]:
    opened = open_bundle(bundle)
    table = read_items(opened)
    _, changed = changes.snapshot()
    put = [change.item_id for change in changed if change.kind == "put"]
    return pa.array([*table["item_id"].to_pylist(), *put], pa.string())
