"""How far the readers of the log are, and how large it is: read from Redis itself, whether or not its readers live."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from redis.exceptions import RedisError

from features.errors import PenchantError
from serving.log_retention import PROFILES_GROUP
from serving.observability.exposition import OTHER, Sample
from serving.redis.client import Client, Request, connect, servers
from serving.stores.catalog_log import CatalogLog
from serving.stores.event_log import EventLog
from serving.warehouse.place import GROUP

FRESH_S = 5.0
"""Time for which a look at the stores is good enough, in seconds: scrapes cannot load Redis."""

MOST_PARTITIONS = 64
"""Most partitions with labels of their own; of more, `all` has the sum, and the greatest age."""

_TIMEOUT_S = 1.0
_SAMPLES = 5
"""Nodes of a stream that Redis weighs to estimate its size."""

_READERS = {PROFILES_GROUP.encode(): "projector", GROUP.encode(): "warehouse"}


class StoreMetrics:
    """Looks at the Redis of the profiles and at that of the events; one thread at a time may call it."""

    def __init__(self, profiles_url: str, events_url: str, partitions: int, fresh_s: float = FRESH_S) -> None:
        """Takes where the stores are; nothing is asked before `look`."""
        self._clients: dict[str, Client] = {}
        self._logs: tuple[EventLog, CatalogLog] | None = None
        self._urls = {"profiles": profiles_url, "events": events_url}
        self._partitions, self._fresh_s = partitions, fresh_s
        self._found: tuple[list[Sample], int | None] = [], None
        self._looked = -fresh_s
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the connections."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def look(self) -> tuple[list[Sample], int | None]:
        """Returns the samples of those stores that answer, and the newest version of the catalogue."""
        with self._lock:
            if time.monotonic() - self._looked >= self._fresh_s:
                self._found = self._look()
                self._looked = time.monotonic()
            return self._found

    def _look(self) -> tuple[list[Sample], int | None]:
        samples: list[Sample] = []
        newest: int | None = None
        for store, url in self._urls.items():
            up = False
            with contextlib.suppress(PenchantError, RedisError, OSError):
                if store not in self._clients:
                    self._clients[store] = connect(url, _TIMEOUT_S)
                client = self._clients[store]
                samples += _server_samples(store, client)
                up = True
                if store == "events":
                    log, catalog = self._logs = self._logs or (EventLog(client, self._partitions), CatalogLog(client))
                    samples += _log_samples(log)
                    newest = catalog.version()
            samples.append(("penchant_redis_up", (store,), int(up)))
        return samples, newest


def _server_samples(store: str, client: Client) -> list[Sample]:
    memory = data = aof = 0
    for server in servers(client):
        found = server.info("memory")
        memory += int(found["used_memory"])
        data += int(found["used_memory_dataset"])
        aof += int(server.info("persistence").get("aof_current_size", 0))
    return [
        ("penchant_redis_memory_bytes", (store,), memory),
        ("penchant_redis_data_bytes", (store,), data),
        ("penchant_redis_aof_bytes", (store,), aof),
    ]


def _log_samples(log: EventLog) -> Iterator[Sample]:
    """Yields size and lag of both streams of every partition that can be read now."""
    clocks = log.clocks()
    totals: dict[tuple[str, tuple[str, ...]], float] = {}
    for stream in ("events", "impressions"):
        names: list[bytes] = [getattr(keys, stream) for keys in log.keys]
        questions: list[Request] = []
        for name in names:
            questions += [("XLEN", name), ("MEMORY USAGE", name, "SAMPLES", _SAMPLES), ("XINFO GROUPS", name)]
        answers = log.nodes.run_all(questions)
        groups: list[tuple[int, dict[str, Any]]] = []
        for partition, (length, size, found) in enumerate(zip(answers[::3], answers[1::3], answers[2::3], strict=True)):
            if isinstance(length, PenchantError):  # its server does not answer
                continue
            labels: tuple[str, ...] = (stream, _label(log, partition))
            for family, value in (("penchant_log_entries", length), ("penchant_log_bytes", size or 0)):
                totals[family, labels] = totals.get((family, labels), 0) + value
            if not isinstance(found, PenchantError):  # there is no such stream yet
                groups += [(partition, group) for group in found]
        for (partition, group), (entries, oldest) in zip(groups, _lags(log, names, groups), strict=True):
            clock = clocks[partition]
            if entries is None or clock is None:
                continue
            reader: tuple[str, ...] = (_READERS.get(group["name"], OTHER), stream, _label(log, partition))
            count, age = ("penchant_log_lag_entries", reader), ("penchant_log_lag_seconds", reader)
            seconds = 0.0 if oldest is None else max(0, clock - oldest) / 1000
            totals[count] = totals.get(count, 0) + entries
            totals[age] = max(totals.get(age, 0.0), seconds)
    for (family, labels), value in totals.items():
        yield family, labels, value


def _label(log: EventLog, partition: int) -> str:
    return str(partition) if log.partitions <= MOST_PARTITIONS else "all"


def _lags(
    log: EventLog, names: Sequence[bytes], groups: Sequence[tuple[int, dict[str, Any]]]
) -> Iterator[tuple[int | None, int | None]]:
    """Yields what each group has not acknowledged: entries, None where they cannot be told, and the time of the oldest.

    Args:
        log: The log.
        names: Its streams, by partition.
        groups: Partition and answer of XINFO GROUPS of each.
    """
    questions: list[Request] = []
    for partition, group in groups:
        questions.append(("XPENDING", names[partition], group["name"]))
        questions.append(("XRANGE", names[partition], b"(" + group["last-delivered-id"], "+", "COUNT", 1))
    answers = log.nodes.run_all(questions) if questions else []
    for (_, group), pending, unread in zip(groups, answers[::2], answers[1::2], strict=True):
        if isinstance(pending, PenchantError) or isinstance(unread, PenchantError):
            yield None, None
            continue
        # Redis does not know the lag where an entry was deleted that the group has not read: one is read, at least.
        behind = group["lag"] if group["lag"] is not None else len(unread)
        oldest: bytes | None = pending["min"] or (unread[0][0] if unread else None)
        yield int(pending["pending"]) + int(behind), None if oldest is None else int(oldest.partition(b"-")[0])
