"""In CI a skip needs an excuse; elsewhere it is only reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = "from tests.conftest import pytest_make_collect_report, pytest_runtest_makereport\n"
TESTS = {
    "call": "import pytest\n\ndef test_a():\n    pytest.skip({reason!r})\n",
    "mark": "import pytest\n\n@pytest.mark.skip(reason={reason!r})\ndef test_a():\n    pass\n",
    "module": "import pytest\n\npytest.skip({reason!r}, allow_module_level=True)\n",
}


def run(folder: Path, source: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder)]
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("how", TESTS)
def test_skip_without_excuse_fails_in_ci_only(tmp_path: Path, how: str) -> None:
    source = TESTS[how].format(reason="the data set is not here")
    inside, outside = run(tmp_path, source, "true"), run(tmp_path, source, "")
    assert inside.returncode in (1, 2)
    assert "the data set is not here" in inside.stdout
    assert outside.returncode in (0, 5)
    assert "1 skipped" in outside.stdout


@pytest.mark.parametrize("reason", ["no GPU", "cannot mount a loop device here"])
def test_excuses_hold_in_ci(tmp_path: Path, reason: str) -> None:
    result = run(tmp_path, TESTS["call"].format(reason=reason), "true")
    assert result.returncode == 0, result.stdout
    assert "1 skipped" in result.stdout


def test_expected_failures_are_no_skips(tmp_path: Path) -> None:
    source = "import pytest\n\n@pytest.mark.xfail(reason='known')\ndef test_a():\n    assert False\n"
    result = run(tmp_path, source, "true")
    assert result.returncode == 0, result.stdout
