"""Redis in trouble, a cluster, calls that end early: the tests at their full size, and what they found as one record.

    python -m tests.proofs.redis_trouble

The last line of stdout is one JSON object: a row per trouble, per trouble of a cluster, per storm of calls, and one of
a service whose Redis became unsafe.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent / "serving"
NAMES = ("test_unsafe_redis.py", "test_redis_trouble.py", "test_cluster.py", "test_failover.py", "test_canary.py")
TESTS = [HERE / name for name in NAMES]
KINDS = {"trouble": "troubles", "unsafe": "unsafe", "cluster": "cluster", "canaries": "canaries"}


class Findings:
    """A pytest plugin that keeps what the tests recorded."""

    def __init__(self) -> None:
        self.found: dict[str, list[Any]] = {name: [] for name in KINDS.values()}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Takes over what a test recorded that passed."""
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                self.found[KINDS[name]].append(value)


def main() -> int:
    """Runs the tests; the status of pytest."""
    os.environ["FULL"] = "1"  # before a test reads it

    import pytest

    findings = Findings()
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main(["-s", "--timeout", "3600", *map(str, TESTS), *sys.argv[1:]], plugins=[findings])
    print(json.dumps(findings.found))
    return int(status)


if __name__ == "__main__":
    raise SystemExit(main())
