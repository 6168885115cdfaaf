"""Workers and instances are stopped and killed while clients call: no call may fail but those that a kill cuts off.

    python -m tests.proofs.rolls [--stops 100] [--rolls 20] [--kills 5] [--rate 100] [--timeout S] [--node DIR]

*Stops*: a worker gets SIGTERM, and the next one does when all are ready again. *Rolls*: a second instance starts on the
same port, the first one gets SIGTERM when the second is ready, and is waited for. *Kills*: a worker gets SIGKILL. All
the time shipped clients call at their default timeout, RATE calls a second together; every tenth call is an event. So
do plain channels with the retry policy of the docs, Node's too where DIR holds node_modules with @grpc/grpc-js and
@grpc/proto-loader.

The control is the same with calls that are not tried again and instances that end at once; it must see failures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from penchant.client import Client, event
from penchant.v1 import common_pb2, ranking_pb2, ranking_pb2_grpc
from serving.redis.embedded import RedisServer
from tests.fixtures import START_S, Service, serving
from tests.world import publish_world

ROOT = Path(__file__).parents[2]
POLICY = (ROOT / "docs" / "retry-policy.json").read_text(encoding="utf-8")
CALLERS = 4
PLAIN_S = 2.0
"""Deadline of a plain channel's calls: its library waits a second before it connects again."""

BACK_S = 5.0
_DEFAULT_S = 0.25


class Load:
    """Callers that keep to a rate together, and what became of their calls.

    Attributes:
        calls: Number of calls that have ended.
        failures: Time, monotonic, and status of those that failed.
        slowest: The longest call, in seconds.
    """

    def __init__(self, call: Callable[[int], object], rate: float, callers: int = CALLERS) -> None:
        """Takes what to call with a number, and how many calls a second all callers make together."""
        self._call, self._pause, self._callers = call, callers / rate, callers
        self.calls = 0
        self.failures: list[tuple[float, str]] = []
        self.slowest = 0.0
        self._stop, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._callers, "caller")
        self._running = [self._pool.submit(self._run, number) for number in range(self._callers)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for running in self._running:
            running.result()
        self._pool.shutdown()

    def codes(self, since: float = 0.0) -> dict[str, int]:
        """Failures by status."""
        return dict(Counter(code for at, code in self.failures if at >= since))

    def _run(self, caller: int) -> None:
        due, number = time.monotonic(), caller
        while not self._stop.wait(max(due - time.monotonic(), 0.0)):
            begun, code = time.monotonic(), ""
            try:
                self._call(number)
            except grpc.RpcError as error:
                code = error.code().name  # type: ignore[attr-defined]
            ended = time.monotonic()
            with self._lock:
                self.calls += 1
                self.slowest = max(self.slowest, ended - begun)
                if code:
                    self.failures.append((ended, code))
            number += self._callers
            # A caller that was held up does not send all at once what it is late with.
            due = max(due + self._pause, ended - self._pause)


def shipped(client: Client, timeout_s: float | None = None) -> Callable[[int], object]:
    """Returns what a shipped client does with call number n."""

    def call(number: int) -> object:
        user = f"u{number % 50}"
        if number % 10 == 0:
            (status,) = client.ingest([event(user, f"i{number % 20}", "view_item")])
            return status
        options: Any = {} if timeout_s is None else {"timeout_s": timeout_s}
        return client.recommend(user_id=user, page_size=5, **options)

    return call


def plain(channel: grpc.Channel, timeout_s: float = PLAIN_S) -> Callable[[int], object]:
    """Returns what a plain channel does with call number n."""
    stub = ranking_pb2_grpc.RankingServiceStub(channel)

    def call(number: int) -> object:
        subject = common_pb2.Subject(user_id=f"u{number % 50}")
        options = ranking_pb2.RankingOptions(request_id=f"plain-{number}", subject=subject, page_size=5)
        return stub.Recommend(ranking_pb2.RecommendRequest(options=options), timeout=timeout_s)

    return call


def plain_channel(target: str, policy: str = POLICY) -> grpc.Channel:
    """Opens a channel as gRPC makes it, with a service config alone, which may be empty."""
    options = [("grpc.service_config", policy)] if policy else [("grpc.enable_retries", 0)]
    return grpc.insecure_channel(target, options=[*options, ("grpc.use_local_subchannel_pool", 1)])


def readiness(address: str, path: str = "/readyz") -> tuple[int, dict[str, Any]]:
    """Returns status and body of a page of the health address; status 0 where nothing answers."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
    except OSError:
        return 0, {}


class Fleet:
    """Instances of one service on one port and one pair of Redis, one after the other.

    Attributes:
        target: Where they listen.
        service: The one that stays for now.
    """

    def __init__(self, bundle: Path, root: Path, redis: tuple[str, str], **settings: Any) -> None:
        """Takes what the instances have in common; each has a state directory of its own below `root`."""
        common = {"share_port": True, "workers": 2, "health_listen": "127.0.0.1:0", "redis_timeout_ms": 200}
        self._settings = {"redis": redis[0], "events_redis": redis[1], **common, **settings}
        self._bundle, self._root, self._stack = bundle, root, contextlib.ExitStack()
        self._started, self.target = 0, "127.0.0.1:0"
        self.service: Service

    def __enter__(self) -> Fleet:
        self.service = self._start(self._stack)
        self.target = self.service.target
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> Service:
        self._started += 1
        state = self._root / f"state-{self._started}"
        return stack.enter_context(serving(self._bundle, state, listen=self.target, **self._settings))

    def roll(self) -> int:
        """Starts another instance on the port and stops the one before; returns the exit status of that one."""
        with contextlib.ExitStack() as coming:
            service = self._start(coming)
            status = self.service.stop()
            self._stack.close()
            self._stack, self.service = coming.pop_all(), service
            return status

    def workers(self) -> list[int]:
        """Returns the processes of the workers now."""
        parent = self.service.ready["pid"]
        children = [int(pid) for tasks in Path(f"/proc/{parent}/task").glob("*/children") for pid in _read(tasks)]
        return [pid for pid in children if _listens(pid, int(self.target.rpartition(":")[2]))]

    def hit(self, number: int, place: int) -> float:
        """Sends a signal to a worker and waits until as many are ready as before; returns the seconds that took."""
        pids = self.workers()
        begun = time.monotonic()
        os.kill(pids[place % len(pids)], number)
        self.wait(lambda state: state["workers"]["ready"] < state["workers"]["of"])
        self.wait(lambda state: state["workers"]["ready"] == state["workers"]["of"])
        return time.monotonic() - begun

    def wait(self, good: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until /readyz says something."""
        end = time.monotonic() + START_S
        while not good(readiness(self.service.ready["health"])[1]):
            assert time.monotonic() < end, readiness(self.service.ready["health"])
            time.sleep(0.02)


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _listens(pid: int, port: int) -> bool:
    """Returns True if a process holds a socket that listens on a port."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        lines = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        inodes |= {line[9] for line in lines if line[3] == "0A" and int(line[1].rpartition(":")[2], 16) == port}
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if descriptor.readlink().name.removeprefix("socket:[").removesuffix("]") in inodes:
                    return True
    return False


@contextlib.contextmanager
def node(target: str, rate: float, modules: Path | None) -> Iterator[dict[str, Any]]:
    """Runs the Node caller while the block does; what it found is in the dictionary afterwards."""
    found: dict[str, Any] = {}
    if modules is None:
        yield found
        return
    command = ["node", str(ROOT / "tests" / "proofs" / "rolls.js"), target, str(rate)]
    environment = os.environ | {"NODE_PATH": str(modules)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True) as run:
        yield found
        found.update(json.loads(run.communicate(timeout=60)[0]))


def prove(
    stops: int, rolls: int, kills: int, rate: float, timeout_s: float | None = None, modules: Path | None = None
) -> dict[str, Any]:
    """Runs everything; returns the figures, in which every number of failures but those of the kills must be 0."""
    figures: dict[str, Any] = {"rate": rate, "timeout_s": timeout_s or _DEFAULT_S}
    with _stores() as (bundle, root, redis), Fleet(bundle, root, redis) as fleet, contextlib.ExitStack() as stack:
        client = stack.enter_context(Client(fleet.target))
        client.wait_ready(START_S)
        channel = stack.enter_context(plain_channel(fleet.target))
        loads = {
            "shipped": stack.enter_context(Load(shipped(client, timeout_s), rate)),
            "plain": stack.enter_context(Load(plain(channel), rate / 5, 2)),
        }

        def phase(name: str, act: Callable[[], dict[str, Any]]) -> None:
            begun, before = time.monotonic(), {kind: load.calls for kind, load in loads.items()}
            figures[name] = act() | {"seconds": round(time.monotonic() - begun, 1)}
            time.sleep(PLAIN_S)
            for kind, load in loads.items():
                figures[name][kind] = {"calls": load.calls - before[kind], "failures": load.codes(begun)}

        with node(fleet.target, rate / 5, modules) as found:
            time.sleep(PLAIN_S)
            phase("quiet", lambda: time.sleep(5) or {})
            phase("stops", lambda: {"count": len([fleet.hit(signal.SIGTERM, place) for place in range(stops)])})
            phase("rolls", lambda: {"count": rolls, "status": [*{fleet.roll() for _ in range(rolls)}]})
        figures["node"] = found or "not run: give --node"
        phase("kills", lambda: {"back_s": [round(fleet.hit(signal.SIGKILL, place), 2) for place in range(kills)]})
        figures["slowest_s"] = {kind: round(load.slowest, 3) for kind, load in loads.items()}
    return figures


def control(rolls: int, rate: float) -> dict[str, Any]:
    """Runs rolls with nothing that saves a call: no call is tried again, and instances end at once."""
    with (
        _stores() as (bundle, root, redis),
        Fleet(bundle, root, redis, drain_delay_s=0, drain_s=0) as fleet,
        plain_channel(fleet.target, "") as channel,
        Load(plain(channel), rate, 8) as load,
    ):
        for place in range(rolls):
            fleet.roll()
            fleet.hit(signal.SIGKILL, place)
        return {"rolls": rolls, "calls": load.calls, "failures": load.codes()}


@contextlib.contextmanager
def _stores() -> Iterator[tuple[Path, Path, tuple[str, str]]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        with RedisServer(root / "p", "profiles") as profiles, RedisServer(root / "e", "events") as events:
            yield publish_world(root / "bundle"), root, (profiles.url, events.url)


def failed(figures: dict[str, Any]) -> int:
    """Returns the number of calls that failed and should not have."""
    phases = [figures[name] for name in ("stops", "rolls")]
    ours = sum(sum(phase[kind]["failures"].values()) for phase in phases for kind in ("shipped", "plain"))
    theirs = figures["node"]["failures"] if isinstance(figures["node"], dict) else {}
    return ours + sum(theirs.values())


def main() -> int:
    """Prints the figures as one line of JSON; status 1 where a call failed, a worker was late or the control passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("stops", 100), ("rolls", 20), ("kills", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--timeout", type=float, default=None)
    parser.add_argument("--node", type=Path, default=None)
    given = parser.parse_args()
    figures = prove(given.stops, given.rolls, given.kills, given.rate, given.timeout, given.node)
    figures["control"] = control(3, given.rate)
    late = [seconds for seconds in figures["kills"]["back_s"] if seconds > BACK_S]
    figures["passed"] = not failed(figures) and not late and bool(figures["control"]["failures"])
    print(json.dumps(figures))
    return 0 if figures["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
