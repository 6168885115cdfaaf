"""An hour under load with all logging on: memory, threads and open files stay where they are, and the log stays short.

    python -m tests.proofs.soak [--minutes 60] [--rate 100] [--control-minutes 10] [--leak 60]

A service with a worker, projector and warehouse answers a mix of calls whose users, surfaces and queries never stop
being new, so that whatever is kept for each of them shows. Its own metrics are read all the time. Then each Redis in
turn is stopped for a minute, and the lines that every process logs meanwhile are counted. The control is the same
service with a leak planted in its child processes, which has to be found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from penchant.client import Client, event
from serving.config import ServeConfig
from serving.redis.embedded import RedisServer
from tests.fixtures import Service, serving
from tests.proofs.slopes import grows, stays
from tests.proofs.threads import WorkerThreads
from tests.world import publish_world

MISSED_SHARE = 0.02
"""Most pages of metrics that may be missed."""

LIMIT_MIB_H = 1.0
"""Greatest slope of the memory of a process, MiB an hour."""

MOST_LINES = 5
"""Lines a minute that a process may log while a Redis does not answer."""

SENDERS = 8
ITEMS = 40
NEW_USERS = 0.1
"""Share of calls by users who were never seen before."""

LEAK = """
import os, sys, threading, time
def leak(rate, held=[]):
    while True:
        held.append(os.urandom(int(rate / 20)))
        time.sleep(0.05)
if "serving.processes.entrypoint" in sys.orig_argv:
    threading.Thread(target=leak, args=(float(os.environ["SOAK_LEAK_BYTES_S"]),), daemon=True).start()
"""
"""The planted fault, as the `sitecustomize` of the processes of the control."""


class Load(WorkerThreads):
    """Calls at a rate from several threads, counted by method and status."""

    def __init__(self, target: str, rate: float) -> None:
        """Takes the service and the number of calls a second."""
        super().__init__(SENDERS)
        self.calls: Counter[str] = Counter()
        self._target, self._every_s = target, SENDERS / rate

    def work(self, number: int) -> None:
        """Sends calls at the rate of one thread."""
        rng, due = random.Random(number), time.monotonic()
        with Client(self._target, channels=2, timeout_s=2.0) as client:
            while True:
                due = max(due + self._every_s, time.monotonic() - 1.0)
                if self.stopping.wait(max(due - time.monotonic(), 0.0)):
                    return
                method = rng.choices(("Recommend", "Ingest", "GetProfile", "Rank", "Search"), (55, 15, 10, 10, 10))[0]
                try:
                    self._call(client, method, rng)
                    code = "OK"
                except grpc.RpcError as error:
                    code = error.code().name
                with self.lock:
                    self.calls[f"{method} {code}"] += 1

    def _call(self, client: Client, method: str, rng: random.Random) -> None:
        new = rng.random() < NEW_USERS
        user = f"new-{rng.getrandbits(64):x}" if new else f"u{rng.randrange(2000)}"
        options: dict[str, Any] = {"user_id": user, "surface": f"s{rng.getrandbits(32):x}", "page_size": 10}
        if method == "Recommend":
            client.recommend(**options)
        elif method == "Ingest":
            client.ingest([event(user, f"i{rng.randrange(ITEMS)}", rng.choice(["view_item", "like"]))])
        elif method == "GetProfile":
            client.get_profile(user)
        elif method == "Rank":
            client.rank([f"i{rng.randrange(2 * ITEMS)}" for _ in range(20)], **options)
        else:
            client.search(f"story {rng.getrandbits(32):x}", **options)


def scrape(address: str) -> dict[str, float]:
    """Returns the watched metrics: `KIND PROCESS` of processes, `memory STORE` of stores."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        text = page.read().decode()
    kinds = {
        "penchant_process_resident_memory_bytes": "rss",
        "penchant_process_open_fds": "fds",
        "penchant_process_threads": "threads",
        "penchant_process_restarts_total": "restarts",
        "penchant_redis_memory_bytes": "memory",
    }
    return {
        f"{kinds[sample.name]} {sample.labels.get('process') or sample.labels.get('store')}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name in kinds
    }


def watch(service: Service, seconds: float, samples: int = 240) -> dict[str, list[float]]:
    """Returns `samples` values of each watched metric, read at even intervals; `hours` are the times."""
    series: dict[str, list[float]] = defaultdict(list)
    begun, missed = time.monotonic(), 0
    for number in range(samples):
        time.sleep(max(0.0, begun + (number + 1) * seconds / samples - time.monotonic()))
        try:
            metrics = scrape(service.ready["metrics"])
        except OSError:
            # The page ends an exchange after some seconds, and a busy machine may need longer for one.
            missed += 1
            if missed > MISSED_SHARE * samples:
                raise
            continue
        series["hours"].append((time.monotonic() - begun) / 3600)
        for name, value in metrics.items():
            series[name].append(value)
    return series


def judge(series: dict[str, list[float]]) -> dict[str, Any]:
    """Returns the slopes of all processes, and whether threads, open files and the memory of the events stay."""
    hours, processes = series["hours"], {}
    for name in sorted(name.removeprefix("rss ") for name in series if name.startswith("rss ")):
        mib = [value / 2**20 for value in series[f"rss {name}"]]
        processes[name] = {
            "rss_mib": [round(float(part.max()), 1) for part in np.array_split(mib, min(12, len(mib)))],
            "mib_an_hour": grows(hours, mib, LIMIT_MIB_H),
            **{f"{kind}_stay": stays(series[f"{kind} {name}"]) for kind in ("fds", "threads")},
            **{kind: int(series[f"{kind} {name}"][-1]) for kind in ("fds", "threads", "restarts")},
        }
    events = [value / 2**20 for value in series["memory events"]]
    return {
        "processes": processes,
        "events_mib": [round(float(np.median(part)), 1) for part in np.array_split(events, min(12, len(events)))],
        "events_level_off": stays(events, 0.05),
    }


def lines(log: Path, offset: int) -> Counter[str]:
    """Returns the number of lines by process that the log has behind an offset, without those of the access log."""
    counts: Counter[str] = Counter()
    with log.open(encoding="utf-8") as file:
        file.seek(offset)
        for line in file:
            record = json.loads(line)
            if record["logger"] != "penchant.access":
                counts[f"{record['role']} {record.get('worker', '')}".strip()] += 1
    return counts


def outage(service: Service, server: RedisServer, seconds: float) -> dict[str, Any]:
    """Stops a Redis for a while; returns the `lines` of each process, and whether they are few enough."""
    offset = service.log.stat().st_size
    server.stop()
    time.sleep(seconds)
    counts = lines(service.log, offset)
    server.start()
    few = max(counts.values(), default=0) <= MOST_LINES * math.ceil(seconds / 60)
    return {"redis": server.role, "seconds": seconds, "lines": dict(counts), "few": few}


@contextlib.contextmanager
def running(minutes: float, leak_bytes_s: float = 0.0) -> Iterator[tuple[Service, dict[str, RedisServer]]]:
    """Runs the service with all logging on, and both Redis; with a planted leak if `leak_bytes_s` is set."""
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak")))
        servers = {role: stack.enter_context(RedisServer(root, role)) for role in ("profiles", "events")}  # type: ignore[arg-type]
        if leak_bytes_s:
            stack.enter_context(_planted(root, leak_bytes_s))
        # Retentions of hours are a small part of the run here, so that memory levels off while it lasts: the index of
        # a user, which stays twice as long as the entries, within the quarter that counts as warm-up.
        run = minutes / 60
        hours = {"log_hours": run / 12, "slate_log_hours": run / 24, "retry_hours": run / 12}
        settings = {name: value for name, value in hours.items() if name in ServeConfig.model_fields}
        urls = {"redis": servers["profiles"].url, "events_redis": servers["events"].url}
        logging = {"metrics_listen": "127.0.0.1:0", "log_format": "json", "access_log": "all"}
        bundle, settings = publish_world(root / "bundle"), {**urls, **logging, **settings}
        yield stack.enter_context(serving(bundle, root / "state", warehouse=True, **settings)), servers


@contextlib.contextmanager
def _planted(root: Path, bytes_s: float) -> Iterator[None]:
    place = root / "leak"
    place.mkdir()
    (place / "sitecustomize.py").write_text(LEAK, encoding="utf-8")
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "SOAK_LEAK_BYTES_S")}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(place), before["PYTHONPATH"])))
    os.environ["SOAK_LEAK_BYTES_S"] = str(bytes_s)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def soak(
    minutes: float = 60.0, rate: float = 100.0, control_minutes: float = 10.0, leak: float = 60.0
) -> dict[str, Any]:
    """Runs the control and the load, and judges both.

    Args:
        minutes: Length of the load.
        rate: Calls a second.
        control_minutes: Length of the control.
        leak: Leak of the control, in MiB an hour for each process.

    Returns:
        `minutes`, `rate`, `calls`, the result of `judge`, `outages`, the slopes of the `control`, and `passed`.
    """
    # The control first: if leaks are not found, an hour without one proves nothing.
    with running(control_minutes, leak * 2**20 / 3600) as (service, _), Load(service.target, rate):
        control = judge(watch(service, control_minutes * 60))["processes"]
    with running(minutes) as (service, servers):
        with Load(service.target, rate) as load:
            verdict = judge(watch(service, minutes * 60))
            calls = dict(load.calls)
            outages = [outage(service, server, min(60.0, minutes * 60)) for server in servers.values()]
        with contextlib.suppress(OSError):
            log_mib = service.log.stat().st_size / 2**20
    leaking = {name: process["mib_an_hour"] for name, process in control.items() if name != "supervisor"}
    processes = verdict["processes"].values()
    checks = {
        "memory": all(process["mib_an_hour"]["verdict"] in ("flat", "within") for process in processes),
        "fds_and_threads": all(process["fds_stay"] and process["threads_stay"] for process in processes),
        "no_restarts": not any(process["restarts"] for process in processes),
        "events_level_off": verdict["events_level_off"],
        "few_lines": all(result["few"] for result in outages),
        "calls_answered": sum(n for name, n in calls.items() if name.endswith(" OK")) >= 0.99 * sum(calls.values()),
        "control_found": all(growth["verdict"] == "grows" for growth in leaking.values()),
    }
    return {
        **{"minutes": minutes, "rate": rate, "calls": calls, "log_mib": round(log_mib, 1)},
        **verdict,
        "outages": outages,
        "control": {"minutes": control_minutes, "leak_mib_an_hour": leak, "processes": leaking},
        "checks": checks,
        "passed": all(checks.values()),
    }


def main() -> int:
    """Runs it as a command; the last line is the result as JSON."""
    parser = argparse.ArgumentParser(description=soak.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("minutes", 60.0), ("rate", 100.0), ("control-minutes", 10.0), ("leak", 60.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    result = soak(**vars(parser.parse_args()))
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
