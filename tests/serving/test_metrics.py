"""The page of metrics: one for the whole service, well formed, documented, without a word of any request."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from penchant.client import event
from serving.observability.exposition import FAMILIES, markdown
from serving.observability.reporting import report
from serving.observability.telemetry import Telemetry
from serving.processes.metrics_page import MetricsPage
from serving.processes.store_metrics import StoreMetrics
from serving.stores.event_log import EventLog
from tests.fixtures import Service, serving
from tests.serving.faults import wait_until
from tests.serving.logged import PARTITIONS, ingest
from tests.serving.logged import event as logged_event

ROOT = Path(__file__).parents[2]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(address: str, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def samples(page: str) -> Samples:
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in parse_text(page)
        for one in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


@pytest.fixture(scope="module")
def watched(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with two workers, a warehouse, metrics and every line of the log."""
    options = {"metrics_listen": "127.0.0.1:0", "log_format": "json", "access_log": "all", "metrics_surfaces": ["home"]}
    with serving(world, tmp_path_factory.mktemp("watched"), workers=2, warehouse=True, **options) as running:
        yield running


def test_the_service_is_one_page_and_a_killed_worker_takes_nothing_back(watched):
    address = watched.ready["metrics"]
    with watched.client(channels=8) as client:
        client.wait_ready()
        for number in range(20):
            client.recommend(user_id=f"s3cret-{number}", surface=["home", f"s3cret-{number}"][number % 2], page_size=5)
        client.search("s3cret words", user_id="s3cret-0", page_size=5)
        client.ingest([event("s3cret-0", "i1", "view_item")])
        with pytest.raises(Exception, match="is required"):
            client.recommend(user_id="", surface="home", page_size=5)
    # Slates are logged a moment after their answers.
    wait_until(lambda: value(samples(scrape(address)), "penchant_slates_total", result="written") >= 21)
    page = scrape(address)
    before = samples(page)
    kinds = {family.name: family.type for family in parse_text(page)}
    known = {family.name: family.kind for family in FAMILIES} | {"penchant_build_info": "gauge"}
    assert kinds.items() <= known.items()
    # Only what has not happened may be missing.
    missing = {family.shown for family in FAMILIES} - {name for name, _ in before} - set(kinds)
    assert missing <= {
        *("penchant_requests_refused_total", "penchant_stage_failures_total", "penchant_degraded_total"),
        *("penchant_profiles_corrupt_total", "penchant_projector_profiles_total"),
        *("penchant_events_applied_later_total", "penchant_warehouse_damaged_total", "penchant_build_info"),
        *("penchant_warehouse_rows_total", "penchant_projector_events_total", "penchant_projector_damaged_total"),
    }
    recommended = {"method": "Recommend", "code": "OK", "rung": "popular"}
    assert value(before, "penchant_requests_total", surface="home", **recommended) == 10
    assert value(before, "penchant_requests_total", surface="other", **recommended) == 10
    refused = {"method": "Recommend", "code": "INVALID_ARGUMENT", "rung": "", "surface": "home"}
    assert value(before, "penchant_requests_total", **refused) == 1
    assert value(before, "penchant_request_seconds_count", method="Recommend") == 21
    assert value(before, "penchant_events_total", result="taken") == 1
    roles = {dict(labels)["process"] for name, labels in before if name == "penchant_process_up"}
    assert roles == {"supervisor", "worker 0", "worker 1", "projector", "warehouse"}
    assert "s3cret" not in page
    assert value(before, "penchant_redis_up", store="events") == 1

    open_metrics = scrape(address, "application/openmetrics-text; version=1.0.0")
    assert {family.name for family in parse_open_metrics(open_metrics)} <= {family.name for family in FAMILIES}

    os.kill(watched.ready["workers"][0], signal.SIGKILL)
    labels = {"process": "worker 0", "role": "worker"}
    wait_until(lambda: value(samples(scrape(address)), "penchant_process_restarts_total", **labels) == 1)
    after = samples(scrape(address))
    counters = [(name, own) for name, own in before if name.startswith("penchant_requests") and name.endswith("_total")]
    assert counters
    assert all(after[key] >= before[key] for key in counters)


def test_its_log_is_lines_of_json_without_a_word_of_a_request(watched):
    lines = [json.loads(line) for line in watched.log.read_text().splitlines()]
    assert {line["role"] for line in lines} == {"supervisor", "worker", "projector", "warehouse"}
    assert {line["worker"] for line in lines if line["role"] == "worker"} == {0, 1}
    messages = [line["message"] for line in lines]
    assert any(message.startswith("ready: 2 workers on") for message in messages)
    assert {"the worker 0 is ready", "the projector is ready", "the warehouse is ready"} <= set(messages)
    served = [line for line in lines if line["logger"] == "penchant.access"]
    assert {line["method"] for line in served} >= {"Recommend", "Search", "Ingest"}
    assert all(line["request_id"] and line["ms"] >= 0 and line["code"] for line in served)
    assert {line.get("surface") for line in served} <= {None, "home", "other"}
    assert "s3cret" not in watched.log.read_text()


def test_the_id_of_a_request_is_the_callers_and_comes_back(watched):
    from penchant.v1 import common_pb2, ranking_pb2, ranking_pb2_grpc

    with grpc.insecure_channel(watched.ready["listen"]) as channel:
        stub = ranking_pb2_grpc.RankingServiceStub(channel)
        subject = common_pb2.Subject(user_id="ann")
        good = ranking_pb2.RecommendRequest(options=ranking_pb2.RankingOptions(subject=subject, page_size=1))
        for request, sent in ((good, "mine-1"), (ranking_pb2.RecommendRequest(), "mine-2"), (good, "no id")):
            call = stub.Recommend.future(request, timeout=20, metadata=[("x-request-id", sent)])
            call.exception()
            (back,) = [word.value for word in call.trailing_metadata() if word.key == "x-request-id"]
            assert (back == sent) == sent.startswith("mine")
            wait_until(lambda back=back: f'"request_id": "{back}"' in watched.log.read_text())


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=2), min_size=1, max_size=6), st.data())
def test_sums_over_processes_that_end_and_come_back_never_go_back(rounds, data):
    """Two processes count and are asked; now and then one ends. What was seen once is in every later sum."""
    monitor, seen, counted = MetricsPage("b", patience_s=5.0), 0, 0
    with contextlib.closing(monitor):
        live = [started(monitor, f"worker {number}") for number in range(2)]
        for counts in rounds:
            for telemetry, n in zip(live, counts, strict=True):
                telemetry.count(("events", "taken"), n)
                telemetry.stage("s", n)
                counted += n
            found = {(name, labels): n for name, labels, n in monitor.samples()}
            total = found.get(("penchant_events", ("taken",)), 0)
            assert total == counted >= seen  # each was seen before it ended
            seen = total
            ended = data.draw(st.sampled_from([None, 0, 1]))
            if ended is not None:
                live[ended] = started(monitor, f"worker {ended}")


def started(monitor: MetricsPage, name: str) -> Telemetry:
    telemetry = Telemetry()
    with monitor.connect(name) as theirs:
        report(os.dup(theirs.fileno()), telemetry)
    return telemetry


def test_a_process_that_hangs_or_is_gone_is_shown_as_down_with_what_it_last_said():
    with contextlib.closing(MetricsPage("b", patience_s=0.2)) as monitor:
        telemetry = started(monitor, "worker 0")
        telemetry.count(("events", "taken"), 3)
        monitor.samples()
        theirs = monitor.connect("worker 0")  # and this one never answers
        hanging = {(name, labels): n for name, labels, n in monitor.samples()}
        assert hanging["penchant_process_up", ("worker 0", "worker")] == 0
        assert hanging["penchant_events", ("taken",)] == 3
        assert hanging["penchant_process_restarts", ("worker 0", "worker")] == 1
        theirs.close()
        gone = {(name, labels): n for name, labels, n in monitor.samples()}
        assert gone["penchant_process_up", ("worker 0", "worker")] == 0
        assert gone["penchant_events", ("taken",)] == 3


def test_lag_and_size_of_the_log(log: EventLog, events_server, profiles_server):
    """Of a reader that has read two of three events of a user and acknowledged one."""
    from serving.log_retention import PROFILES_GROUP
    from serving.stores.consumer_group import Consumer

    consumer = Consumer(log, PROFILES_GROUP, "me")
    consumer.open()
    ids = ingest(log, *(logged_event("ann", f"i{n}") for n in range(3)))
    claimed = consumer.claim([None] * PARTITIONS, 2)
    (partition,) = [number for number, entries in enumerate(claimed) if entries]
    consumer.acknowledge(partition, ids[:1])
    with contextlib.closing(StoreMetrics(profiles_server.url, events_server.url, PARTITIONS)) as watch:
        found, version = watch.samples()
        samples = {(name, labels): n for name, labels, n in found}
        where = ("projector", "events", str(partition))
        assert samples["penchant_log_lag_entries", where] == 2
        assert 0 <= samples["penchant_log_lag_seconds", where] < 300
        assert samples["penchant_log_entries", ("events", str(partition))] == 3
        assert samples["penchant_log_bytes", ("events", str(partition))] > 300
        others = [n for (name, labels), n in samples.items() if name.startswith("penchant_log_lag") and labels != where]
        assert set(others) == {0}
        assert version == 0
        assert watch.samples() == (found, version)  # not asked again so soon


def test_stores_that_do_not_answer_are_down_and_cost_no_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nothing listens
        url = f"redis://127.0.0.1:{taken.getsockname()[1]}/0"
        with contextlib.closing(StoreMetrics(url, url, 1)) as watch:
            assert watch.samples() == (
                [("penchant_redis_up", ("profiles",), 0), ("penchant_redis_up", ("events",), 0)],
                None,
            )


def test_every_counter_of_the_code_has_a_family():
    names: set[str] = set()
    for path in (ROOT / "serving").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("elemetry.count"):
                name = node.args[0].elts[0] if isinstance(node.args[0], ast.Tuple) else node.args[0]
                names |= {n.value for n in ast.walk(name) if isinstance(n, ast.Constant)}
    assert len(names) > 10
    assert {f"penchant_{name}" for name in names} <= {family.name for family in FAMILIES if family.kind == "counter"}


def test_the_docs_have_the_table_of_the_code():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert markdown() in text
    shown = {family.shown for family in FAMILIES}
    series = {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bpenchant_\w+[a-z]\b", text)}
    assert series <= shown, "docs/metrics.md speaks of a metric that there is not"
