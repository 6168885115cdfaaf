"""What is ready, what is degraded, what restarts: health by gRPC and HTTP, and the parts that outlive their errors."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
from grpc_health.v1 import health_pb2, health_pb2_grpc

from features.errors import SettingsError
from features.keys import event_type_key
from features.records import pack_record
from penchant.client import Client
from serving.config import ServeConfig
from serving.errors import ConfigError, ResourceExhausted, ServingError
from serving.log_retention import PROFILES_GROUP
from serving.processes.managed_process import ManagedProcess, stop_all
from serving.processes.metrics_page import MetricsPage
from serving.processes.readiness import full_disk
from serving.processes.worker_health import (
    CATALOG,
    EVENTS,
    OVERALL,
    PROFILES,
    RANKING,
    CatalogLagCheck,
    HealthCheck,
    HealthMonitor,
    redis_trouble,
)
from serving.projection import process
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.restart import Trouble, described, keep_running
from serving.services.server import Server
from serving.stores.catalog_log import CatalogLog, CatalogProgress, Change
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent
from serving.warehouse import process as warehouse
from tests.fixtures import START_S
from tests.proofs.rolls import Fleet, Load, plain, plain_channel, readiness, shipped
from tests.serving.logged import PARTITIONS
from tests.serving.test_server import Running

BUSY_S = 20.0


def eventually(question: Callable[[], Any], seconds: float = BUSY_S) -> Any:
    end = time.monotonic() + seconds
    while not (answer := question()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def health_of(channel: grpc.Channel, service: str = OVERALL) -> str:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=BUSY_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test alone, to be mistreated."""
    with RedisServer(tmp_path / "own", "events") as server:
        yield server


class TestRolling:
    def test_a_roll_and_a_kill_under_load(
        self, world, tmp_path, profiles_server, events_server, profiles_redis, events_redis
    ):
        """The proof in small: see tests/proofs/rolls.py. What stops says so first, and serves meanwhile."""
        urls = (profiles_server.url, events_server.url)
        with (
            Fleet(world, tmp_path, urls, drain_delay_s=2, projector=False) as fleet,
            Client(fleet.target, timeout_s=BUSY_S) as client,
            plain_channel(fleet.target) as channel,
            plain_channel(fleet.target) as asked,
            Load(shipped(client, BUSY_S), 40.0) as ours,
            Load(plain(channel, BUSY_S), 20.0, 2) as theirs,
        ):
            address = fleet.service.ready["health"]
            assert readiness(address, "/healthz") == (200, {"status": "alive", "phase": "serving"})
            code, state = readiness(address)
            assert (code, state["status"], state["workers"]) == (200, "ready", {"ready": 2, "of": 2})
            assert [health_of(asked, name) for name in (OVERALL, RANKING, EVENTS, PROFILES, CATALOG)] == ["SERVING"] * 5

            with ThreadPoolExecutor(1) as pool:
                rolling = pool.submit(fleet.roll)
                code, state = eventually(lambda: (found := readiness(address))[0] != 200 and found, 3 * START_S)
                assert (code, state["status"], state["phase"]) == (503, "not ready", "stopping")
                assert rolling.result() == 0
            assert readiness(address)[0] == 0
            assert ours.codes() == theirs.codes() == {}

            fleet.hit(signal.SIGKILL, 1)
            # The shipped client and the policy of the docs try again what the kill cut off.
            assert ours.codes() == theirs.codes() == {}
            assert ours.calls > 40
            assert theirs.calls > 20


class TestWorker:
    """A monitor between real Redis servers; what it says of each service is kept."""

    @staticmethod
    def monitor(parts: list[HealthCheck], **options: Any) -> tuple[HealthMonitor, dict[str, bool]]:
        said: dict[str, bool] = {}
        return HealthMonitor(parts, said.__setitem__, **options), said

    def test_an_unsafe_or_absent_events_redis_stops_events_and_not_rankings(self, own):
        with connect(own.url, 1.0) as client:
            services = (EVENTS, PROFILES, CATALOG)
            parts = [HealthCheck("events_redis", lambda: redis_trouble(client, "events", False), services)]
            monitor, said = self.monitor(parts)
            assert not monitor.check()
            assert not said
            client.config_set("appendfsync", "everysec")
            assert "appendfsync 'everysec'" in monitor.check()["events_redis"]
            assert said == {EVENTS: False, PROFILES: False, CATALOG: False}
            client.config_set("appendfsync", "always")
            assert not monitor.check()
            assert said == {EVENTS: True, PROFILES: True, CATALOG: True}
            own.stop()
            assert "does not answer" in monitor.check()["events_redis"]
            assert said == {EVENTS: False, PROFILES: False, CATALOG: False}
            own.start()
            assert eventually(lambda: not monitor.check())
            client.config_set("maxmemory", 1)
            assert "memory is full" in monitor.check()["events_redis"]

    def test_other_credentials_are_a_trouble_that_passes(self, own):
        with connect(own.url, 1.0) as client:
            monitor, said = self.monitor([HealthCheck("p", lambda: redis_trouble(client, "events", False), (EVENTS,))])
            client.config_set("requirepass", "another")
            client.connection_pool.disconnect()
            assert "credentials" in monitor.check()["p"]
            assert said == {EVENTS: False}
            with connect(own.url.replace("unix://", "unix://:another@"), 1.0) as knowing:
                knowing.config_set("requirepass", "")
            assert not monitor.check()

    def test_strict_readiness_is_that_of_the_worker_as_a_whole(self):
        wrong = ["late"]
        monitor, said = self.monitor([HealthCheck("catalog", lambda: wrong[0])], strict=True)
        assert monitor.check() == {"catalog": "late"}
        assert said == {OVERALL: False, RANKING: False}
        wrong[0] = ""
        assert not monitor.check()
        assert said == {OVERALL: True, RANKING: True}

    def test_the_state_is_told_at_each_change_and_once_a_second(self):
        wrong, told = [""], list[dict[str, Any]]()
        monitor, _ = self.monitor([HealthCheck("disk", lambda: wrong[0])], report_state=told.append)
        for wrong[0] in ("", "", "full", "full", ""):
            monitor.check()
        assert told == [{"trouble": {}}, {"trouble": {"disk": "full"}}, {"trouble": {}}]

    def test_a_catalogue_that_stays_behind_is_told(self, events_redis, monkeypatch):
        class Following:
            trouble = ""

        changes, progress = CatalogLog(events_redis), CatalogProgress()
        look = CatalogLagCheck(changes, Following(), progress)  # type: ignore[arg-type]
        monkeypatch.setattr("serving.processes.worker_health.BEHIND_S", 0.1)
        assert look() == ""
        version = changes.put([Change("delete", "i1")])
        assert look() == ""
        time.sleep(0.2)
        assert "behind" in look()
        progress.reach(version)
        assert look() == ""
        Following.trouble = "it hangs"
        assert look() == "it hangs"

    def test_a_full_disk(self, tmp_path):
        assert full_disk(tmp_path / "not" / "there") == ""
        assert "MiB are needed" in full_disk(tmp_path, 1 << 60)

    def test_a_process_ends_with_its_supervisor_also_between_a_command_and_its_reply(self):
        code = (
            "from serving.processes.entrypoint import ProcessControl\n"
            "control = ProcessControl()\n"
            "control.handle({'unready': lambda: None})\n"
            "control.listen()\n"
            "raise SystemExit(0 if control.stop.wait(5) else 'it goes on without its supervisor')\n"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", code], **pipes, text=True) as process:
            process.stdout.close()
            process.stdin.write("unready\n")
            process.stdin.close()
            assert "without its supervisor" not in process.stderr.read()

    def test_a_process_that_is_starting_learns_of_a_stop_as_well(self, tmp_path, monkeypatch):
        """One that was just restarted must not say that it serves while the others leave."""
        program = tmp_path / "program"
        answer = 'read spec; read command; echo \'{"ready": true}\'; echo "{\\"done\\": \\"$command\\"}"; exec sleep 60'
        program.write_text(f"#!/bin/sh\n{answer}\n")
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))
        with contextlib.closing(MetricsPage("")) as page:
            starting = ManagedProcess("worker 0", {"sealed": {}}, page)
            starting.start()
            starting.send("unready")
            assert starting.wait_ready(BUSY_S, threading.Event())
            assert starting.wait_done("unready", time.monotonic() + BUSY_S)
            assert starting.ready
            stop_all([starting], 0, threading.Event())

    def test_what_was_found_before_the_start_holds_from_the_first_call(self, monkeypatch):
        """A worker that is restarted in an outage must not say for a moment that all is well."""
        start = Server.start

        def found(server: Server, *arguments: Any) -> None:
            HealthMonitor([HealthCheck("events_redis", lambda: "down", (EVENTS,))], server.set_serving).check()
            start(server, *arguments)

        monkeypatch.setattr(Server, "start", found)
        with Running() as running, grpc.insecure_channel(running.target) as channel:
            assert [health_of(channel, name) for name in (EVENTS, RANKING)] == ["NOT_SERVING", "SERVING"]


class TestRestarting:
    def test_what_fails_is_started_again_after_growing_pauses_until_it_is_well(self, monkeypatch):
        monkeypatch.setattr("serving.restart.FIRST_PAUSE_S", 0.01)
        begun, said = list[float](), list[str]()

        def attempt(report) -> None:
            begun.append(time.monotonic())
            if len(begun) < 5:
                raise (OSError("the disk is full"), KeyError("user-77"))[len(begun) % 2]
            report("")

        keep_running("part", attempt, threading.Event(), said.append)
        pauses = [after - before for before, after in itertools.pairwise(begun)]
        assert all(pause >= 0.01 * 2**place for place, pause in enumerate(pauses))
        assert said[1] == "failed and is restarted: the disk is full"
        assert said[0] == "failed and is restarted: KeyError; the log says more"
        assert said[-1] == ""

    def test_a_mistake_at_the_start_is_raised_and_one_that_comes_later_is_waited_for(self):
        stop, said = threading.Event(), list[str]()

        def wrong(_) -> None:
            raise ConfigError("set it right")

        def later(report) -> None:
            report("")
            stop.set()
            raise ConfigError("set it right")

        with pytest.raises(ConfigError):
            keep_running("part", wrong, threading.Event(), said.append)
        assert said == []
        keep_running("part", later, stop, said.append)
        assert said == ["", "failed and is restarted: set it right"]

    def test_an_error_about_a_user_names_nobody(self):
        assert "ann" not in described(ResourceExhausted("u:ann has too many", field="subject"))
        assert "ann" not in described(ServingError("u:ann"))
        assert "OOM" in described(ResourceExhausted("Redis takes no writes: OOM"))

    @pytest.fixture
    def both(self, own, tmp_path):
        with RedisServer(tmp_path / "profiles", "profiles") as profiles:
            yield profiles.url, own.url

    @staticmethod
    def running(role: str, both: tuple[str, str], out: Path, stop: threading.Event, trouble: Trouble):
        if role == "projector":
            return lambda: process.run(*both, PARTITIONS, stop, trouble=trouble)
        return lambda: warehouse.run(both[1], out, partitions=PARTITIONS, stop=stop, trouble=trouble, flush_s=0.2)

    @pytest.mark.parametrize("role", ["projector", "warehouse"])
    def test_a_role_outlives_other_credentials_and_damage_and_leaves_no_thread(self, role, both, tmp_path):
        """Its Redis refuses it, then holds what makes no sense; as soon as either is set right, it goes on."""
        before = set(threading.enumerate())
        told = list[dict[str, str]]()
        stop, trouble = threading.Event(), Trouble(lambda state: told.append(state["trouble"]))
        with connect(both[1], 2.0) as client, ThreadPoolExecutor(1) as pool:
            log = EventLog(client, PARTITIONS)
            log.open()
            running = pool.submit(self.running(role, both, tmp_path / "out", stop, trouble))
            try:
                self.mistreat(role, client, log, told)
            finally:
                stop.set()
            running.result(BUSY_S)
        assert eventually(lambda: set(threading.enumerate()) <= before), threading.enumerate()

    def mistreat(self, role: str, client: redis.Redis, log: EventLog, told: list[dict[str, str]]) -> None:
        assert eventually(lambda: told and not told[-1])
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal", skipme=True)
        assert eventually(lambda: told[-1].get(role)), told
        assert "credentials" in told[-1][role]
        client.config_set("requirepass", "")
        assert eventually(lambda: not told[-1]), told

        for keys in log.keys:  # all partitions: of one that is damaged only the log tells, the others go on
            client.delete(keys.events)
            client.set(keys.events, "no stream")
        assert eventually(lambda: told[-1].get(role)), told
        for keys in log.keys:
            client.delete(keys.events)
        assert eventually(lambda: not told[-1]), told
        record = pack_record(1, 1, 1, log.now_ms(), 0.0, event_type_key("view_item"))
        log.append([LoggedEvent("u:ann", "e1", record, b"{}")])
        group = PROFILES_GROUP if role == "projector" else warehouse.GROUP
        assert eventually(lambda: not self.lag(client, log, group)), told

    @staticmethod
    def lag(client: redis.Redis, log: EventLog, group: str) -> int:
        groups = [
            found for keys in log.keys if client.exists(keys.events) for found in client.xinfo_groups(keys.events)
        ]
        ours = [found for found in groups if found["name"] == group.encode()]
        return 1 if not ours else sum(found["pending"] + (found["lag"] or 0) for found in ours)


def test_a_second_instance_takes_over_only_where_it_is_told_to(service, world, tmp_path):
    from serving.processes.supervisor import serve

    config = ServeConfig.load(bundle=world, listen=service.target, state_dir=tmp_path)
    with pytest.raises(ConfigError, match="share_port"):
        serve(config)


def test_settings_of_a_stop(tmp_path):
    def load(**settings: Any) -> ServeConfig:
        return ServeConfig.load(bundle=tmp_path, **settings)

    assert load().delay_s == 0
    assert load(listen="0.0.0.0:50051", insecure=True).delay_s == 5
    assert load(listen="0.0.0.0:50051", insecure=True, drain_delay_s=0).delay_s == 0
    with pytest.raises(SettingsError, match="HOST:PORT"):
        load(health_listen="8080")
    assert json.loads(json.dumps(load(health_listen="0.0.0.0:8080").printable()))["health_listen"] == "0.0.0.0:8080"
