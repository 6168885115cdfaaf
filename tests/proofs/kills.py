"""Everything is killed at random while events come in and clients retry: nothing acknowledged is lost or there twice.

    python -m tests.proofs.kills [--count 200] [--rate 600] [--least 500] [--seed 0]

The service, its workers, the projector, the process that writes Parquet and both Redis are processes of their own and
get SIGKILL; all start again on the data they left. The clients live in this process, which is never killed, and write
each acknowledgement into a file. In the end that file is compared with the log, with every profile (which must be, bit
for bit, the fold of its user's events in log order) and with the Parquet.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import grpc
import numpy as np
import pyarrow.parquet as pq

from features.profile import Profile, empty, fold
from features.records import RECORD
from penchant.client import Client, event
from serving.log_retention import PROFILES_GROUP
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.consumer_group import Consumer
from serving.stores.event_log import EventLog
from serving.stores.log_entries import Entry
from serving.stores.profiles import ProfileStore
from serving.warehouse.place import GROUP
from tests.proofs.threads import WorkerThreads
from tests.serving.faults import insist, kill, wait_until
from tests.world import publish_world

ROOT = Path(__file__).parents[2]
PARTITIONS = 4
USERS = 500
BATCH = 100
SENDERS = 4
PATIENCE_S = 300.0
AGAIN = {grpc.StatusCode.UNAVAILABLE.value[0], grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]}
VICTIMS = {"worker": 6, "service": 2, "projector": 4, "sink": 4, "events": 2, "profiles": 2}
"""The processes that are killed, and their weights."""

SERVE = (
    "import json, sys; from serving.processes.supervisor import serve; from serving.config import ServeConfig; "
    "sys.exit(serve(ServeConfig.load(**json.loads(sys.argv[1]))))"
)
PROJECT = "import sys; from serving.projection.process import run; run(sys.argv[1], sys.argv[2], int(sys.argv[3]))"
SINK = (
    "import sys; from pathlib import Path; from serving.warehouse.process import run; "
    "run(sys.argv[1], Path(sys.argv[2]), partitions=int(sys.argv[3]), flush_s=0.5)"
)
HASTY_SINK = (
    "from serving.warehouse.stream_buffer import StreamBuffer; read = StreamBuffer.read\n"
    "def hasty(self, *words):\n"
    "    seen = read(self, *words)\n"
    "    for partition, entries in enumerate(self.entries):\n"
    "        self.consumer.acknowledge(partition, [entry.log_id for entry in entries])\n"
    "    return seen\n"
    "StreamBuffer.read = hasty\n" + SINK.replace("flush_s=0.5", "flush_s=5.0")
)
"""The control: it acknowledges entries before it writes them."""


class ProofError(AssertionError):
    """The proof failed, or could not be made; the message says at what."""


class Victim:
    """A process of ours that is killed with its children, and kept running otherwise."""

    def __init__(self, words: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self._words, self._log, self._environment = words, log, environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self) -> None:
        """Starts it unless it runs."""
        if self._process is None or self._process.poll() is not None:
            with self._log.open("a") as sink:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", *self._words],
                    cwd=ROOT,
                    env=os.environ | self._environment,
                    stdout=subprocess.DEVNULL,
                    stderr=sink,
                )

    @property
    def children(self) -> list[int]:
        """Process ids of what it has started."""
        found: list[int] = []
        if self._process and self._process.poll() is None:
            for path in Path(f"/proc/{self._process.pid}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has just ended
                    found += map(int, path.read_text().split())
        return found

    def kill(self) -> bool:
        """SIGKILL for it and all its children; False where it does not run."""
        if self._process is None or self._process.poll() is not None:
            return False
        children = self.children
        self._process.kill()
        self._process.wait()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True

    def kill_child(self, rng: random.Random) -> bool:
        """SIGKILL for one of its children; False where it has none."""
        children = self.children
        if not children:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(children), signal.SIGKILL)
        return True

    def end(self, number: int = signal.SIGTERM, seconds: float = 60.0) -> None:
        """Asks it to end and waits for that."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(seconds)


class Senders(WorkerThreads):
    """Clients that send events at a rate, repeat unacknowledged ones, and write the others into a ledger."""

    def __init__(self, target: str, ledger: Path, rate: float, prefix: str = "") -> None:
        """Takes the service, the file of acknowledged events, events to send a second, and the prefix of their ids."""
        super().__init__(SENDERS)
        self._prefix = prefix
        self.sent = self.acknowledged = self.retries = 0
        self.failed: list[BaseException] = []
        self._given_up = False
        self._target, self._every_s = target, BATCH * SENDERS / rate
        self._ledger: TextIO = ledger.open("w")
        self.begun = time.monotonic()

    def __exit__(self, kind: object, *_: object) -> None:
        self._given_up = kind is not None  # the service is no longer kept running
        self.stop()

    def stop(self) -> None:
        """Sends nothing new; returns when all sent events are acknowledged."""
        super().stop()
        self._ledger.close()

    def work(self, number: int) -> None:
        """Sends batches at the rate of one client, and repeats each until all its events are acknowledged."""
        rng = random.Random(number)
        due = time.monotonic()
        try:
            with Client(self._target, channels=2, timeout_s=5.0) as client:
                for batch in itertools.count():
                    due += self._every_s
                    # Behind the schedule it does not wait: events that a fault has delayed are sent nevertheless.
                    if self.stopping.wait(max(due - time.monotonic(), 0.0)):
                        return
                    names = [f"{self._prefix}{number}-{batch}-{place}" for place in range(BATCH)]
                    events = [self._event(rng, name) for name in names]
                    with self.lock:
                        self.sent += len(events)
                    while events and not self._given_up:
                        events = self._try(client, events)
        except BaseException as error:
            self.failed.append(error)
            raise

    def _event(self, rng: random.Random, name: str) -> Any:
        kind = rng.choice(["view_item", "like", "select_item"])
        return event(f"p{rng.randrange(USERS)}", f"i{rng.randrange(40)}", kind, event_id=name)

    def _try(self, client: Client, events: list[Any]) -> list[Any]:
        """Sends events once; those that were not acknowledged."""
        try:
            statuses = client.ingest(events)
        except grpc.RpcError:
            with self.lock:
                self.retries += 1
            time.sleep(0.05)
            return events
        left, lines = [], []
        for one, status in zip(events, statuses, strict=True):
            if status.code == 0:
                lines.append(f"{one.event_id} {status.profile_version}\n")
            elif status.code in AGAIN:
                left.append(one)
            else:
                raise ProofError(f"an event was refused: {status.message}")
        with self.lock:
            self.acknowledged += len(lines)
            self._ledger.write("".join(lines))
            self._ledger.flush()
        return left


def kills(
    count: int = 200,
    *,
    rate: float = 600.0,
    pause_s: float = 2.0,
    seed: int = 0,
    sink: str = SINK,
    victims: Sequence[str] = (),
) -> dict[str, Any]:
    """Kills `count` times, then compares the ledger with what is there.

    Args:
        count: Number of kills.
        rate: Events a second that the clients send.
        pause_s: Mean time between two kills; at least half a second's events are acknowledged in between.
        seed: Seed of victims and moments.
        sink: Program of the process that writes Parquet.
        victims: What is killed, in this order; drawn by the weights of `VICTIMS` where there is none.

    Returns:
        `kills` {victim: number}, `acknowledged`, `retries`, `seconds`, `rate` (acknowledged a second while there were
        kills), `lost` {log, profile, parquet}, `doubled` {log, profile, parquet}.

    Raises:
        ProofError: Nothing comes through any more, or an event was refused.
    """
    rng = random.Random(seed)
    order = [*victims] or rng.choices(list(VICTIMS), list(VICTIMS.values()), k=count)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        events = stack.enter_context(RedisServer(folder, "events"))
        profiles = stack.enter_context(RedisServer(folder, "profiles"))
        log = EventLog(stack.enter_context(connect(events.url, 5.0)), PARTITIONS, cooldown_s=0.05)
        store = ProfileStore(stack.enter_context(connect(profiles.url, 5.0)), PARTITIONS, cooldown_s=0.05)
        ledger, out = folder / "ledger", folder / "warehouse"
        target, settings = _settings(folder, profiles.url, events.url)
        ours = {
            "service": Victim([SERVE, json.dumps(settings)], folder / "serve.log"),
            "projector": Victim([PROJECT, profiles.url, events.url, str(PARTITIONS)], folder / "projector.log"),
            "sink": Victim([sink, events.url, str(out), str(PARTITIONS)], folder / "sink.log"),
        }
        for victim in ours.values():
            victim.keep()
            stack.callback(victim.kill)
        with Client(target) as client:
            client.wait_ready(PATIENCE_S)
        with Senders(target, ledger, rate) as senders:
            done = _kill_all(order, senders, ours, {"events": events, "profiles": profiles}, rng, rate, pause_s)
            seconds = time.monotonic() - senders.begun
            while_killed = senders.acknowledged
            _tended(ours, senders.stop)
        if senders.failed:
            raise ProofError(f"a client failed: {senders.failed[0]!r}; {_last_words(folder)}")
        _tended(ours, lambda: _await_end(log))
        ours["sink"].end()
        said = {
            "kills": dict(sorted(done.items())),
            "redis_restarts": {"events": events.restarts, "profiles": profiles.restarts},
            "sent": senders.sent,
            "acknowledged": senders.acknowledged,
            "retries": senders.retries,
            "seconds": round(seconds, 1),
            "rate": round(while_killed / seconds, 1),
        }
        return said | compare(_read_ledger(ledger), logged(log), store, parquet_rows(out))


def compare(
    ledger: dict[str, int], entries: dict[str, list[Entry]], store: ProfileStore, rows: list[tuple[str, int]]
) -> dict[str, Any]:
    """Counts what is lost of a ledger, and what is there twice.

    Args:
        ledger: Event id -> log id of what was acknowledged.
        entries: The log's events by subject, in log order.
        store: The profiles.
        rows: Event id and log id of each row of the Parquet.
    """
    places = Counter((entry.event_id, entry.log_id) for own in entries.values() for entry in own)
    names = Counter(event_id for event_id, _ in places.elements())
    written, in_rows = Counter(rows), Counter(event_id for event_id, _ in rows)
    missing = extra = 0
    for subject, own in entries.items():
        records = np.frombuffer(b"".join(entry.record for entry in own), RECORD)
        expected, found = fold(empty(), records, own[-1].log_id), store.read(subject)
        missing += max(expected.count - found.count, 0)
        extra += max(found.count - expected.count, 0)
        if expected.count == found.count and _bytes(expected) != _bytes(found):
            missing, extra = missing + 1, extra + 1  # as many, and not the same
    return {
        "lost": {
            "log": sum(pair not in places for pair in ledger.items()),
            "profile": missing,
            "parquet": sum(pair not in written for pair in ledger.items()),
        },
        "doubled": {
            "log": sum(number - 1 for number in names.values()),
            "profile": extra,
            "parquet": sum(number - 1 for number in in_rows.values()),
        },
    }


def _bytes(profile: Profile) -> tuple[bytes, bytes, int]:
    """Returns the parts of a profile that must be the same, bit for bit."""
    return profile.records.tobytes(), profile.older_items.tobytes(), profile.version


def logged(log: EventLog) -> dict[str, list[Entry]]:
    """Returns the events of a log by subject, in log order."""
    found: dict[str, list[Entry]] = {}
    for partition in range(log.partitions):
        after = 0
        while page := log.read(partition, after, 5000):
            after = page[-1].log_id
            for entry in page:
                if entry.subject:
                    found.setdefault(entry.subject, []).append(entry)
    return found


def parquet_rows(out: Path) -> list[tuple[str, int]]:
    """Event id and log id of each row of the events."""
    found: list[tuple[str, int]] = []
    for file in sorted(out.glob("events/date=*/*.parquet")):
        table = pq.ParquetFile(file).read(columns=["event_id", "log_id"])
        found += zip(table["event_id"].to_pylist(), table["log_id"].to_pylist(), strict=True)
    return found


def _kill_all(
    order: Sequence[str],
    senders: Senders,
    ours: dict[str, Victim],
    servers: dict[str, RedisServer],
    rng: random.Random,
    rate: float,
    pause_s: float,
) -> Counter[str]:
    done: Counter[str] = Counter()
    for name in order:
        wanted, due = senders.acknowledged + rate / 2, time.monotonic() + rng.random() * 2 * pause_s
        late = time.monotonic() + PATIENCE_S
        while True:
            for victim in ours.values():
                victim.keep()
            if time.monotonic() >= due and senders.acknowledged >= wanted and _killed(name, ours, servers, rng):
                done[name] += 1
                break
            if senders.failed or time.monotonic() > late:
                raise ProofError(f"nothing comes through any more after {dict(done)}: {senders.failed}")
            time.sleep(0.02)
    return done


def _killed(name: str, ours: dict[str, Victim], servers: dict[str, RedisServer], rng: random.Random) -> bool:
    if name in servers:
        kill(servers[name])
        return True
    return ours["service"].kill_child(rng) if name == "worker" else ours[name].kill()


def _tended(ours: dict[str, Victim], work: Callable[[], None]) -> None:
    """Does some work while everything of ours is kept running."""
    over = threading.Event()

    def tend() -> None:
        while not over.wait(0.05):
            for victim in ours.values():
                victim.keep()

    thread = threading.Thread(target=tend)
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()


def _await_end(log: EventLog) -> None:
    """Waits until both consumers have done all that the log holds."""
    for group in (PROFILES_GROUP, GROUP):
        reader = Consumer(log, group, "looks only")
        insist(reader.open, PATIENCE_S)
        wait_until(lambda reader=reader: sum(reader.lag()) == 0, PATIENCE_S)


def _settings(folder: Path, profiles: str, events: str) -> tuple[str, dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{probe.getsockname()[1]}"
    bundle = publish_world(folder / "bundle")
    own = {"listen": target, "redis": profiles, "events_redis": events, "partitions": PARTITIONS, "workers": 2}
    own["state_dir"] = str(folder / "state")
    return target, own | {"bundle": str(bundle), "projector": False, "warehouse": False, "redis_timeout_ms": 1000}


def _read_ledger(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in path.read_text().splitlines())
    return {event_id: int(log_id) for event_id, log_id in pairs}


def _last_words(folder: Path) -> str:
    return " | ".join(line for path in sorted(folder.glob("*.log")) for line in path.read_text().splitlines()[-3:])


def held(said: dict[str, Any]) -> bool:
    """Returns True if nothing was lost or doubled."""
    return not any(number for what in ("lost", "doubled") for number in said[what].values())


def main() -> None:
    """Prints one line of JSON; the status is 1 where the proof failed, or too little was in flight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--rate", type=float, default=600.0, help="events a second that are sent")
    parser.add_argument("--least", type=float, default=500.0, help="events a second that must be acknowledged")
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    control = kills(rate=words.rate, seed=words.seed, sink=HASTY_SINK, victims=["sink"] * 4)
    said = kills(words.count, rate=words.rate, seed=words.seed)
    lost = {name: control[name] for name in ("kills", "acknowledged", "lost", "doubled")}
    print(json.dumps(said | {"control": {"sink that acknowledges first": lost}}))
    if not held(said) or not control["lost"]["parquet"]:
        raise SystemExit("the proof failed")
    if said["rate"] < words.least:
        raise SystemExit(f"no proof: {said['rate']} events a second were in flight, and {words.least} are asked for")


if __name__ == "__main__":
    main()
