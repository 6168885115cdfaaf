"""The durable log of catalogue changes: every worker follows it, and a new one catches up from its compacted state.

Changes are counted by version. Of each item only the latest is kept, so the log grows with the catalogue and not with
time, and applying a change twice, or a later one early, does no harm. A reader that fell behind the stream of versions
gets the whole compacted state instead.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal, NamedTuple

from serving.errors import CatalogLogUnavailable
from serving.redis.client import Client
from serving.redis.connection import ScriptCall
from serving.redis.router import RedisRouter
from serving.stores.scripts import CATALOG_APPLIED, CATALOG_LOWEST, CATALOG_PUT

Kind = Literal["put", "patch", "availability", "delete"]

LIVE_MS = 3_000
"""Time since its last sign for which a worker counts as alive."""

_FORGET_MS = 20 * LIVE_MS
_PREFIX = b"penchant:{catalog}:"
_VERSION, _ITEMS, _STREAM, _WORKERS = (_PREFIX + name for name in (b"version", b"items", b"changes", b"workers"))
_BATCH = 1000
_PAGE = 200
_VERSIONS = 50  # read at once: each may hold a thousand changes
_POLL_S = 0.005
_FIELD = re.compile(rb"(\w+):([\d-]+):(\d+):")


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one item.

    Attributes:
        kind: "put" (all of an item) and "delete" replace earlier changes of it; "availability" and "patch" (some of its
            fields) add to them.
        item_id: The item.
        payload: The new state for readers, opaque here; of a patch a JSON object, the new value by field.
        version: Version of the catalogue that it made; 0 before it was put.
    """

    kind: Kind
    item_id: str
    payload: bytes = b""
    version: int = 0


class Written(NamedTuple):
    """The outcome of writing changes.

    Attributes:
        version: The version that holds them.
        refused: Places of the changes that add to a deleted item, and so are not in the log: the log decides, because a
            worker may not know yet that the item is gone.
    """

    version: int
    refused: tuple[int, ...]


class CatalogProgress:
    """The version of the catalogue that a worker has applied; any thread may wait for one.

    Attributes:
        version: The version.
    """

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self._changed = threading.Condition()

    def reach(self, version: int) -> None:
        """Notes that everything up to `version` is applied here; lower only where the log began again."""
        with self._changed:
            self.version = version
            self._changed.notify_all()

    def wait(self, version: int, seconds: float) -> bool:
        """Waits until `version` is applied; returns False if the time is over first."""
        if self.version >= version:
            return True
        with self._changed:
            return self._changed.wait_for(lambda: self.version >= version, max(seconds, 0.0))


class CatalogLog:
    """The log in the events Redis; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        *,
        stream_length: int = 10_000,
        live_ms: int = LIVE_MS,
        cooldown_s: float = 0.5,
        unsafe: bool = False,
    ) -> None:
        """Takes a client of `redis.client.connect`.

        Args:
            client: The events Redis.
            stream_length: Number of versions, at least, that a reader may be behind without reading all again.
            live_ms: Time since its last sign for which a worker counts as alive.
            cooldown_s: Longest pause between tries of a failed Redis.
            unsafe: True to acknowledge changes on a Redis that may lose them.
        """
        self._router = RedisRouter(client, CatalogLogUnavailable, cooldown_s, guarded="" if unsafe else "events")
        self._length = stream_length
        self._live_ms = live_ms
        # Half a client's timeout is left for the way there and back.
        self._longest_block_ms = max(1, int(500 * self._router.timeout_s))

    def put(self, changes: Sequence[Change]) -> int:
        """Makes changes durable, as `write` does; returns the version of the catalogue that holds them all."""
        return self.write(changes).version

    def write(self, changes: Sequence[Change]) -> Written:
        """Makes changes durable, in their order, but for those that add to a deleted item.

        Up to 1,000 changes are one version and become visible together.

        Raises:
            CatalogLogUnavailable: Redis does not answer; a repeat is safe.
            ResourceExhausted: Redis is full.
        """
        # In batches, because every other client of the server waits for each.
        version, refused = 0, list[int]()
        for start in range(0, len(changes), _BATCH):
            batch = changes[start : start + _BATCH]
            words = [word for change in batch for word in (change.kind, change.item_id, _payload(change))]
            call = ScriptCall(CATALOG_PUT, (_VERSION, _ITEMS, _STREAM), (self._length, *words))
            reached, places = self._router.run(call)
            version, refused = int(reached), [*refused, *(start + int(place) for place in places)]
        return Written(version or self.version(), tuple(refused))

    def version(self) -> int:
        """Returns the newest version, 0 before the first change.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        return int(self._router.command("GET", _VERSION) or 0)

    def snapshot(self, after: int = 0) -> tuple[int, list[Change]]:
        """Returns a version, and the changes that lead there from version `after`, in order.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        # The version first: a change during the scan is of a later version, and comes again with `tail`.
        version = self.version()
        return version, _ordered(_changes(self._router.scan(_ITEMS, _PAGE)), after)

    def tail(self, after: int, block_ms: int = 0) -> tuple[int, list[Change]]:
        """Follows the log.

        Args:
            after: Version that has been applied.
            block_ms: Longest wait for news.

        Returns:
            The version reached, and the changes that lead there, in order; `after` and no changes if there was no news.
            The version is lower than `after` only if the log was lost and has started again.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        deadline = time.monotonic() + block_ms / 1000
        while True:
            version = self.version()
            if version < after:
                return self.snapshot()
            if version > after:
                return self._news(after)
            left_ms = int(1000 * (deadline - time.monotonic()))
            if left_ms <= 0:
                return after, []
            # Shorter than the client's timeout, which would else take the wait for a dead server.
            block = min(left_ms, self._longest_block_ms)
            self._router.command("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", _STREAM, f"{after}-0", at=_STREAM)

    def applied(self, worker: str, version: int) -> None:
        """Gives a sign of life of a worker, at least every second, with the version that it has applied.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        self._router.run(ScriptCall(CATALOG_APPLIED, (_WORKERS,), (worker, version, _FORGET_MS)))

    def leave(self, worker: str) -> None:
        """Removes a worker, for which no one waits any more.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        self._router.command("HDEL", _WORKERS, worker)

    def wait_all_applied(self, version: int, timeout_s: float, at_least: int = 0) -> bool:
        """Waits until every live worker has applied a version; returns False if one has not in time.

        Args:
            version: The version.
            timeout_s: Longest wait.
            at_least: Number of workers that are known to exist: after an outage of Redis, some may have given no sign
                of life yet.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            count, lowest = self._router.run(ScriptCall(CATALOG_LOWEST, (_WORKERS,), (self._live_ms,)))
            if count >= at_least and (lowest is None or lowest >= version):
                return True
            if time.monotonic() + _POLL_S > deadline:
                return False
            time.sleep(_POLL_S)

    def _news(self, after: int) -> tuple[int, list[Change]]:
        """Returns the changes of the versions after `after`; the whole snapshot if the stream begins later."""
        entries = self._router.command("XRANGE", _STREAM, f"({after}-0", "+", "COUNT", _VERSIONS)
        # The stream is trimmed: what was cut off stands in the hash, with everything else.
        if not entries or _version(entries[0][0]) != after + 1:
            return self.snapshot(after)
        names = list(dict.fromkeys(name for _, fields in entries for name in fields))
        payloads = self._router.command("HMGET", _ITEMS, *names)
        # A payload that is missing was replaced by a later version, which comes in its turn.
        stored = ((name, payload) for name, payload in zip(names, payloads, strict=True) if payload is not None)
        return _version(entries[-1][0]), _ordered(_changes(stored), after)


def _version(stream_id: bytes) -> int:
    return int(stream_id.partition(b"-")[0])


def _changes(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[tuple[int, int], Change]]:
    """Returns changes with their place in the log, from fields of the hash: `kind:item` and `version-place:payload`."""
    changes = []
    for name, value in fields:
        kind, _, item = name.partition(b":")
        stamp, _, payload = value.partition(b":")
        for stamp_of_part, part in _patches(payload) if kind == b"patch" else [(stamp, payload)]:
            version, _, place = stamp_of_part.partition(b"-")
            change = Change(kind.decode(), item.decode(), part, int(version))  # type: ignore[arg-type]
            changes.append(((int(version), int(place)), change))
    return changes


def _payload(change: Change) -> bytes:
    """Returns the stored form of a change: of a patch each field by itself, as the log keeps the newest of each."""
    if change.kind != "patch":
        return change.payload
    fields = ((name.encode(), json.dumps(value).encode()) for name, value in json.loads(change.payload).items())
    # The script writes the version and the place, 0 here.
    return b"".join(b"%s:0:%d:%s" % (name, len(value), value) for name, value in fields)


def _patches(stored: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields the patches of an item that the log keeps: `version-place` of each, and the fields it is the newest of."""
    fields: dict[bytes, dict[str, bytes]] = {}
    at = 0
    while head := _FIELD.match(stored, at):
        at = head.end() + int(head[3])
        fields.setdefault(head[2], {})[head[1].decode()] = stored[head.end() : at]
    for stamp, values in fields.items():
        yield stamp, b"{%s}" % b", ".join(b'"%s": %s' % (name.encode(), value) for name, value in values.items())


def _ordered(placed: list[tuple[tuple[int, int], Change]], after: int) -> list[Change]:
    return [change for _, change in sorted(placed, key=itemgetter(0)) if change.version > after]
