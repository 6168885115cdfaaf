"""A service on a machine as others have it: behind a proxy, in a cluster, under an odd name, by a link that moves.

One service runs through all of it; the tests go on from one another, in their order.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from benchmarks.freshness import client_of
from benchmarks.report import BenchmarkError
from features.bundle import open_bundle
from features.tables.dataset import open_dataset
from penchant.client import Client, event
from penchant.health import check
from tests.fixtures import Service, serving
from tests.serving.faults import wait_until
from tests.serving.test_server import PROXIES
from tests.world import publish_world

ROOT = Path(__file__).parents[2]
ODD = "state #%41?\n"
CLUSTER = {
    "PENCHANT_METRICS_PORT": "tcp://10.0.0.1:9090",
    "PENCHANT_METRICS_SERVICE_HOST": "10.0.0.1",
    "PENCHANT_METRICS_PORT_9090_TCP_ADDR": "10.0.0.1",
    "PENCHANT_WAREHOUSE_PORT": "tcp://10.0.0.2:80",
    "PENCHANT_REDIS_PORT": "tcp://10.0.0.3:6379",
    "PENCHANT_SERVICE_HOST": "10.0.0.4",
    "PENCHANT_PORT": "tcp://10.0.0.4:50051",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bundles, and a link to the first of them."""
    place = tmp_path_factory.mktemp("place")
    publish_world(place / "first")
    publish_world(place / "second", salt="2")
    (place / "current").symlink_to("first")
    return place


@pytest.fixture(scope="module")
def surrounded(place: Path) -> Iterator[Service]:
    """A service with two workers and a warehouse, started through the link among foreign variables and proxies."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
            patch.delenv(name, raising=False)
        for name, value in {**dict.fromkeys(PROXIES, "http://127.0.0.1:9"), **CLUSTER}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONIOENCODING", "ascii:strict")
        options = {"workers": 2, "warehouse": True, "warehouse_flush_s": 0.2}
        with serving(place / "current", place / ODD, **options) as running:
            yield running


def children(service: Service) -> set[int]:
    """The processes that serve: workers, projector and warehouse."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1]) if folder.name.isdigit() else 0
            if parent == service.ready["pid"] and b"serving.processes.entrypoint" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return found


def bundle_id(path: Path) -> str:
    return open_bundle(path).bundle_id


def test_it_answers_and_keeps_its_data_where_it_was_told(surrounded, place):
    state = place / ODD
    assert surrounded.ready["warehouse"] == str(state / "warehouse")
    with surrounded.client(timeout_s=120.0) as client:  # the first call may compile
        [status] = client.ingest([event("ann", "i1", "like")])
        assert client.recommend(user_id="ann", min_profile_version=status.profile_version).profile_found
    written = state / "warehouse"
    wait_until(lambda: any(written.glob("events/*/*.parquet")) and (written / "dataset.json").exists())
    wait_until(lambda: open_dataset(written).info["events"] == 1)


def test_it_takes_no_variable_of_another_service_for_a_setting(surrounded):
    assert "is ignored" not in surrounded.log.read_text()
    assert surrounded.ready["metrics"] is None


def test_the_health_check_of_the_image_finds_it(surrounded):
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    (checked,) = [line for line in lines if line.startswith("HEALTHCHECK")]
    command = json.loads(checked.partition(" CMD ")[2])
    assert command[0] == "python"
    command[0] = sys.executable

    def status(listen: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PENCHANT_LISTEN": listen, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = status(surrounded.target)
    assert done.returncode == 0, done.stderr
    port = surrounded.target.rpartition(":")[2]
    assert check({"PENCHANT_LISTEN": f"0.0.0.0:{port}"}) == ""
    assert check({"PENCHANT_LISTEN": "127.0.0.1:9"}, timeout_s=0.5).startswith("127.0.0.1:9: DEADLINE_EXCEEDED")
    assert check({"PENCHANT_LISTEN": "nonsense"})


def test_the_health_check_asks_no_proxy_whatever_the_service_is_called(monkeypatch):
    def asked(call: Callable[[], object]) -> bool:
        with socket.create_server(("127.0.0.1", 0)) as proxy:
            for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
                monkeypatch.delenv(name, raising=False)
            for name in PROXIES:
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
            assert call()
            proxy.settimeout(0.0)
            with contextlib.suppress(BlockingIOError):
                proxy.accept()[0].close()
                return True
            return False

    def called() -> str:
        with Client("penchant.invalid:1", timeout_s=0.3) as client, pytest.raises(grpc.RpcError) as error:
            client.recommend(user_id="ann")
        return str(error.value)

    assert not asked(lambda: check({"PENCHANT_LISTEN": "penchant.invalid:1"}, timeout_s=0.3))
    assert asked(called)  # the control: for others the proxy may be the only way


def test_a_measurement_finds_it(surrounded, tmp_path):
    (tmp_path / "users.txt").write_text("ann\n")
    command = [sys.executable, "-m", "penchant", "bench", "latency", "--target", surrounded.target, "--rate", "50"]
    command += ["--users", str(tmp_path / "users.txt"), "--requests", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["requests"] == 20


def test_a_link_that_moves_changes_nothing(surrounded, place):
    first, second = bundle_id(place / "first"), bundle_id(place / "second")
    assert first != second
    (place / "next").symlink_to("second")
    (place / "next").rename(place / "current")
    assert bundle_id(place / "current") == second
    before = children(surrounded)
    os.kill(surrounded.ready["workers"][0], signal.SIGKILL)
    wait_until(lambda: len(children(surrounded) - before) == 1, seconds=60)
    (restarted,) = children(surrounded) - before
    old = surrounded.ready["workers"][1]
    for worker in (restarted, old):
        with reaching(surrounded, worker) as client:
            assert client.recommend(user_id="ann").bundle_id == first


def test_another_bundle_in_its_place_is_refused_by_name(surrounded, place):
    first, second = bundle_id(place / "first"), bundle_id(place / "second")
    (place / "first").rename(place / "away")
    publish_world(place / "first", salt="2")
    before = children(surrounded)
    readers = before - set(surrounded.ready["workers"])
    for pid in readers:
        os.kill(pid, signal.SIGKILL)  # one worker, the projector and the warehouse
    refusal = f"holds the bundle {second}, and the running service serves {first}"
    wait_until(
        lambda: refused(surrounded, "worker 0", refusal) and refused(surrounded, "warehouse", refusal), seconds=60
    )
    with surrounded.client(channels=8) as client:
        assert {client.recommend(user_id="ann").bundle_id for _ in range(8)} == {first}
    (place / "first").rename(place / "wrong")
    (place / "away").rename(place / "first")
    wait_until(lambda: len(children(surrounded)) == 4, seconds=60)


def refused(service: Service, name: str, refusal: str) -> bool:
    lines = service.log.read_text().splitlines()
    return any(f"{name} ended with status 2" in line and refusal in line for line in lines)


def reaching(service: Service, worker: int):
    """A client of one worker, as soon as it listens."""
    found = []

    def reached() -> bool:
        try:
            found.append(client_of(service.ready, worker))
        except BenchmarkError:
            return False
        return True

    wait_until(reached, seconds=90)
    return found[0]
