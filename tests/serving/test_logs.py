"""Lines of JSON are whole whatever happens, and the access log says enough and no more."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.observability.logs import JsonFormatter, begin_request, request_id_of
from serving.observability.observer import RequestObserver
from serving.observability.telemetry import Telemetry


def formatted(message: str, *args: object, error: Exception | None = None, **fields: object) -> str:
    found = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("a.b", logging.WARNING, "f.py", 1, message, args, found)
    record.__dict__.update(fields)
    return JsonFormatter("worker", 3).format(record)


@settings(max_examples=50)
@given(st.text(), st.text())
def test_any_message_is_one_line_of_ascii(message, value):
    line = formatted("%s", message, error=ValueError(value), request_id=value)
    assert line.isprintable()
    assert line.isascii()
    read = json.loads(line)
    assert (read["message"], read["request_id"]) == (message, value)
    assert "ValueError" in read["exception"]
    assert value.rstrip() in read["exception"]
    assert (read["role"], read["worker"], read["level"], read["logger"]) == ("worker", 3, "WARNING", "a.b")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", read["time"])


def test_arguments_that_do_not_fit_lose_no_line():
    assert "x %d" in json.loads(formatted("x %d", "y"))["message"]


def test_lines_bear_the_request_they_are_logged_in():
    begin_request("r-1")
    try:
        assert json.loads(formatted("x"))["request_id"] == "r-1"
    finally:
        begin_request("")
    assert "request_id" not in json.loads(formatted("x"))


@pytest.mark.parametrize("given_id", ["a", "A-1.b_2:c/d+e=", "x" * 128])
def test_an_id_of_the_caller_is_taken_over(given_id):
    assert request_id_of([("user-agent", "x"), ("x-request-id", given_id)]) == given_id


@pytest.mark.parametrize("given_id", ["", "x" * 129, "a b", "a\nb", "é", 'a"b', b"bytes"])
def test_any_other_is_replaced(given_id):
    made = {request_id_of([("x-request-id", given_id)]) for _ in range(2)}
    assert len(made) == 2
    assert given_id not in made


def test_what_nothing_catches_is_a_line_as_well():
    code = (
        "import threading, warnings; from serving.observability.logs import configure; configure('json', 'worker', 1)\n"
        "def fail(): raise RuntimeError('in a thread')\n"
        "t = threading.Thread(target=fail, name='aside'); t.start(); t.join()\n"
        "warnings.warn('beware')\n"
        "raise ValueError('at the end')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [line["level"] for line in lines] == ["CRITICAL", "WARNING", "CRITICAL"]
    assert "in a thread" in lines[0]["exception"]
    assert "aside" in lines[0]["message"]
    assert "beware" in lines[1]["message"]
    assert "at the end" in lines[2]["exception"]
    assert run.returncode == 1


def access(caplog: pytest.LogCaptureFixture, access_log: str, **settings: float) -> list[logging.LogRecord]:
    """Lines for 3 good calls, 50 failures of one kind and 1 of another."""
    observer = RequestObserver(Telemetry(), access_log, ["home"], **settings)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            observer.observe("Recommend", "OK", 0.0012, "home", "popular", "r-1")
        for _ in range(50):
            observer.observe("Ingest", "UNAVAILABLE", 0.5, request_id="r-2")
        observer.observe("Ingest", "INVALID_ARGUMENT", 0.5, "../../x")
    return [record for record in caplog.records if record.name == "penchant.access"]


def test_the_access_log_off_all_and_of_errors(caplog):
    assert access(caplog, "off") == []
    found = access(caplog, "all")
    assert len(found) == 54
    first = found[0]
    assert (first.method, first.code, first.ms, first.surface, first.rung, first.request_id) == (
        *("Recommend", "OK", 1.2, "home", "popular", "r-1"),
    )
    assert found[-1].surface == "other"
    caplog.clear()
    assert [(one.method, one.code, one.levelname) for one in access(caplog, "errors")] == [
        ("Ingest", "UNAVAILABLE", "WARNING"),
        ("Ingest", "INVALID_ARGUMENT", "WARNING"),
    ]


def test_failures_without_a_line_are_counted_in_the_next(caplog):
    observer = RequestObserver(Telemetry(), "errors", errors_s=0.0)
    observer._failures["", "UNAVAILABLE"] = (0.0, 41)  # of whatever method
    with caplog.at_level(logging.INFO):
        observer.observe("Ingest", "UNAVAILABLE", 0.5)
    assert "41 more" in caplog.text


def test_surfaces_that_are_not_listed_make_no_labels():
    telemetry = Telemetry()
    observer = RequestObserver(telemetry, "off", ["home"])
    for surface in ("home", "", *(f"made-up-{n}" for n in range(1000))):
        observer.observe("Recommend", "OK", 0.001, surface, "popular")
    assert telemetry.counters() == {
        "requests.Recommend.OK.home.popular": 1,
        "requests.Recommend.OK..popular": 1,
        "requests.Recommend.OK.other.popular": 1000,
    }
