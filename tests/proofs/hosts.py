"""Several hosts on one pair of Redis, killed at random: one warehouse, and erasures that every host has confirmed.

    python -m tests.proofs.hosts [--hosts 3] [--kills 20] [--rate 500] [--canaries 100] [--seed 0]

Each host is a whole `penchant serve` with a state folder of its own; all get SIGKILL, and so do their children. Users
whose names no other text holds (canaries) are erased, a part of them while one host does not run. When a certificate
has all its dates, every byte of every file of every host is searched for its user, Parquet decoded, and so are the
files of both Redis. In the end what was acknowledged is compared with the one warehouse.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet as pq

from features.errors import PenchantError
from features.tables.validate import validate
from penchant.client import Client, event
from serving.privacy.certificates import Certificates
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from tests.proofs.kills import (
    PARTITIONS,
    PATIENCE_S,
    SERVE,
    ProofError,
    Senders,
    Victim,
    _await_end,
    _last_words,
    _read_ledger,
    _tended,
    compare,
    logged,
    parquet_rows,
)
from tests.serving.faults import insist, wait_until
from tests.world import publish_world

PURGE_S = 6.0
"""Time in which erasures are to leave the disks."""

UNREGISTERED = (
    "import sys\n"
    "roles = ('serving.processes.entrypoint', 'serving.processes.supervisor')\n"
    "if any(role in word for word in sys.orig_argv for role in roles):\n"
    "    import serving.jobs.host_keeper as h, serving.warehouse.place as p\n"
    "    p.WarehousePlace.take = lambda self: None\n"
    "    h.HostKeeper.catch_up = lambda self: 0\n"
    "    h.HostKeeper.run = lambda self, stop: None\n"
)
"""The control: no host and no warehouse registers with the log."""


class Fleet:
    """Some hosts, kept running but for those that are told to stay down."""

    def __init__(
        self,
        folder: Path,
        number: int,
        profiles: str,
        events: str,
        *,
        shared: bool,
        registered: bool,
        purge_s: float,
    ) -> None:
        """Says what runs where; `keep` starts it.

        Args:
            folder: Where everything lies.
            number: Number of hosts.
            profiles: URL of the profiles Redis.
            events: URL of the events Redis.
            shared: Give all hosts one folder for their Parquet, by different names of it.
            registered: False for the control.
            purge_s: Time in which erasures are to leave the disks.
        """
        self.folders = [folder / f"host{at}" for at in range(number)]
        self.targets, self.down = [], set[int]()
        bundle = publish_world(folder / "bundle")
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", "")]))}
        if not registered:
            control = folder / "control"
            control.mkdir()
            (control / "sitecustomize.py").write_text(UNREGISTERED)
            environment["PYTHONPATH"] = f"{control}{os.pathsep}{environment['PYTHONPATH']}"
        self.hosts: list[Victim] = []
        for at, state in enumerate(self.folders):
            state.mkdir()
            settings = {"listen": _free_address(), "redis": profiles, "events_redis": events, "workers": 1}
            settings |= {"partitions": PARTITIONS, "state_dir": str(state), "bundle": str(bundle), "insecure": True}
            settings |= {"warehouse_flush_s": 0.5, "purge_hours": purge_s / 3600, "redis_timeout_ms": 1000}
            if shared:
                place = folder / "mount"
                place.mkdir(exist_ok=True)
                link = folder / f"mount{at}"
                link.symlink_to(place)
                settings["warehouse_dir"] = f"file://{link}/parquet/" if at % 2 else str(link / "parquet")
            self.targets.append(settings["listen"])
            self.hosts.append(Victim([SERVE, json.dumps(settings)], folder / f"host{at}.log", environment))

    def keep(self) -> None:
        """Starts what does not run and should."""
        for at, host in enumerate(self.hosts):
            if at not in self.down:
                host.keep()

    def kill(self, rng: random.Random) -> str:
        """Kills a host, or a child of one; returns which of the two, "" for none."""
        at = rng.choice([at for at in range(len(self.hosts)) if at not in self.down])
        if rng.random() < 0.5:
            return "host" if self.hosts[at].kill() else ""
        return "child" if self.hosts[at].kill_child(rng) else ""


def hosts(
    number: int = 3,
    kills: int = 20,
    *,
    rate: float = 500.0,
    canaries: int = 100,
    seed: int = 0,
    shared: bool = False,
    registered: bool = True,
    pause_s: float = 2.0,
    purge_s: float = PURGE_S,
) -> dict[str, Any]:
    """Runs hosts, kills them, erases canaries, and looks for what is left.

    Args:
        number: Number of hosts.
        kills: Number of kills.
        rate: Events a second that clients send, to all hosts together.
        canaries: Users that are erased; half of them while one host does not run.
        seed: Seed of victims and moments.
        shared: See `Fleet`.
        registered: See `Fleet`.
        pause_s: Mean time between two kills.
        purge_s: Time in which erasures are to leave the disks.

    Returns:
        `kills` {what: number}, `acknowledged`, `rate`, `warehouses` (folders that hold rows), `lost` and `doubled` as
        in `tests.proofs.kills.compare`, `erased`, `early` (certificates that were complete while a host was down),
        `left` (canaries found in a file after their certificate was complete), `split` (False if `penchant validate`
        finds the warehouse whole).

    Raises:
        ProofError: Nothing comes through any more, or an event was refused.
    """
    rng = random.Random(seed)
    names = [f"canary-{rng.getrandbits(64):016x}" for _ in range(canaries)]
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        folder = Path(root)
        events = stack.enter_context(RedisServer(folder / "redis", "events"))
        profiles = stack.enter_context(RedisServer(folder / "redis", "profiles"))
        log = EventLog(stack.enter_context(connect(events.url, 5.0)), PARTITIONS, cooldown_s=0.05)
        store = ProfileStore(stack.enter_context(connect(profiles.url, 5.0)), PARTITIONS, cooldown_s=0.05)
        fleet = Fleet(folder, number, profiles.url, events.url, shared=shared, registered=registered, purge_s=purge_s)
        for host in fleet.hosts:
            stack.callback(host.kill)
        fleet.keep()
        for target in fleet.targets:
            with Client(target) as client:
                client.wait_ready(PATIENCE_S)
        _live(names, fleet, log)
        done: dict[str, int] = {"host": 0, "child": 0}
        ledgers = [folder / f"ledger{at}" for at in range(number)]
        with contextlib.ExitStack() as sending:
            senders = [
                sending.enter_context(Senders(target, ledger, rate / number, f"{at}:"))
                for at, (target, ledger) in enumerate(zip(fleet.targets, ledgers, strict=True))
            ]
            begun = time.monotonic()
            _kill_all(fleet, senders, done, kills, rng, pause_s)
            seconds = time.monotonic() - begun
            while_killed = sum(one.acknowledged for one in senders)
            said = _erase_all(names, fleet, log, folder, rng, purge_s)
            _tended({"fleet": fleet}, lambda: [one.stop() for one in senders])  # type: ignore[dict-item]
        if failed := [error for one in senders for error in one.failed]:
            raise ProofError(f"a client failed: {failed[0]!r}; {_last_words(folder)}")
        _tended({"fleet": fleet}, lambda: _await_end(log))  # type: ignore[dict-item]
        for host in fleet.hosts:
            host.end()
        places = [*(one / "warehouse" for one in fleet.folders), folder / "mount" / "parquet"]
        found = [place for place in places if any(place.glob("events/date=*/*.parquet"))]
        most = max(found, key=lambda place: len(parquet_rows(place)))
        ledger = {name: place for one in ledgers for name, place in _read_ledger(one).items()}
        said |= {
            "hosts": number,
            "kills": done,
            "acknowledged": sum(one.acknowledged for one in senders),
            "rate": round(while_killed / seconds, 1),
            "seconds": round(seconds, 1),
            "warehouses": len(found),
            "split": not all(check["passed"] for check in validate(most)["checks"] if check["name"] == "split"),
        }
        return said | compare(ledger, logged(log), store, parquet_rows(most))


def _kill_all(
    fleet: Fleet, senders: Sequence[Senders], done: dict[str, int], kills: int, rng: random.Random, pause_s: float
) -> None:
    for _ in range(kills):
        wanted, late = sum(one.acknowledged for one in senders) + 1, time.monotonic() + PATIENCE_S
        due = time.monotonic() + rng.random() * 2 * pause_s
        while True:
            fleet.keep()
            enough = time.monotonic() >= due and sum(one.acknowledged for one in senders) >= wanted
            if enough and (what := fleet.kill(rng)):
                done[what] += 1
                break
            if any(one.failed for one in senders) or time.monotonic() > late:
                raise ProofError(f"nothing comes through any more after {done}")
            time.sleep(0.02)


def _live(names: Sequence[str], fleet: Fleet, log: EventLog) -> None:
    """Lets canaries leave a trace of every kind by way of all hosts, and waits until the Parquet has it."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(target, timeout_s=20.0)) for target in fleet.targets]
        for at, name in enumerate(names):
            client = clients[at % len(clients)]
            acts = [event(name, "i3", "like", event_id=f"{name}-like"), event(name, "", "search", query=f"of {name}")]
            acts[1].event_id = f"{name}-search"
            statuses = client.ingest(acts)
            if any(status.code for status in statuses):
                raise ProofError(f"a canary was refused: {statuses}")
            client.recommend(user_id=name, page_size=5)
    _tended({"fleet": fleet}, lambda: _await_end(log))  # type: ignore[dict-item]


def _erase_all(
    names: Sequence[str], fleet: Fleet, log: EventLog, folder: Path, rng: random.Random, purge_s: float
) -> dict[str, Any]:
    """Erases half of the canaries while a host is down, the rest while all run; looks for each afterwards."""
    certificates = Certificates(log)
    half = len(names) // 2
    # The one that has most of the Parquet, the last one if none has any of its own.
    away = max(range(len(fleet.hosts)), key=lambda at: (len(parquet_rows(fleet.folders[at] / "warehouse")), at))
    fleet.down.add(away)
    fleet.hosts[away].kill()
    first = _erased(names[:half], fleet, rng)
    time.sleep(2 * purge_s)  # longer than all others need
    early = sum(_complete(certificates, one) for one in first.values())
    left = _left([name for name, one in first.items() if _complete(certificates, one)], folder)
    fleet.down.discard(away)
    second = _erased(names[half:], fleet, rng)
    both = first | second

    def wait() -> None:
        wait_until(lambda: all(_complete(certificates, one) for one in both.values()), PATIENCE_S)

    _tended({"fleet": fleet}, wait)  # type: ignore[dict-item]
    left |= _left(list(both), folder)
    return {"erased": len(both), "early": early, "left": len(left)}


def _erased(names: Sequence[str], fleet: Fleet, rng: random.Random) -> dict[str, str]:
    """Erases users by way of hosts that run; returns the certificate of each."""
    found = {}
    for name in names:
        late = time.monotonic() + PATIENCE_S
        while name not in found:
            fleet.keep()
            target = rng.choice([one for at, one in enumerate(fleet.targets) if at not in fleet.down])
            try:
                with Client(target, timeout_s=20.0) as client:
                    found[name] = client.erase(name, timeout_s=20.0).certificate_id
            except grpc.RpcError as error:
                if time.monotonic() > late:
                    raise ProofError(f"{name} cannot be erased: {error}") from error
                time.sleep(0.2)
    return found


def _complete(certificates: Certificates, certificate_id: str) -> bool:
    def look() -> bool:
        return all(one.purged_at for one in certificates.get(certificate_id).receipts)

    return insist(look)


def _left(names: Sequence[str], folder: Path) -> set[str]:
    """The canaries that some file of a host or of a Redis still holds."""
    words = {name.encode(): name for name in names}
    return {words[word] for content in _contents(folder) for word in words if word in content}


def _contents(folder: Path) -> Iterator[bytes]:
    """Every file as its bytes, Parquet decoded as well; what goes meanwhile is looked at no more."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.name.startswith("ledger"):
            continue
        with contextlib.suppress(FileNotFoundError, PenchantError):
            yield path.read_bytes()
            if path.suffix == ".parquet":
                with pq.ParquetFile(path) as file:
                    yield repr((file.read().to_pylist(), file.metadata.to_dict())).encode()


def _free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def held(said: dict[str, Any]) -> bool:
    """Returns True if there is one warehouse, nothing lost or doubled, and no canary left after its receipt."""
    numbers = [*said["lost"].values(), *said["doubled"].values(), said["early"], said["left"], said["warehouses"] - 1]
    return not any(numbers) and not said["split"]


def main() -> None:
    """Prints one line of JSON; the status is 1 where the proof failed, or its control held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rate", type=float, default=500.0, help="events a second that are sent")
    parser.add_argument("--canaries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    size: dict[str, Any] = {"rate": words.rate, "canaries": words.canaries, "seed": words.seed}
    runs = {
        "two hosts, a folder each": hosts(2, words.kills, **size),
        f"{words.hosts} hosts, a folder each": hosts(words.hosts, words.kills, **size),
        f"{words.hosts} hosts, one folder": hosts(words.hosts, words.kills, **size, shared=True),
    }
    control = hosts(2, max(words.kills // 4, 4), **size, registered=False)
    print(json.dumps({"runs": runs, "control": {"no registration": control}}))
    if failed := [name for name, said in runs.items() if not held(said)]:
        raise SystemExit(f"the proof failed: {failed}")
    if held(control):
        raise SystemExit("no proof: the control held")


if __name__ == "__main__":
    main()
