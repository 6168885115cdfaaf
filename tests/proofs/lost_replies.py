"""The reply is lost after Redis has done the work, and the caller asks again: one effect all the same.

    python -m tests.proofs.lost_replies [--count 1000]

A proxy before a real Redis lets requests through and cuts the connection in place of the reply. The control is what a
default redis-py client makes of a bare XADD there: it retries by itself, and every retry is another entry.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import socket
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any, Self

import numpy as np
import redis

from features.records import make_records
from serving.errors import Unavailable
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent
from serving.stores.profiles import ProfileStore

PARTITIONS = 4
USERS = 20
FUTURE = 4_000_000_000_000
NOBODY = "u:nobody"
WRITES = (b"EVALSHA", b"XADD")


class LossyProxy:
    """Stands before a Redis on a unix socket; swallows the reply to a write, and the connection with it, when told to.

    Only what changes data counts: a lost reply to a handshake or to a question would prove nothing.

    Attributes:
        path: Its own socket.
        lost: Number of replies swallowed.
    """

    def __init__(self, url: str, directory: Path) -> None:
        """Takes the URL of the server, and where to put the proxy's own socket."""
        self._server = url.removeprefix("unix://")
        self.path = directory / "proxy.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._due = 0
        self.lost = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address of the proxy."""
        return f"unix://{self.path}"

    def lose(self, replies: int) -> None:
        """Swallows the replies to so many of the next writes."""
        with self._lock:
            self._due = replies

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._server)
            threading.Thread(target=self._serve, args=(caller, server), daemon=True).start()

    def _serve(self, caller: socket.socket, server: socket.socket) -> None:
        """Forwards the bytes of both sides, alternating, until one of them closes or a reply is swallowed."""
        writes = False
        with caller, server, contextlib.suppress(OSError):
            while True:
                for source in select.select([caller, server], [], [])[0]:
                    piece = source.recv(1 << 16)
                    if source is caller:
                        writes |= any(word in piece for word in WRITES)
                        server.sendall(piece)
                    if not piece or (source is server and writes and self._swallows()):
                        return
                    if source is server:
                        writes = False
                        caller.sendall(piece)

    def _swallows(self) -> bool:
        with self._lock:
            swallows = self._due > 0
            self._due -= swallows
            self.lost += swallows
            return swallows


def lost_replies(count: int = 1000, bare: int = 20) -> dict[str, Any]:
    """Loses the first reply to each of `count` appends and to each application to a profile, and repeats those.

    Args:
        count: Number of events.
        bare: Number of bare XADD by a default client, as a control.

    Returns:
        `lost_replies` {log, profile}, `doubled` {log, profile}, `missing` {log, profile}, and `control` {xadd, lost,
        doubled}.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        events = stack.enter_context(RedisServer(folder, "events"))
        profiles = stack.enter_context(RedisServer(folder, "profiles"))
        before_log = stack.enter_context(LossyProxy(events.url, folder / "events"))
        before_store = stack.enter_context(LossyProxy(profiles.url, folder / "profiles"))
        log = EventLog(stack.enter_context(connect(before_log.url, 20.0)), PARTITIONS, cooldown_s=0.0)
        store = ProfileStore(stack.enter_context(connect(before_store.url, 20.0)), PARTITIONS, cooldown_s=0.0)
        log.open()
        store.open()
        # The server learns the scripts, so that what is lost later is the reply of one that ran.
        log.append([_event(-1)])
        store.apply(NOBODY, [(1, _event(-1).record)])
        told: Counter[str] = Counter()
        duplicates = 0
        for number in range(count):
            one = _event(number)
            duplicates += _append(log, before_log, one, told)
        found = Counter(entry.event_id for partition in range(PARTITIONS) for entry in _all(log, partition))
        applied = _apply_all(log, store, before_store)
        counts = {f"u:{who}": store.read(f"u:{who}").count for who in range(USERS)}
        return {
            "events": count,
            "lost_replies": {"log": before_log.lost, "profile": before_store.lost},
            "answered_as_duplicates": duplicates,
            "missing": {
                "log": sum(f"e{number}" not in found for number in range(count)),
                "profile": sum(max(told[subject] - counts[subject], 0) for subject in counts),
            },
            "doubled": {
                "log": sum(found.values()) - len(found),
                "profile": sum(max(counts[subject] - told[subject], 0) for subject in counts),
            },
            "applied_again": applied,
            "control": _bare(events, before_log, bare),
        }


def _event(number: int) -> LoggedEvent:
    record = make_records(number + 2, 0, 0, FUTURE, np.nan, 1).tobytes()
    return LoggedEvent(f"u:{number % USERS}" if number >= 0 else NOBODY, f"e{number}", record, b"{}")


def _append(log: EventLog, proxy: LossyProxy, one: LoggedEvent, told: Counter[str]) -> bool:
    """Appends an event whose first reply is lost; whether the repeat was told that it was there already."""
    proxy.lose(1)
    for _ in range(5):
        try:
            [done] = log.append([one])
        except Unavailable:
            continue
        assert done.error is None
        told[one.subject] += 1
        return done.duplicate
    raise AssertionError("five tries, and one lost reply")


def _all(log: EventLog, partition: int) -> list[Any]:
    return log.read(partition, count=1_000_000)


def _apply_all(log: EventLog, store: ProfileStore, proxy: LossyProxy) -> int:
    """Applies every event, each with its first reply lost; returns how many applications were new in the repeat."""
    again = 0
    for partition in range(PARTITIONS):
        for entry in _all(log, partition):
            if entry.subject == NOBODY:
                continue
            proxy.lose(1)
            try:
                store.apply(entry.subject, [(entry.log_id, entry.record)])
            except Unavailable:
                again += store.apply(entry.subject, [(entry.log_id, entry.record)]).inserted
    return again


def _bare(server: RedisServer, proxy: LossyProxy, count: int) -> dict[str, int]:
    """Returns the results of a default client for bare XADDs whose first reply is lost."""
    before = proxy.lost
    with redis.Redis(unix_socket_path=str(proxy.path)) as client:  # from_url would not retry
        for number in range(count):
            proxy.lose(1)
            client.xadd("bare", {"n": number})
    with connect(server.url, 20.0) as client:
        found = Counter(fields[b"n"] for _, fields in client.xrange("bare"))
    return {"xadd": count, "lost": proxy.lost - before, "doubled": sum(found.values()) - len(found)}


def main() -> None:
    """Prints one line of JSON; the status is 1 where the proof failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="events whose first reply is lost")
    count = parser.parse_args().count
    said = lost_replies(count)
    print(json.dumps(said))
    spoiled = [number for what in ("missing", "doubled") for number in said[what].values() if number]
    if spoiled or min(said["lost_replies"].values()) < count or not said["control"]["doubled"]:
        raise SystemExit("the proof failed")


if __name__ == "__main__":
    main()
