"""Kernels run wherever Penchant is installed, and compiled code is taken from nowhere that others can write."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from features import jit
from features.jit import kernel, private_directory

ROOT = Path(__file__).parents[2]
# Root may write where permissions forbid it, unless it gives up CAP_DAC_OVERRIDE: then the kernel refuses as a
# read-only file system would.
LAUNCHER = "import ctypes, os, sys; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
PROBE = """
import os, tempfile
import numpy as np
if "ONLY_THERE" in os.environ:
    tempfile._candidate_tempdir_list = lambda: [os.environ["TMPDIR"]]
from features.kernels import crc32_rows
assert not os.access(os.environ["INSTALLED"], os.W_OK)
found = crc32_rows(np.zeros((1, 8), np.uint8)).tolist()
cache = getattr(crc32_rows._cache, "cache_path", None)
print(found, os.environ.get("NUMBA_CACHE_DIR"), cache, sum(crc32_rows.stats.cache_hits.values()), sep="|")
"""


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The directory where this process keeps compiled code."""
    # Both: numba reads the environment again when any of its variables has changed, as a command of Penchant does.
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit.numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path  # type: ignore[no-any-return]


@pytest.fixture
def installed(tmp_path) -> Iterator[Path]:
    """The package in a directory that cannot be written, as on a read-only file system."""
    place = tmp_path / "installed"
    shutil.copytree(ROOT / "features", place / "features", ignore=shutil.ignore_patterns("__pycache__"))
    folders = [place, place / "features"]
    for folder in folders:
        folder.chmod(0o555)
    yield place
    for folder in folders:
        folder.chmod(0o755)


def run(installed: Path, temporary: Path, **more: str) -> list[str]:
    """What the probe prints, without a home that can be written."""
    environment = {"PATH": os.defpath, "PYTHONPATH": str(installed), "INSTALLED": str(installed / "features")}
    environment |= {"HOME": str(installed / "home"), "TMPDIR": str(temporary), **more}
    command = [sys.executable, "-c", LAUNCHER, sys.executable, "-B", "-c", PROBE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=installed)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


def test_a_read_only_installation_compiles_once_and_in_private(installed, tmp_path):
    temporary = tmp_path / "temporary"
    temporary.mkdir(mode=0o700)
    answer, directory, cache, hits = run(installed, temporary, NUMBA_CACHE_DIR=str(installed / "no such"))
    private = temporary / f"penchant-kernels-{os.geteuid()}"
    assert (answer, directory, hits) == ("[1696784233]", str(private), "0")
    assert Path(cache).is_relative_to(private)
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert run(installed, temporary)[3] == "1"


def test_without_any_place_to_write_each_process_compiles(installed):
    assert run(installed, installed, ONLY_THERE="yes") == ["[1696784233]", "None", "None", "0"]


def plant_link(path: Path, parent: Path) -> None:
    (parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(parent / "elsewhere")


def plant_open(path: Path, parent: Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def plant_file(path: Path, parent: Path) -> None:
    path.write_text("")


def open_parent(path: Path, parent: Path) -> None:
    path.mkdir(mode=0o700)
    parent.chmod(0o777)  # without the sticky bit, others can put another directory in its place


@pytest.mark.parametrize("plant", [plant_link, plant_open, plant_file, open_parent])
def test_a_directory_that_others_may_have_made_is_not_used(tmp_path, plant):
    path = tmp_path / f"penchant-kernels-{os.geteuid()}"
    plant(path, tmp_path)
    assert private_directory(tmp_path) is None


def test_a_directory_of_another_user_is_not_used(tmp_path, monkeypatch):
    made = private_directory(tmp_path)
    assert made == private_directory(tmp_path) == tmp_path / f"penchant-kernels-{os.geteuid()}"
    real, other = os.geteuid(), tmp_path / f"penchant-kernels-{os.geteuid() + 1}"
    made.rename(other)
    monkeypatch.setattr(jit.os, "geteuid", lambda: real + 1)
    tmp_path.chmod(0o1777)
    assert private_directory(tmp_path) is None


def test_a_sticky_parent_will_do(tmp_path):
    tmp_path.chmod(0o1777)
    assert private_directory(tmp_path)


def test_a_damaged_cache_costs_a_compilation_and_no_call(kept, monkeypatch, caplog):
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # other tests run scripts that silence all loggers
    monkeypatch.setattr(jit._log, "disabled", False)
    monkeypatch.setenv("NUMBA_NUM_THREADS", str(jit.numba.config.NUMBA_NUM_THREADS))

    def compiled():
        @kernel()
        def double(number: int) -> int:
            return 2 * number

        return double

    assert compiled()(np.int64(4)) == 8
    (index,) = kept.rglob("*.nbi")
    index.write_bytes(b"")  # as after a loss of power
    with caplog.at_level(logging.WARNING):
        assert compiled()(np.int64(4)) == 8
    assert "damaged" in caplog.text
    again = compiled()
    assert again(np.int64(4)) == 8
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_full_disk_costs_a_compilation_and_no_call(kept, monkeypatch, caplog):
    monkeypatch.setattr(logging.root.manager, "disable", 0)
    monkeypatch.setattr(jit._log, "disabled", False)

    @kernel()
    def triple(number: int) -> int:
        return 3 * number

    shutil.rmtree(kept)
    kept.write_text("no directory any more")
    with caplog.at_level(logging.WARNING):
        assert triple(np.int64(4)) == 12
    assert "is not kept" in caplog.text


def test_a_kernel_that_is_compiled_while_calls_wait_is_named(kept, monkeypatch, caplog):
    monkeypatch.setattr(jit, "_warm", threading.Event())

    @kernel()
    def double(value: float) -> float:
        return 2 * value

    with caplog.at_level(logging.WARNING, "features.jit"):
        assert double(1.0) == 2.0
        assert not caplog.messages
        jit.expect_compiled()
        assert double(2.0) == 4.0
        assert not caplog.messages
        assert double(np.int64(3)) == 6
    assert [message for message in caplog.messages if "double" in message and "while calls wait" in message]
