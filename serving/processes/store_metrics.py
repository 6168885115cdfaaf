"""The metrics of the stores: their memory, the size of the log and the lag of its readers, whether or not these run."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

from redis.exceptions import RedisError

from features.errors import PenchantError
from serving.log_retention import PROFILES_GROUP
from serving.observability.exposition import OTHER, Sample
from serving.redis.client import Client, connect
from serving.redis.servers import figures_of
from serving.stores.catalog_log import CatalogLog
from serving.stores.event_log import EventLog
from serving.stores.log_figures import stream_figures
from serving.warehouse.place import GROUP

FRESH_S = 5.0
"""Time for which samples are reused, in seconds, so that scrapes cannot load Redis."""

MOST_PARTITIONS = 64
"""Most partitions with labels of their own; of more, `all` has the sum, and the greatest age."""

_TIMEOUT_S = 1.0
_READERS = {PROFILES_GROUP: "projector", GROUP: "warehouse"}


class StoreMetrics:
    """Samples the Redis of the profiles and that of the events; any thread may call it."""

    def __init__(self, profiles_url: str, events_url: str, partitions: int, fresh_s: float = FRESH_S) -> None:
        """Connects when the first samples are taken.

        Args:
            profiles_url: Redis of the profiles.
            events_url: Redis of the events.
            partitions: Number of partitions of the event log.
            fresh_s: Time for which samples are reused.
        """
        self._clients: dict[str, Client] = {}
        self._logs: tuple[EventLog, CatalogLog] | None = None
        self._urls = {"profiles": profiles_url, "events": events_url}
        self._partitions, self._fresh_s = partitions, fresh_s
        self._last: tuple[list[Sample], int | None] = [], None
        self._taken_at = -fresh_s
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def samples(self) -> tuple[list[Sample], int | None]:
        """Returns the samples of the stores that answer, and the newest version of the catalogue."""
        with self._lock:
            if time.monotonic() - self._taken_at >= self._fresh_s:
                self._last = self._take()
                self._taken_at = time.monotonic()
            return self._last

    def _take(self) -> tuple[list[Sample], int | None]:
        samples: list[Sample] = []
        newest: int | None = None
        for store, url in self._urls.items():
            is_up = False
            # One store that is down must not hide the metrics of the other.
            with contextlib.suppress(PenchantError, RedisError, OSError):
                if store not in self._clients:
                    self._clients[store] = connect(url, _TIMEOUT_S)
                client = self._clients[store]
                samples += _server_samples(store, client)
                is_up = True
                if store == "events":
                    log, catalog = self._logs = self._logs or (EventLog(client, self._partitions), CatalogLog(client))
                    samples += _log_samples(log)
                    newest = catalog.version()
            samples.append(("penchant_redis_up", (store,), int(is_up)))
        return samples, newest


def _server_samples(store: str, client: Client) -> list[Sample]:
    sizes = figures_of(client)
    return [
        ("penchant_redis_memory_bytes", (store,), sizes.memory),
        ("penchant_redis_data_bytes", (store,), sizes.data),
        ("penchant_redis_aof_bytes", (store,), sizes.aof),
    ]


def _log_samples(log: EventLog) -> Iterator[Sample]:
    """Yields size and lag of the streams; those of many partitions are summed up, to bound the number of labels."""
    clocks = log.clocks()
    totals: dict[tuple[str, tuple[str, ...]], float] = {}
    for figures in stream_figures(log):
        labels: tuple[str, ...] = (figures.stream, _label(log, figures.partition))
        for family, size in (("penchant_log_entries", figures.entries), ("penchant_log_bytes", figures.bytes)):
            totals[family, labels] = totals.get((family, labels), 0) + size
        # Ages are by the clock of the server that stamped the entries, not by that of this host.
        clock = clocks[figures.partition]
        if clock is None:
            continue
        for reader in figures.readers:
            reader_labels = (_READERS.get(reader.group, OTHER), *labels)
            entries, age = ("penchant_log_lag_entries", reader_labels), ("penchant_log_lag_seconds", reader_labels)
            seconds = 0.0 if reader.oldest_at is None else max(0, clock - reader.oldest_at) / 1000
            totals[entries] = totals.get(entries, 0) + reader.behind
            totals[age] = max(totals.get(age, 0.0), seconds)
    for (family, labels), value in totals.items():
        yield family, labels, value


def _label(log: EventLog, partition: int) -> str:
    return str(partition) if log.partitions <= MOST_PARTITIONS else "all"
