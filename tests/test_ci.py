"""Refusals of CI: a skip without excuse, and a change that breaks the contract that has landed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
    environment = os.environ | {"CI": ci, "PYTHONPATH": str(ROOT)}
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


@pytest.fixture
def landed(tmp_path: Path) -> Path:
    """A repository whose branch `landed` holds the contract of this one."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    for file in ("buf.yaml", ".ci/buf-breaking"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (("init", "-q", "-b", "landed"), ("add", "."), (*who, "commit", "-q", "-m", "landed")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def buf_breaking(repository: Path, ref: str) -> subprocess.CompletedProcess[str]:
    buf = str(Path(sys.executable).with_name("buf"))
    command = [".ci/buf-breaking", buf, ref]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)


def test_landed_contract_may_grow_but_not_change(landed: Path) -> None:
    proto = landed / "protos/penchant/v1/common.proto"
    text = proto.read_text()
    proto.write_text(
        text.replace("string anonymous_id = 2;", "string anonymous_id = 2;\n  // New.\n  string more = 9;")
    )
    assert buf_breaking(landed, "landed").returncode == 0
    proto.write_text(text.replace("string anonymous_id = 2;", "string anonymous_id = 3;"))
    refused = buf_breaking(landed, "landed")
    assert refused.returncode != 0
    assert "anonymous_id" in refused.stdout + refused.stderr


def test_no_landed_contract_is_a_printed_skip(landed: Path) -> None:
    skipped = buf_breaking(landed, "origin/main")
    assert skipped.returncode == 0
    assert "skipped, there is no origin/main" in skipped.stdout
