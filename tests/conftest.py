"""The common part of every test run: if CI is set, a test that could have run and did not is a failure."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import settings

from tests import once

pytest_plugins = ["tests.fixtures"]


def pytest_configure(config: pytest.Config) -> None:
    """Opens what all processes of this run share; those that xdist starts have it from the one that starts them."""
    if not hasattr(config, "workerinput"):
        once.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes it when the last of them has ended."""
    if not hasattr(config, "workerinput"):
        once.end()


# A first call compiles a kernel, and the machine is shared: no test asserts an absolute time.
settings.register_profile("penchant", deadline=None)
settings.load_profile("penchant")

# Tests call servers on loopback by every client there is, and most clients would ask a proxy even for those.
for _name in ("grpc_proxy", "http_proxy", "https_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

# What a machine may lack with good reason; everything else that a test needs, the machine must have.
EXCUSES = ("no GPU", "cannot mount")


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a skip without excuse a failure, so that CI cannot pass by skipping."""
    if not report.skipped or hasattr(report, "wasxfail") or os.environ.get("CI", "").lower() not in ("1", "true"):
        return
    _, _, message = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, str(report.longrepr))
    reason = message.removeprefix("Skipped: ")
    if not reason.startswith(EXCUSES):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where only {' or '.join(map(repr, EXCUSES))} excuses a skip: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _refuse_skip(report)
    return report
