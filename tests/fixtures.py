"""The fixtures of many tests: the small world as a bundle, its engine, and services that really run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penchant.client import Client
from tests.once import once
from tests.world import publish_world

START_S = 90.0
STOP_S = 30.0
PATIENCE_S = 20.0
"""Deadline of calls in tests that are not about deadlines: the machine may be busy with something else."""


@dataclass
class Service:
    """A running `penchant serve`."""

    ready: dict[str, Any]
    process: subprocess.Popen[str]
    log: Path

    @property
    def target(self) -> str:
        """The address of the service."""
        return str(self.ready["listen"])

    def client(self, **options: Any) -> Client:
        """A client of it."""
        return Client(self.target, **{"timeout_s": PATIENCE_S, **options})

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)


Serve = Callable[..., contextlib.AbstractContextManager[Service]]


@contextlib.contextmanager
def serving(bundle: Path, state: Path, **settings: Any) -> Iterator[Service]:
    """Runs a service in a process of its own, on a free port, as `python -m` would; a warehouse where asked for."""
    state.mkdir(parents=True, exist_ok=True)
    here = {"bundle": str(bundle), "listen": "127.0.0.1:0", "state_dir": str(state), "workers": 1}
    here["warehouse"] = False
    settings = {**here, "redis_timeout_ms": 1000, **settings}
    log = state / "serve.log"
    code = (
        "import json, sys; from serving.processes.supervisor import serve; from serving.config import ServeConfig; "
        "sys.exit(serve(ServeConfig.load(**json.loads(sys.argv[1]))))"
    )
    with log.open("a") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(settings)], stdout=subprocess.PIPE, stderr=sink, text=True
        )
    try:
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        assert line, f"the service did not start:\n{log.read_text()[-3000:]}"
        yield Service(json.loads(line), process, log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world's bundle."""
    return publish_world(tmp_path_factory.mktemp("world") / "bundle")


@pytest.fixture(scope="session")
def trained() -> Path:
    """The whole road on a small simulated world: the directory that holds `data`, `run` and `bundle`."""
    return once("trained", _train)


def _train(root: Path) -> None:
    from training.config import load_config
    from training.data.datasets import prepare
    from training.export.export import export
    from training.train import train

    prepare("simulated", None, root / "data", users=400, items=300, seed=1)
    settings = ["epochs=4", "dim=32", "layers=1", "max_length=32", "query_steps=100", "ranker_steps=100"]
    train(root / "data", root / "run", load_config(None, [*settings, "warmup_steps=20", "candidates=100"], "cpu", 1))
    export(root / "run", root / "bundle")


@pytest.fixture
def serve(world: Path, tmp_path: Path) -> Serve:
    """Runs services of the small world, with state in a directory of the test."""

    def run(bundle: Path = world, state: Path = tmp_path / "state", **settings: Any) -> Any:
        return serving(bundle, state, **settings)

    return run


@pytest.fixture(scope="session")
def service(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service of the small world with two workers, for tests that leave it as it was."""
    assert "PENCHANT_TOKEN" not in os.environ
    with serving(world, tmp_path_factory.mktemp("service"), workers=2) as running:
        yield running
    late = [line for line in running.log.read_text().splitlines() if "while calls wait" in line]
    assert not late, late


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[Client]:
    """A client of `service`."""
    with service.client(channels=4) as client:
        client.wait_ready()
        yield client
