"""The measurements as a whole, against a real service and against a stub with planted faults."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

import benchmarks.highest_rate
import benchmarks.latency
from benchmarks.highest_rate import find_max
from benchmarks.latency import Target, latency
from benchmarks.latency_pairs import Pair, latency_against
from benchmarks.load.ceiling import Promise
from benchmarks.load.compare import compare
from benchmarks.load.generator import Generator
from benchmarks.load.page import write_page
from benchmarks.load.quality import Checks, Quality, parse_checks
from benchmarks.load.traffic import RequestMaterial, Shape, parse_mix
from benchmarks.overload import Overload, overload
from benchmarks.report import BenchmarkError, main
from penchant.v1 import event_pb2, ranking_pb2
from tests.benchmarks.conftest import ITEMS, Stub
from tests.fixtures import Service

CLIENTS = Path(benchmarks.latency.__file__).parent / "clients"
USERS = [f"user-{number}" for number in range(40)]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.latency, "WARM_UP_S", 0.2)
    monkeypatch.setattr(benchmarks.latency, "CEILING_S", 0.3)
    monkeypatch.setattr(benchmarks.highest_rate, "HALF_WINDOWS", 2)


def test_a_real_service_is_measured_and_checked(service: Service, world: Path, tmp_path: Path) -> None:
    shape = Shape(parse_mix("recommend=6,search=1,rank=1,similar=1,ingest=1"), candidates=20, timeout_s=20.0)
    target = Target(service.target, USERS, bundle=world)
    checks = Checks(every_s=0.02)
    result = latency(target, requests=160, rate=40, windows=4, shape=shape, checks=checks)
    assert result["errors"] == {}
    assert result["requests"] == 160
    assert [window["calls"] for window in result["windows"]] == [40] * 4
    assert set(result["by_method"]) == {"recommend", "search", "rank", "similar", "ingest"}
    assert sum(figures["calls"] for figures in result["by_method"].values()) == 160
    assert result["connections_by_worker"] == [8, 8]
    # The service runs in processes of its own, and they did all the work.
    assert result["cpu_of"] == f"the tree of process {service.process.pid}"
    assert result["cpu_ms"] > 0.2
    assert result["refused_events"] == 0
    quality = result["quality"]
    assert quality["failed_checks"] == 0
    assert quality["agreement"]["equal"] == quality["agreement"]["unloaded_equal"] == 1.0
    assert quality["staleness"]["seen_in_next"] == 1.0
    assert quality["eligibility"]["withdrawn"] == 5
    assert quality["eligibility"]["answers"] > 100
    assert quality["eligibility"]["shown"] == 0
    assert quality["recall"]["recall@50"] == 1.0  # so small a catalogue is searched exactly
    with service.client() as client:  # the withdrawn items are back
        slate = client.recommend(user_id="user-unknown", page_size=40)
    assert len(slate.items) == 40
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result))
    assert "by_method" not in write_page([file], tmp_path / "page.html").read_text()


def test_two_services_are_measured_in_turn(stub: Stub, tmp_path: Path) -> None:
    # The same service under both names: a tenth of a second more for every second window would show.
    pair = Pair(Target(stub.target, USERS), stub.target, tmp_path / "a.json", tmp_path / "b.json")
    latency_against(pair, rate=60, requests=48, windows=8)
    results = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert results[0]["pairing"] == results[1]["pairing"]
    outcome = compare(*results)
    assert outcome["paired"]
    assert outcome["windows"] == [8, 8]
    with pytest.raises(BenchmarkError, match="--out-against"):
        latency_against(Pair(pair.first, stub.target, tmp_path / "a.json", None), rate=60, requests=64)


def test_the_highest_rate_is_one_that_a_service_does_not_refuse(stub: Stub) -> None:
    # The promise is about refusals, which need no clock: one call at a time, and three that wait.
    admission = Admission(stub, 4)
    stub.refuse, stub.delay_s = admission.refuse, admission.work
    result = find_max(Target(stub.target, USERS), Promise(10_000.0), window_s=0.3, curve=(0.5, 1.0))
    trials = result["trials"]
    assert any(trial["errors"] > 0 for trial in trials)
    kept = [trial["rate"] for trial in trials if trial["errors"] == 0]
    assert result["highest_rate"] == pytest.approx(trials[-1]["rate"], abs=0.1)
    assert result["highest_rate"] <= max(kept) + 0.1
    assert [point["share"] for point in result["curve"]] == [0.5, 1.0]
    assert result["at_half"]["p99_over_p50"] >= 1.0
    assert len(result["windows"]) == 2


def _checked(stub: Stub, names: list[str], rounds: float = 0.4) -> dict[str, Any]:
    material = RequestMaterial(USERS[:10], ITEMS, ["red shoes"])
    with Generator(stub.target, 1) as generator:
        checks = Checks(names, every_s=0.01)
        with Quality.of(generator, material, checks, None) as quality:
            yield_to = time.monotonic() + rounds
            spoil = getattr(stub, "spoil", None)
            if spoil:
                spoil()
            while time.monotonic() < yield_to:
                time.sleep(0.05)
            return quality.figures([])


def test_checks_find_what_is_wrong(stub: Stub) -> None:
    names = ["agreement", "staleness", "eligibility", "recall"]
    good = _checked(stub, names)
    assert "--bundle" in good["skipped"]["recall"]  # left out, and told
    assert good["agreement"]["equal"] == 1.0
    assert good["staleness"]["seen_in_next"] == 1.0
    assert good["eligibility"]["shown"] == 0
    assert stub.withdrawn == set()

    # Planted: answers change under load, events are forgotten for a moment, withdrawn items are shown.
    stub.ignores_availability = True
    calls = itertools.count()
    stub.spoil = lambda: setattr(stub, "slate", lambda user: ITEMS[:18] + ITEMS[20:22])  # type: ignore[attr-defined]
    seen = stub.versions

    class Forgetful(dict[str, int]):
        def get(self, key: str, default: Any = None) -> Any:
            # Each event is unknown to the first answer after it.
            return 0 if key.startswith("load-check") and next(calls) % 3 == 1 else super().get(key, default)

    stub.versions = Forgetful(seen)
    bad = _checked(stub, names, rounds=0.6)
    assert bad["agreement"]["equal"] == 0.0
    assert bad["agreement"]["overlap"] == pytest.approx(0.9)
    assert bad["agreement"]["unloaded_equal"] == 1.0
    assert bad["staleness"]["seen_in_next"] < 1.0
    assert bad["eligibility"]["shown"] > 0


def test_a_check_that_does_not_exist_is_refused() -> None:
    assert set(parse_checks("all").names) == {"agreement", "staleness", "eligibility", "recall"}
    with pytest.raises(BenchmarkError, match="agreement,staleness,eligibility,recall"):
        parse_checks("agreement,speed")


class Admission:
    """One worker of 4 ms, with a queue: bounded, and batch calls before interactive ones, or without a bound."""

    def __init__(self, stub: Stub, most: int) -> None:
        self._stub, self._most = stub, most
        self._gate, self._lock, self._waiting = threading.Lock(), threading.Lock(), 0

    def refuse(self) -> bool:
        metadata = self._stub.seen[-1][2]
        with self._lock:
            limit = self._most // 4 if metadata.get("penchant-priority") == "batch" else self._most
            if self._waiting >= limit:
                return True
            self._waiting += 1
        return False

    def work(self) -> float:
        with self._gate:
            time.sleep(0.004)
        with self._lock:
            self._waiting -= 1
        return 0.0


def test_overload_tells_a_service_with_admission_from_one_without(stub: Stub) -> None:
    load = Overload(times=4.0, seconds=1.0, highest=100.0, promise=Promise(60.0))

    def measured(most: int) -> dict[str, Any]:
        admission = Admission(stub, most)
        stub.refuse, stub.delay_s = admission.refuse, admission.work
        stub.seen.clear()
        result = overload(Target(stub.target, USERS), load, Shape(timeout_s=0.3))
        batch = result["mixed"]["by_priority"]["batch"]
        assert batch["calls"] > 4 * result["mixed"]["by_priority"]["interactive"]["calls"]
        marked = [metadata for _, _, metadata in stub.seen if metadata.get("penchant-priority") == "batch"]
        # A call whose deadline passes in the queue never comes to the service.
        assert 0 < len(marked) <= batch["calls"]
        return result

    admitted, control = measured(3), measured(10_000)
    names = {"goodput", "refused_p99_ms", "interactive_served", "recovery_s", "memory_ratio"}
    assert set(admitted["kept"]) == set(control["kept"]) == names
    assert admitted["interactive"]["refused"]["by_status"]["RESOURCE_EXHAUSTED"]["with_hint"] > 0
    served = {name: figures["served"] for name, figures in admitted["mixed"]["by_priority"].items()}
    assert served["interactive"] > served["batch"]
    # Without a bound everything waits behind everything else, and comes too late.
    assert control["interactive"]["goodput"] < admitted["interactive"]["goodput"]
    assert not control["kept"]["goodput"]["kept"]
    assert not control["all_kept"]


def test_the_requests_of_other_generators_are_those_of_the_contract() -> None:
    fillings = {"$user": "1", "$item": "2", "$items": ["3", "4"], "$query": "q", "$uuid": "u"}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return fillings.get(value, value) if isinstance(value, str) else value

    requests = json.loads((CLIENTS / "requests.json").read_text())
    ghz = json.loads((CLIENTS / "ghz.json").read_text())
    requests[ghz["call"].replace("Service.", "Service/")] = ghz["data"]
    methods = {}
    for file in (ranking_pb2, event_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            methods |= {f"{service.full_name}/{method.name}": method for method in service.methods}
    for name, body in requests.items():
        message = getattr(ranking_pb2, methods[name].input_type.name, None) or event_pb2.IngestRequest
        json_format.ParseDict(filled(body), message())  # a field that is none of the contract's is an error
    root = CLIENTS.parent.parent
    assert (root / ghz["proto"]).exists()
    assert (root / ghz["import-paths"][0]).is_dir()
    script = (CLIENTS / "k6.js").read_text()
    assert set(requests) == {name for name in methods if f"'{name}'" in script}
    assert "'../../protos'" in script
    assert (CLIENTS / "../../protos/penchant/v1/ranking.proto").exists()


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_of_k6_runs_with_stubs_of_its_modules(tmp_path: Path) -> None:
    script = (CLIENTS / "k6.js").read_text()
    stubs = """
      const calls = [];
      globalThis.__ENV = {}; globalThis.__VU = 1; globalThis.__ITER = 2;
      globalThis.open = (name) => fs.readFileSync(process.argv[2] + '/' + name, 'utf8');
      const grpc = { StatusOK: 0, Client: class { load() {} connect(target, options) { calls.push([target, options]); }
        invoke(method, body, params) { calls.push([method, body, params]); return { status: 0 }; } } };
      const check = (answer, checks) => { for (const test of Object.values(checks)) { if (!test(answer)) throw 1; } };
    """
    body = script.replace("import grpc from 'k6/net/grpc';", "import fs from 'node:fs';" + stubs)
    body = body.replace("import { check } from 'k6';", "").replace("export default function ()", "function run()")
    body += "\nfor (let n = 0; n < 300; n += 1) run();\nconsole.log(JSON.stringify(calls));"
    (tmp_path / "k6.mjs").write_text(body)
    done = subprocess.run(
        ["node", str(tmp_path / "k6.mjs"), str(CLIENTS)], capture_output=True, text=True, check=True, timeout=60
    )
    connected, *calls = json.loads(done.stdout)
    assert connected == ["127.0.0.1:50051", {"plaintext": True}]
    messages = {"Recommend": "RecommendRequest", "Search": "SearchRequest", "Rank": "RankRequest"}
    messages |= {"SimilarItems": "SimilarItemsRequest"}
    kinds = set()
    for method, request, _ in calls:
        name = method.rpartition("/")[2]
        kinds.add(name)
        kind = getattr(ranking_pb2, messages[name]) if name in messages else event_pb2.IngestRequest
        assert json_format.ParseDict(request, kind()).ByteSize()
    assert len(calls) == 300
    assert len(kinds) == 5


def test_the_file_for_locust_calls_every_method(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    fired: list[dict[str, Any]] = []

    class User:
        def __init__(self, environment: Any) -> None:
            self.environment = environment

    locust = types.ModuleType("locust")
    locust.User = User  # type: ignore[attr-defined]
    locust.constant_throughput = lambda rate: None  # type: ignore[attr-defined]
    locust.task = lambda weight: lambda method: method  # type: ignore[attr-defined]
    gevent = types.ModuleType("grpc.experimental.gevent")
    gevent.init_gevent = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "locust", locust)
    monkeypatch.setitem(sys.modules, "grpc.experimental.gevent", gevent)
    monkeypatch.setattr(grpc.experimental, "gevent", gevent, raising=False)
    monkeypatch.setenv("PENCHANT_QUERIES", "red")
    from benchmarks.clients import locustfile

    monkeypatch.setattr(locustfile, "TIMEOUT_S", 20.0)
    event = types.SimpleNamespace(fire=lambda **call: fired.append(call))
    environment = types.SimpleNamespace(events=types.SimpleNamespace(request=event))
    monkeypatch.setattr(locustfile.PenchantUser, "host", service.target)
    user = locustfile.PenchantUser(environment)
    for name in ("recommend", "search", "rank", "similar", "ingest"):
        getattr(user, name)()
    user.on_stop()
    assert [call["name"] for call in fired] == ["Recommend", "Search", "Rank", "SimilarItems", "Ingest"]
    assert [call["exception"] for call in fired] == [None] * 5
    assert all(call["response_length"] > 0 for call in fired)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one file, in which results are kept."""
    import benchmarks.report as report

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "report.py").write_text("")
    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("-c", "user.email=a@b", "-c", "user.name=a", "commit", "-m", "first")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "benchmarks" / "report.py"))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def test_a_tree_that_differs_from_its_commit_is_not_recorded(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["name", "Title", "--", sys.executable, "-c", "print('{\"figure\": 1}')"]
    assert main(command) == 0
    record = repository / "benchmarks" / "results" / "name.json"
    kept = json.loads(record.read_text())
    assert kept["figure"] == 1
    assert kept["machine"]["cores"] >= 1
    assert kept["versions"]["numpy"]
    assert len(kept["commit"]) == 12
    record.unlink()
    (repository / "code.py").write_text("2")
    assert main(command) == 2
    assert not record.exists()
    assert "commit first" in capsys.readouterr().err
