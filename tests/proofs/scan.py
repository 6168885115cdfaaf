"""Looks for traces of a user in everything that a service has written: memory, files of Redis, Parquet, logs.

Files are decoded. The base of an append-only file is compressed, and so is what DUMP answers: a server of our own, that
compresses nothing, loads a copy of it and dumps every value, which shows what was deleted from a stream but is still in
its bytes. What follows the base is plain text. Every column of the Parquet is read, and the statistics with them.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import redis

from features.keys import item_key
from serving.redis.client import connect
from serving.redis.embedded import RedisServer, Role
from serving.stores.event_log import EventLog

ROLES: tuple[Role, ...] = ("profiles", "events")


@dataclass(frozen=True)
class Traces:
    """The traces of a user.

    Attributes:
        words: What they are called and what they said: ids, event ids, attributes, queries.
        items: Items that only they touched; a profile holds their keys.
        retries: Names of the keys that recognise retries of their events.
    """

    words: tuple[str, ...]
    items: tuple[str, ...]
    retries: tuple[bytes, ...]

    @classmethod
    def of(
        cls, subject: str, event_ids: Sequence[str], words: Sequence[str], items: Sequence[str], partitions: int
    ) -> Traces:
        """Returns those of a user."""
        with connect("unix:///nowhere") as client:
            log = EventLog(client, partitions)
            keys = tuple(log.seen_of(subject, name) for name in event_ids)
        return cls((subject[2:], *event_ids, *words), tuple(items), keys)

    def in_bytes(self, content: bytes) -> bool:
        """Returns True if some bytes hold any trace."""
        keys = [struct.pack("<Q", item_key(item)) for item in self.items]
        return any(trace in content for trace in (*(word.encode() for word in self.words), *keys, *self.retries))


def found(state: Path, traces: Traces) -> set[str]:
    """Returns the files below the state directory of a stopped service that hold any trace.

    `profiles file` and `events file` are the files of the two Redis, decoded, also where a later line of them deletes
    it. What a server started on them would hold is called `profile`, `events` and `impressions` (streams), `seen` (keys
    that recognise retries), `index` and so on, by its key. Tables of the warehouse are called `warehouse NAME`, the
    rest as its file.
    """
    places = set()
    for role in ROLES:
        if _in_files(state / role, role, traces):
            places.add(f"{role} file")
        with _copy_running(state / role, role) as client:
            places |= _in_memory(client, traces)
    for path in (path for path in state.rglob("*") if path.is_file()):
        name, *below = path.relative_to(state).parts
        if name == "warehouse" and path.suffix == ".parquet":
            if traces.in_bytes(_parquet(path)):
                places.add(f"warehouse {below[0].removesuffix('.parquet')}")
        elif "appendonlydir" not in below and traces.in_bytes(path.read_bytes()):
            places.add(str(path.relative_to(state)))
    return places


def _in_memory(client: redis.Redis, traces: Traces) -> set[str]:
    """Under what kinds of keys a running server holds any of it, deleted entries of a stream included."""
    return {
        key.split(b":")[-1 if key.count(b":") < 2 else 2].decode()
        for key in client.scan_iter(count=1000)
        if traces.in_bytes(key) or traces.in_bytes(client.dump(key) or b"")
    }


def _in_files(directory: Path, role: Role, traces: Traces) -> bool:
    for path in (directory / "appendonlydir").iterdir():
        if path.name.endswith(".base.rdb"):
            with _copy_running(directory, role, only=path.name) as client:
                if _in_memory(client, traces):
                    return True
        elif traces.in_bytes(path.read_bytes()):
            return True
    return False


@contextlib.contextmanager
def _copy_running(directory: Path, role: Role, only: str = "") -> Iterator[redis.Redis]:
    """A server that compresses nothing, on a copy of the files; on one base alone where `only` names it."""
    with tempfile.TemporaryDirectory() as name:
        copied = Path(name) / role / "appendonlydir"
        copied.parent.mkdir()
        shutil.copytree(directory / "appendonlydir", copied)
        if only:
            [manifest] = copied.glob("*.manifest")
            number = only.split(".")[-3]
            manifest.write_text(f"file {only} seq {number} type b\n")
        with RedisServer(Path(name), role) as server, connect(server.url, 30.0) as client:
            client.config_set("rdbcompression", "no")
            yield client


def _parquet(path: Path) -> bytes:
    """Every value and every statistic of a file, as text."""
    with pq.ParquetFile(path) as file:
        rows = file.read().to_pylist()
        footer = file.metadata.to_dict()
    return repr((rows, footer)).encode()
