"""What happens when a part is away, damaged, killed, or there is too much: the table of faults, on real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from penchant.client import Client, event
from penchant.v1 import catalog_pb2, common_pb2
from serving.config import ServeConfig
from serving.engine.engine import open_engine
from serving.engine.pipelines import Dependencies
from serving.errors import ConfigError
from serving.observability.telemetry import Telemetry
from serving.pipeline.request import Request
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.catalog_log import CatalogProgress
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from tests.world import publish_world, rows_of

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
BUSY_S = 20.0


def ids(slate) -> list[str]:
    return [item.item_id for item in slate.items]


def eventually(check: Callable[[], Any], seconds: float = BUSY_S) -> Any:
    """The first true answer within a time; the last one otherwise."""
    end = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def code_of(call: Callable[[], Any]) -> grpc.StatusCode | None:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return None


class TestBundle:
    def refusal(self, bundle: Path, tmp_path: Path) -> str:
        """What `penchant serve` says of a bundle that it must refuse."""
        command = [sys.executable, "-m", "penchant", "serve", str(bundle), "--listen", "127.0.0.1:0"]
        run = subprocess.run(
            [*command, "--state-dir", str(tmp_path / "state")], capture_output=True, text=True, timeout=120, check=False
        )
        assert run.returncode == 2, run.stderr
        assert not run.stdout
        return run.stderr.splitlines()[-1]

    @pytest.fixture
    def copy(self, world, tmp_path):
        return shutil.copytree(world, tmp_path / "copy")

    def test_a_flipped_byte(self, copy, tmp_path):
        content = bytearray((copy / "ranker.onnx").read_bytes())
        content[len(content) // 2] ^= 1
        (copy / "ranker.onnx").write_bytes(content)
        assert "ranker.onnx: its sha256 is not the manifest's" in self.refusal(copy, tmp_path)

    def test_half_a_copy(self, copy, tmp_path):
        os.truncate(copy / "vectors.npy", 100)
        assert "vectors.npy: has 100 bytes instead of" in self.refusal(copy, tmp_path)

    def test_files_of_two_bundles(self, copy, tmp_path):
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["model"]["blend"] = 1.0
        (copy / "manifest.json").write_text(json.dumps(manifest))
        assert "the bundle id does not fit" in self.refusal(copy, tmp_path)

    def test_wrong_golden_answers(self, tmp_path, monkeypatch):
        wrong = {"people": [], "items": [], "queries": [{"text": "space", "tokens": [1], "vector": [0] * 8}]}
        monkeypatch.setattr("tests.world.golden", lambda *_: wrong)
        assert "golden.json" in self.refusal(publish_world(tmp_path / "wrong"), tmp_path)


class TestRedis:
    """What test_redis_trouble.py leaves: a start without any Redis, on several workers, and an unsafe one."""

    @pytest.fixture
    def profiles(self, tmp_path):
        with RedisServer(tmp_path / "p", "profiles") as server:
            yield server

    @pytest.fixture
    def events(self, tmp_path):
        with RedisServer(tmp_path / "e", "events") as server:
            yield server

    def check_degraded(self, client: Client, known: str) -> None:
        """Answers go on, from what is popular, marked, and in time."""
        for person in (known, "somebody-new"):
            begun = time.monotonic()
            slate = client.recommend(user_id=person, page_size=10, timeout_s=2.0)
            assert time.monotonic() - begun < 2.0
            assert len(slate.items) == 10
            assert slate.rung == common_pb2.RUNG_POPULAR
            assert [entry.part for entry in slate.degraded] == [common_pb2.PART_PROFILE_STORE]
            assert slate.profile_version == 0
        assert ids(client.search("space number5", user_id=known, page_size=1)) == ["i5"]
        names = ["i9", "i1", "i0"]
        assert ids(client.rank(names, user_id=known)) == names

    def test_both_away_at_the_start(self, serve, profiles, events):
        profiles.stop()
        events.stop()
        with (
            serve(redis_timeout_ms=50, redis=profiles.url, events_redis=events.url, workers=2) as service,
            service.client() as client,
        ):
            self.check_degraded(client, "ann")
            profiles.start()
            events.start()
            (status,) = client.ingest([event("ann", "i1", "view_item")], timeout_s=BUSY_S)
            assert status.code == 0
            assert eventually(lambda: client.recommend(user_id="ann").rung == common_pb2.RUNG_SEQUENCE)
            answer = eventually(lambda: client.put_items([catalog_pb2.Item(item_id="late", title="late")]))
            assert answer.visible_everywhere
            assert ids(client.search("late", page_size=1)) == ["late"]

    def test_a_redis_that_would_lose_data_is_refused(self, world, profiles, tmp_path):
        from serving.processes.supervisor import serve

        config = ServeConfig.load(bundle=world, listen="127.0.0.1:0", redis=profiles.url, workers=1)
        with pytest.raises(ConfigError, match="appendfsync"):
            serve(config)


class TestProcesses:
    def test_what_was_put_and_done_survives_a_restart(self, serve):
        with serve(workers=2) as service, service.client() as client:
            client.ingest([event("ann", "i0", "view_item")])
            client.put_items([catalog_pb2.Item(item_id="kept", title="keepsake", categories=["western"])])
            client.set_availability([catalog_pb2.Availability(item_id="i4", available=False)])
            assert service.stop() == 0
        with serve(workers=2) as service, service.client(channels=8) as client:
            for _ in range(8):
                assert ids(client.search("keepsake", page_size=1)) == ["kept"]
                assert "kept" in ids(client.similar_items(["i0"], page_size=20))
                slate = client.recommend(user_id="ann", page_size=9)
                assert set(ids(slate)) == rows_of("western") - {"i0", "i4"} | {"kept"}

    def test_a_killed_worker_is_replaced(self, serve):
        with serve(workers=2) as service, service.client(channels=4) as client:
            client.put_items([catalog_pb2.Item(item_id="kept", title="keepsake")])
            victim = service.ready["workers"][0]
            os.kill(victim, signal.SIGKILL)
            for _ in range(20):
                assert len(client.recommend(user_id="ann", page_size=5).items) == 5
            assert eventually(lambda: service.log.read_text().count("ended with status -9") == 1)

            def children() -> int:
                found = Path(f"/proc/{service.process.pid}/task").glob("*/children")
                return sum(len(path.read_text().split()) for path in found)

            assert eventually(lambda: children() >= 5)  # two workers, the projector, two stores
            with service.client(channels=12) as many:
                assert eventually(lambda: all(ids(many.search("keepsake", page_size=1)) == ["kept"] for _ in range(24)))
            assert service.stop() == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_stop_under_load_finishes_what_is_in_hand(self, serve, number):
        codes: list[grpc.StatusCode | None] = []
        with serve(workers=2) as service, service.client() as client:
            client.wait_ready()
            stop = threading.Event()

            def ask() -> None:
                while not stop.is_set():
                    codes.append(code_of(lambda: client.recommend(user_id="ann", timeout_s=0.5)))

            with ThreadPoolExecutor(4) as pool:
                for _ in range(4):
                    pool.submit(ask)
                # By what was answered, not by time: a busy machine answers few calls in half a second.
                loaded = eventually(lambda: codes.count(None) > 10)
                workers = service.ready["workers"]
                code = service.stop(number)
                stop.set()
            assert loaded
            assert code == 0
            assert set(codes) <= {None, UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
            assert not any(map(alive, workers))

    def test_nothing_outlives_a_parent_that_is_killed(self, serve):
        with serve(workers=2) as service:
            tasks = Path(f"/proc/{service.process.pid}/task").glob("*/children")
            children = [int(pid) for path in tasks for pid in path.read_text().split()]
            assert len(children) >= 5
            service.process.kill()
            service.process.wait()
            assert eventually(lambda: not any(map(alive, children)))

    def test_an_address_in_use_is_refused(self, service, world, tmp_path):
        from serving.processes.supervisor import serve

        config = ServeConfig.load(bundle=world, listen=service.target, state_dir=tmp_path)
        with pytest.raises(ConfigError, match="cannot listen"):
            serve(config)

    def test_a_state_directory_in_use_is_refused(self, service, world):
        from serving.processes.supervisor import serve

        config = ServeConfig.load(bundle=world, listen="127.0.0.1:0", state_dir=service.log.parent)
        with pytest.raises(ConfigError, match="in use"):
            serve(config)


class TestAccess:
    def test_only_calls_with_the_token_pass(self, serve, tmp_path):
        file = tmp_path / "token"
        file.write_text("s3cret\n")
        with serve(token_file=str(file)) as service:
            for token in (None, "", "wrong", "s3cret ", "S3cret"):
                with service.client(token=token) as client:
                    assert code_of(lambda: client.recommend(user_id="u")) is grpc.StatusCode.UNAUTHENTICATED
                    assert code_of(lambda: client.erase("u")) is grpc.StatusCode.UNAUTHENTICATED
            with service.client(token="s3cret") as client:
                assert client.recommend(user_id="u").items
            from grpc_health.v1 import health_pb2, health_pb2_grpc

            with grpc.insecure_channel(service.target) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert "s3cret" not in service.log.read_text()

    def test_tls(self, serve, tmp_path):
        openssl = shutil.which("openssl")
        assert openssl, "this test makes a certificate with openssl"
        command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
        command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        pair = {"tls_certificate": str(tmp_path / "cert.pem"), "tls_key": str(tmp_path / "key.pem")}
        with serve(**pair) as service:
            roots = (tmp_path / "cert.pem").read_bytes()
            with service.client(root_certificates=roots) as client:
                assert client.recommend(user_id="u").items
            with service.client(timeout_s=1.0) as client:
                assert code_of(lambda: client.recommend(user_id="u")) is UNAVAILABLE

    def test_too_much_is_refused_at_once_with_a_hint(self, serve):
        with serve(threads=1, max_concurrent=2) as service, service.client(channels=1) as client:
            client.ingest([event("ann", "i0", "view_item")])
            waits = {"user_id": "ann", "min_profile_version": 2**62, "timeout_s": 4.0}
            with ThreadPoolExecutor(2) as pool:
                held = [pool.submit(client.recommend, **waits) for _ in range(2)]
                time.sleep(0.5)
                begun = time.monotonic()
                with pytest.raises(grpc.RpcError) as caught:
                    client.recommend(user_id="ann")
                assert time.monotonic() - begun < 1.0
                error = caught.value
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "100"
                assert all(call.result().degraded for call in held)
            assert client.recommend(user_id="ann").items


class TestHoldout:
    def test_who_is_held_out_gets_what_is_popular_and_the_log_says_so(self, serve):
        with serve(holdout_share=1.0) as service, service.client() as client:
            client.ingest([event("ann", "i0", "view_item")])
            slate = client.recommend(user_id="ann", page_size=3, request_id="mine", surface="home")
            assert ids(slate) == ["i0", "i1", "i2"]
            assert (slate.experiment.arm, slate.experiment.holdout) == ("holdout", True)
            assert slate.rung == common_pb2.RUNG_POPULAR
            with connect(service.ready["events_redis"], 1.0) as redis:
                log = EventLog(redis)

                def logged() -> list[dict[str, Any]]:
                    found = [entry for part in range(16) for entry in log.read_impressions(part)]
                    return [json.loads(entry.payload) for entry in found]

                (impression,) = eventually(logged)
            assert impression["request_id"] == "mine"
            assert impression["user_id"] == "ann"
            assert impression["item_ids"] == ["i0", "i1", "i2"]
            assert impression["propensities"] == [1, 1, 1]
            assert impression["arm"] == "holdout"
            assert impression["bundle_id"] == service.ready["bundle_id"]


def test_a_failed_encoder_serves_from_the_rung_below(world, profiles_redis):
    store, telemetry = ProfileStore(profiles_redis), Telemetry()
    engine = open_engine(world, Dependencies(ServeConfig.load(bundle=world), store, CatalogProgress(), telemetry))
    from features.keys import item_keys
    from features.records import make_records

    record = make_records(item_keys(["i5"]), 0, 0, 0, float("nan"), 0)[0]
    store.apply("u:ann", [(1 << 50, record.tobytes())])
    engine.catalog.columns.vectors[5] = float("nan")
    request = Request("r", "u:ann", int(time.time() * 1000), time.monotonic() + BUSY_S, 5)
    slate = engine.pipelines["recommend"].run(request)
    assert slate.rung == "item_to_item"
    assert [entry.part for entry in slate.degraded] == ["USER_ENCODER"]
    assert set(engine.catalog.ids(slate.rows)) <= rows_of("space")
    assert slate.rows.size == 5
    assert telemetry.counters()["stage_failures.user_vector"] == 1
