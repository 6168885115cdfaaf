"""The quality of the answers while a service is loaded, checked by a process of its own.

A rate counts only while the answers are still those of an idle service. The checks run in another process, at a few
calls a second, so that they neither wait for the generator nor hold it up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks.load.figures import read_answers
from benchmarks.load.generator import Generator
from benchmarks.load.traffic import RequestMaterial
from benchmarks.load.window import Window
from benchmarks.report import BenchmarkError

CHECKS = ("agreement", "staleness", "eligibility", "recall")
_PATIENCE_S = 120.0
_PROBED_USERS = 30
_QUERIES = 10


@dataclass(frozen=True)
class Checks:
    """The checks of a measurement.

    Attributes:
        names: Of `CHECKS`; "recall" needs the bundle, "staleness" and "eligibility" write into the service.
        every_s: Seconds between two calls of the checks.
    """

    names: Collection[str] = CHECKS
    every_s: float = 0.1


def parse_checks(text: str) -> Checks:
    """Returns the checks that a text names, `all` or some of `CHECKS`.

    Raises:
        BenchmarkError: It names another.
    """
    names = CHECKS if text == "all" else tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name not in CHECKS:
            raise BenchmarkError(f"--check has no {name!r}: give all, or some of {','.join(CHECKS)}")
    return Checks(names)


def reserved(users: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Returns the users that load is made of, and those whose answers are compared, to whom no event is sent."""
    count = min(_PROBED_USERS, len(users) // 4)
    return (users[:-count], users[-count:]) if count else (users, users)


class Quality:
    """The process that checks, from before the load until after it."""

    def __init__(self, process: subprocess.Popen[str], skipped: dict[str, str]) -> None:
        """Waits until the process has the unloaded answers.

        Args:
            process: The process.
            skipped: Reasons why checks that were asked for are left out, by their names.

        Raises:
            BenchmarkError: It cannot check.
        """
        self._process, self._skipped = process, skipped
        ready = self._line()
        self._withdrawn = frozenset(ready["withdrawn"])

    @classmethod
    def of(cls, generator: Generator, probed: RequestMaterial, checks: Checks, bundle: Path | None) -> Quality:
        """Starts the checks of a service that is not loaded yet.

        Args:
            generator: Names the service.
            probed: The users whose answers are compared, items and queries.
            checks: The checks.
            bundle: The service's bundle, for the recall of its index.
        """
        spec = {
            "target": generator.target,
            "users": list(probed.users[:_PROBED_USERS]),
            "items": list(probed.items[:1000]),
            "queries": list(probed.queries[:_QUERIES]),
            "bundle": str(bundle) if bundle else "",
            **asdict(checks),
        }
        command = [sys.executable, "-m", "benchmarks.load.prober"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        process.stdin.write(json.dumps(spec) + "\n")
        process.stdin.flush()
        return cls(process, _skipped(spec))

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process; items that it withdrew are available again once it has ended."""
        process = self._process
        if process.poll() is None:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(_PATIENCE_S)
        assert process.stdout is not None
        process.stdout.close()

    def figures(self, windows: Sequence[Window]) -> dict[str, Any]:
        """Ends the checks; returns what they found, and whether the load itself was shown withdrawn items.

        Raises:
            BenchmarkError: The process ended with an error.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("stop\n")
        self._process.stdin.flush()
        figures = self._line()
        if self._skipped:
            figures["skipped"] = self._skipped
        if "eligibility" in figures:
            eligibility = figures["eligibility"]
            for name, slate in read_answers(windows):
                if name != "rank":  # a Rank is given its candidates, and drops the withdrawn ones the same way
                    eligibility["answers"] += 1
                    eligibility["shown"] += sum(item.item_id in self._withdrawn for item in slate.items)
        return figures

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkError(f"the checks ended with status {self._process.wait()}; see their message above")
        figures: dict[str, Any] = json.loads(line)
        return figures


def _skipped(spec: dict[str, Any]) -> dict[str, str]:
    reasons = {}
    if "recall" in spec["names"] and not spec["bundle"]:
        reasons["recall"] = "needs the vectors of the service's bundle: give --bundle"
    if "staleness" in spec["names"] and not spec["items"]:
        reasons["staleness"] = "no item is known to send an event of: give --bundle, or fill the catalogue"
    return reasons
