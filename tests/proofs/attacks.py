"""A service under attack: good calls are answered, health always, memory stays, and nothing is left afterwards.

    python -m tests.proofs.attacks [--seconds 60] [--connections 1 40] [--settle 10] [--later 60] [--only NAME ...]

Each attack of `tests.proofs.attackers` runs in a process of its own against a service with one worker, once open to
all callers and once with TLS and a token that the attackers do not have. Meanwhile well-behaved clients recommend and
check the health, over connections that last and over new ones; an attack under which that falls short beside the other
service is repeated by itself. Later, each service is measured once more. In the end a server without bounds is
attacked, as a control: it is a failure if that does no harm. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penchant.client import Client
from tests.fixtures import serving
from tests.proofs.attackers import ATTACKS
from tests.world import publish_world

ROOT = Path(__file__).parents[2]
TOKEN = "the-token-of-the-proof"
DEADLINE_S = 10.0
"""Deadline of good calls: the machine may be busy, with the attackers at the least."""

MEMORY_MB = 100.0
PAUSE_S = 0.05
SURFACES = ("open", "TLS and token")
CONTROLS = ("open calls", "open health checks", "unread lists")
"""Attacks that stop a server without bounds, or fill its memory."""


@dataclass
class Target:
    """The service under attack: its address, a process id, and the needs of a caller."""

    listen: str
    pid: int
    token: str = ""
    authority: str = ""

    def channel(self) -> grpc.Channel:
        """A channel that shares no connection with others."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        address = self.listen.replace("127.0.0.1", "localhost") if self.authority else self.listen
        if self.authority:
            credentials = grpc.ssl_channel_credentials(Path(self.authority).read_bytes())
            return grpc.secure_channel(address, credentials, options)
        return grpc.insecure_channel(address, options)

    def client(self) -> Client:
        """A client of it."""
        roots = Path(self.authority).read_bytes() if self.authority else None
        address = self.listen.replace("127.0.0.1", "localhost") if self.authority else self.listen
        return Client(address, channels=2, timeout_s=DEADLINE_S, token=self.token or None, root_certificates=roots)

    def usage(self) -> tuple[float, int, int]:
        """Memory in MB, threads and descriptors of its process."""
        status = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        files = len(os.listdir(f"/proc/{self.pid}/fd"))
        return int(status["VmRSS"].split()[0]) / 1024, int(status["Threads"]), files


@dataclass
class Outcome:
    """The effect of an attack."""

    attack: str
    connections: int
    surface: str
    seconds: float
    good: dict[str, int] = field(default_factory=dict)
    health: dict[str, int] = field(default_factory=dict)
    slowest_ms: float = 0.0
    memory_mb: float = 0.0
    peak_mb: float = 0.0
    left_mb: float = 0.0
    left_threads: int = 0
    left_files: int = 0
    attacker: dict[str, int] = field(default_factory=dict)
    crashed: int = 0
    beside: Outcome | None = None
    """The outcome beside an attack on another service of the same machine, if it fell short and was repeated."""

    def note_left(self, usage: tuple[float, int, int], before: tuple[float, int, int]) -> None:
        """Takes what the process holds more than before: memory in MB, threads, descriptors."""
        self.left_mb, self.left_threads, self.left_files = (
            usage[0] - before[0], usage[1] - before[1], usage[2] - before[2],
        )  # fmt: skip

    def failures(self) -> list[str]:
        """Returns the list of what should not have happened."""
        wrong = []
        if share(self.good) < 0.99:
            wrong.append(f"good calls: {self.good}")
        if share(self.health) < 1.0:
            wrong.append(f"health checks: {self.health}")
        if self.peak_mb > MEMORY_MB:
            wrong.append(f"memory grew by {self.peak_mb:.0f} MB")
        if self.crashed:
            wrong.append(f"{self.crashed} attackers ended by themselves")
        if self.left_mb > MEMORY_MB or self.left_files > 4:
            wrong.append(f"left: {self.left_mb:.0f} MB, {self.left_files} descriptors")
        return [f"{self.attack}, {self.connections} connections, {self.surface}: {what}" for what in wrong]


def share(codes: dict[str, int]) -> float:
    """The share of calls that were answered; none at all counts as none."""
    return codes.get("OK", 0) / max(sum(codes.values()), 1)


def call(codes: Counter[str], what: Any) -> float:
    """Calls and counts the code; the seconds it took."""
    begun = time.monotonic()
    try:
        what()
        codes["OK"] += 1
    except grpc.RpcError as error:
        codes[f"{error.code().name}: {error.details()[:80]}"] += 1  # type: ignore[attr-defined]
    return time.monotonic() - begun


def check_health(channel: grpc.Channel) -> None:
    """Checks the health of the worker."""
    request = health_pb2.HealthCheckRequest()
    health_pb2_grpc.HealthStub(channel).Check(request, timeout=DEADLINE_S, wait_for_ready=True)


def attack(target: Target, name: str, connections: int, seconds: float, settle_s: float, surface: str = "") -> Outcome:
    """Attacks, measures, waits, and measures what is left."""
    return attack_all(target, [name], connections, seconds, settle_s, surface)


def attack_all(
    target: Target, names: Sequence[str], connections: int, seconds: float, settle_s: float, surface: str = ""
) -> Outcome:
    """Attacks in several ways at once."""
    outcome = Outcome(" + ".join(names), connections, surface, seconds)
    good, health = Counter[str](), Counter[str]()
    with target.client() as client, target.channel() as lasting:
        client.recommend(user_id="good", page_size=20)
        memory, threads, files = target.usage()
        attackers = [_attacker(target, name, connections, seconds) for name in names]
        try:
            for process in attackers:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            watcher = threading.Thread(target=_watch_health, args=(target, lasting, attackers, health))
            watcher.start()
            while running(attackers):
                took = call(good, lambda: client.recommend(user_id="good", page_size=20))
                outcome.slowest_ms = max(outcome.slowest_ms, took * 1e3)
                outcome.peak_mb = max(outcome.peak_mb, target.usage()[0] - memory)
                time.sleep(PAUSE_S)
            watcher.join()
            told = [json.loads(process.communicate()[0] or "{}") for process in attackers]
            outcome.crashed = sum(process.returncode != 0 for process in attackers)
        finally:
            for process in attackers:
                process.kill()
                process.wait()
                if process.stdout:
                    process.stdout.close()
        outcome.attacker = dict(sum((Counter(figures) for figures in told), Counter[str]()))
        left = _settled(target, memory, files, settle_s)
    outcome.good, outcome.health, outcome.memory_mb = dict(good), dict(health), memory
    outcome.note_left(left, (memory, threads, files))
    return outcome


def running(attackers: Sequence[subprocess.Popen[str]]) -> bool:
    """Returns True while an attacker goes on."""
    return any(process.poll() is None for process in attackers)


def _attacker(target: Target, name: str, connections: int, seconds: float) -> subprocess.Popen[str]:
    # Attackers come over a network and bring processors of their own. Here they share those of the service: at a lower
    # priority they still send whatever it has time to read, and take no time from its work.
    command = ["nice", "-n", "10", sys.executable, "-m", "tests.proofs.attackers", name, target.listen]
    command += ["--connections", str(connections), "--seconds", str(seconds)]
    if target.authority:
        command += ["--authority", target.authority, "--token", "not-the-token"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def _watch_health(
    target: Target, lasting: grpc.Channel, attackers: Sequence[subprocess.Popen[str]], codes: Counter[str]
) -> None:
    """Checks the health over a connection that lasts, and over new ones."""
    while running(attackers):
        call(codes, lambda: check_health(lasting))
        with target.channel() as channel:
            call(codes, lambda: check_health(channel))
        time.sleep(2 * PAUSE_S)


def _settled(target: Target, memory: float, files: int, settle_s: float) -> tuple[float, int, int]:
    """Waits until the process is as it was, at most so long; its usage."""
    end = time.monotonic() + settle_s
    while True:
        usage = target.usage()
        if time.monotonic() > end or (usage[0] < memory + MEMORY_MB / 2 and usage[2] <= files):
            return usage
        time.sleep(0.1)


@contextlib.contextmanager
def bare(*options: str) -> Iterator[Target]:
    """A server whose services only answer, while the block runs."""
    command = [sys.executable, "-m", "tests.proofs.bare", *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            ready = json.loads(process.stdout.readline())
            yield Target(ready["listen"], ready["workers"][0])
        finally:
            process.kill()


@contextlib.contextmanager
def _served(root: Path, surface: str) -> Iterator[Target]:
    settings: dict[str, Any] = {}
    target = Target("", 0)
    if surface == "TLS and token":
        openssl = shutil.which("openssl")
        assert openssl, "the proof makes a certificate with openssl"
        key, certificate = root / "key.pem", root / "cert.pem"
        command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "9", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        settings = {"tls_certificate": str(certificate), "tls_key": str(key), "token": TOKEN}
        target.token, target.authority = TOKEN, str(certificate)
    with serving(root / "bundle", root / surface.replace(" ", "-"), **settings) as service:
        target.listen, target.pid = service.target, service.ready["workers"][0]
        with target.client() as client:
            client.wait_ready()
            for _ in range(300):
                client.recommend(user_id="good", page_size=100)
        yield target


def run(
    seconds: float, connections: Sequence[int], settle_s: float, only: Sequence[str], later_s: float
) -> list[Outcome]:
    """Every attack, and what is left later; prints a line for each.

    Both surfaces are attacked at the same time, which halves the hours but has two services and two attackers share
    the machine. So an attack under which one of them falls short is repeated by itself, and that outcome counts; the
    first one stays in `beside`.
    """
    with contextlib.ExitStack() as services, ThreadPoolExecutor(len(SURFACES)) as pool:
        root = Path(services.enter_context(tempfile.TemporaryDirectory()))
        publish_world(root / "bundle")
        targets = {surface: services.enter_context(_served(root, surface)) for surface in SURFACES}
        before = {surface: target.usage() for surface, target in targets.items()}

        def attacked(name: str, number: int, surface: str) -> Outcome:
            outcome = attack(targets[surface], name, number, seconds, settle_s, surface)
            _tell(outcome)
            return outcome

        def attacked_beside(surface: str) -> list[Outcome]:
            return [attacked(name, number, surface) for name in only or ATTACKS for number in connections]

        outcomes = [outcome for outcomes in pool.map(attacked_beside, SURFACES) for outcome in outcomes]
        for at, outcome in enumerate(outcomes):
            if outcome.failures():
                outcomes[at] = attacked(outcome.attack, outcome.connections, outcome.surface)
                outcomes[at].beside = outcome
        time.sleep(later_s)
        for surface, target in targets.items():
            outcomes.append(_later(target, before[surface], later_s, surface))
            _tell(outcomes[-1])
        return outcomes


def _later(target: Target, before: tuple[float, int, int], seconds: float, surface: str) -> Outcome:
    """Measures the memory, threads and files that all attacks together left, and calls a few times."""
    outcome, good, health = Outcome("afterwards", 0, surface, seconds), Counter[str](), Counter[str]()
    with target.client() as client, target.channel() as channel:
        for _ in range(20):
            call(good, lambda: client.recommend(user_id="good", page_size=20))
            call(health, lambda: check_health(channel))
    usage = target.usage()
    outcome.good, outcome.health, outcome.memory_mb = dict(good), dict(health), before[0]
    outcome.note_left(usage, before)
    return outcome


def control(seconds: float, settle_s: float) -> list[Outcome]:
    """The attacks that a server without bounds does not stand."""
    outcomes = []
    for name in CONTROLS:
        with bare("--unbounded") as target:
            outcomes.append(attack(target, name, 4, seconds, settle_s, "no bounds"))
            _tell(outcomes[-1])
    return outcomes


def _tell(outcome: Outcome) -> None:
    line = (
        f"{outcome.attack}, {outcome.connections} connections, {outcome.surface}: good {share(outcome.good):.1%} of "
        f"{sum(outcome.good.values())}, health {share(outcome.health):.1%} of {sum(outcome.health.values())}, slowest "
        f"{outcome.slowest_ms:.0f} ms, memory {outcome.memory_mb:.0f} MB, peak {outcome.peak_mb:+.0f}, left "
        f"{outcome.left_mb:+.0f} MB, {outcome.left_threads:+d} threads, {outcome.left_files:+d} descriptors"
    )
    print(line, *outcome.failures(), sep="\n    ", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Attacks as the command line says; 1 if the service did not stand it, or the control did."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 40])
    parser.add_argument("--settle", type=float, default=10.0)
    parser.add_argument("--later", type=float, default=60.0, help="minutes between the last attack and the last look")
    parser.add_argument("--only", nargs="*", default=[], choices=ATTACKS)
    asked = parser.parse_args(arguments)
    outcomes = run(asked.seconds, asked.connections, asked.settle, asked.only, asked.later * 60)
    controls = control(min(asked.seconds, 15.0), 0.0)
    failures = [failure for outcome in outcomes for failure in outcome.failures()]
    failures += [f"the control stood {outcome.attack}" for outcome in controls if not outcome.failures()]
    print(
        json.dumps(
            {
                "attacks": len(outcomes),
                "repeated": sum(outcome.beside is not None for outcome in outcomes),
                "failures": failures,
                "good_least": min(share(outcome.good) for outcome in outcomes),
                "health_least": min(share(outcome.health) for outcome in outcomes),
                "peak_mb_most": round(max(outcome.peak_mb for outcome in outcomes), 1),
                "left_mb_most": round(max(outcome.left_mb for outcome in outcomes), 1),
                "rows": [asdict(outcome) for outcome in outcomes],
                "controls": [asdict(outcome) for outcome in controls],
            }
        )
    )
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
