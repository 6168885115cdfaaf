"""The durable log of catalogue changes: every worker follows it, and a new one catches up from its compacted state.

Changes are counted by version. Of each item only the latest is kept, so the log grows with the catalogue and not with
time, and applying a change twice, or a later one early, does no harm. A reader that fell behind the stream of versions
gets the whole compacted state instead, without noticing.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
        kind: "put" (all of an item) and "delete" replace what was said of it before; "availability" and "patch" (some
            of its fields) add to that.
        item_id: The item.
        payload: What readers need to apply it; opaque here, but of a patch: a JSON object, the new value by field.
        version: Version of the catalogue that it made; 0 before it was put.
    """

    kind: Kind
    item_id: str
    payload: bytes = b""
    version: int = 0


class Written(NamedTuple):
    """What became of changes: the version that holds them, and the places of those that are about a deleted item.

    These add to an item that is gone, so they are not in the log, whatever a worker knew of the item when it was asked.
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
        """Takes a client of `redis_client.connect`.

        Args:
            client: The events Redis.
            stream_length: Number of versions, at least, that a reader may be behind without reading all again.
            live_ms: Time since its last sign for which a worker counts as alive.
            cooldown_s: Longest pause between looks at a failed Redis.
            unsafe: Whether changes count on a Redis that may lose them.
        """
        self._nodes = RedisRouter(client, CatalogLogUnavailable, cooldown_s, guarded="" if unsafe else "events")
        self._length = stream_length
        self._live_ms = live_ms
        # Half a client's timeout is left for the way there and back.
        self._longest_block_ms = max(1, int(500 * self._nodes.timeout_s))

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
        version, refused = 0, list[int]()
        for start in range(0, len(changes), _BATCH):
            batch = changes[start : start + _BATCH]
            words = [word for change in batch for word in (change.kind, change.item_id, _payload(change))]
            call = ScriptCall(CATALOG_PUT, (_VERSION, _ITEMS, _STREAM), (self._length, *words))
            reached, places = self._nodes.run(call)
            version, refused = int(reached), [*refused, *(start + int(place) for place in places)]
        return Written(version or self.version(), tuple(refused))

    def version(self) -> int:
        """The newest version, 0 before the first change.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        return int(self._nodes.command("GET", _VERSION) or 0)

    def snapshot(self, after: int = 0) -> tuple[int, list[Change]]:
        """A version, and what is to be applied, in this order, to get there from version `after`.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        # The version first: what changes during the scan is of a later one, and comes again with `tail`.
        version = self.version()
        return version, _ordered(_changes(self._nodes.scan(_ITEMS, _PAGE)), after)

    def tail(self, after: int, block_ms: int = 0) -> tuple[int, list[Change]]:
        """Follows the log.

        Args:
            after: Version that has been applied.
            block_ms: How long to wait for news where there are none.

        Returns:
            The version reached, and what is to be applied, in this order, to get there; `after` and nothing when
            there was no news. The version is lower than `after` only where the log was lost and begun anew.

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
            block = min(left_ms, self._longest_block_ms)
            self._nodes.command("XREAD", "COUNT", 1, "BLOCK", block, "STREAMS", _STREAM, f"{after}-0", at=_STREAM)

    def applied(self, worker: str, version: int) -> None:
        """Says that a worker has applied everything up to a version, and is alive; say it at least every second.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        self._nodes.run(ScriptCall(CATALOG_APPLIED, (_WORKERS,), (worker, version, _FORGET_MS)))

    def leave(self, worker: str) -> None:
        """Says that a worker is gone and need not be waited for.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        self._nodes.command("HDEL", _WORKERS, worker)

    def wait_all_applied(self, version: int, timeout_s: float, at_least: int = 0) -> bool:
        """Waits until every live worker has applied a version; false when one had not in time.

        Args:
            version: The version.
            timeout_s: Longest wait.
            at_least: Number of workers that there are known to be: one that has not come back from an absence of Redis
                has given no sign of life yet.

        Raises:
            CatalogLogUnavailable: Redis does not answer.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            count, lowest = self._nodes.run(ScriptCall(CATALOG_LOWEST, (_WORKERS,), (self._live_ms,)))
            if count >= at_least and (lowest is None or lowest >= version):
                return True
            if time.monotonic() + _POLL_S > deadline:
                return False
            time.sleep(_POLL_S)

    def _news(self, after: int) -> tuple[int, list[Change]]:
        """What the versions behind `after` changed; everything that is newer where the stream begins later."""
        entries = self._nodes.command("XRANGE", _STREAM, f"({after}-0", "+", "COUNT", _VERSIONS)
        if not entries or _version(entries[0][0]) != after + 1:
            return self.snapshot(after)
        names = list(dict.fromkeys(name for _, fields in entries for name in fields))
        payloads = self._nodes.command("HMGET", _ITEMS, *names)
        # A payload that is gone was replaced by a later version, which comes in its turn.
        found = _changes((name, payload) for name, payload in zip(names, payloads, strict=True) if payload is not None)
        return _version(entries[-1][0]), _ordered(found, after)


def _version(stream_id: bytes) -> int:
    return int(stream_id.partition(b"-")[0])


def _changes(fields: Iterable[tuple[bytes, bytes]]) -> list[tuple[tuple[int, int], Change]]:
    """Changes with their place in the log, from the fields of the hash: `kind:item` and `version-place:payload`."""
    found = []
    for name, value in fields:
        kind, _, item = name.partition(b":")
        stamp, _, payload = value.partition(b":")
        for made, part in _patches(payload) if kind == b"patch" else [(stamp, payload)]:
            version, _, place = made.partition(b"-")
            change = Change(kind.decode(), item.decode(), part, int(version))  # type: ignore[arg-type]
            found.append(((int(version), int(place)), change))
    return found


def _payload(change: Change) -> bytes:
    """What is stored of a change: of a patch, each field by itself, so that the log can keep the newest of each."""
    if change.kind != "patch":
        return change.payload
    fields = ((name.encode(), json.dumps(value).encode()) for name, value in json.loads(change.payload).items())
    # The script writes the version and the place, 0 here.
    return b"".join(b"%s:0:%d:%s" % (name, len(value), value) for name, value in fields)


def _patches(stored: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The patches of an item that the log keeps: `version-place` of each, and the fields of which it is the newest."""
    fields: dict[bytes, dict[str, bytes]] = {}
    at = 0
    while head := _FIELD.match(stored, at):
        at = head.end() + int(head[3])
        fields.setdefault(head[2], {})[head[1].decode()] = stored[head.end() : at]
    for stamp, values in fields.items():
        yield stamp, b"{%s}" % b", ".join(b'"%s": %s' % (name.encode(), value) for name, value in values.items())


def _ordered(found: list[tuple[tuple[int, int], Change]], after: int) -> list[Change]:
    return [change for _, change in sorted(found, key=lambda one: one[0]) if change.version > after]
