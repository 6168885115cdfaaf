"""No terminal, pipe or closed descriptor costs the work of a command."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASCII = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# What a command does in the end: progress, a title, work that must be finished, the answer.
COMMAND = """
import sys, pathlib
from cli import main as cli, options

def work():
    for _ in range(3):
        print("training \\u2501\\u2501 \\u6709\\u673a\\u7eff\\u8336", file=sys.stderr, flush=True)
        print("Th\\u00e9i\\u00e8re", flush=True)
    pathlib.Path(sys.argv[1]).write_text("finished", encoding="utf-8")
    options.print_result({"title": "\\u7eff\\u8336", "path": pathlib.Path("caf\\u00e9\\udcff")})

cli.app = work
cli.main()
"""


@pytest.fixture
def command(tmp_path) -> list[str]:
    return [sys.executable, "-c", COMMAND, str(tmp_path / "work")]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


@pytest.mark.parametrize("locale", [ASCII, {"PYTHONIOENCODING": "latin-1"}, {"PYTHONIOENCODING": "utf-8"}])
def test_a_terminal_without_the_letters_gets_them_escaped(command, locale):
    done = subprocess.run(command, env=environment(**locale), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    encoding = locale["PYTHONIOENCODING"].partition(":")[0]
    lines = done.stdout.decode(encoding).splitlines()
    assert lines[0].encode("ascii", "backslashreplace") in (b"Th\\xe9i\\xe8re", b"Th\\\\xe9i\\\\xe8re")
    assert json.loads(lines[-1]) == {"title": "绿茶", "path": "café\udcff"}
    assert b"Traceback" not in done.stderr


def test_without_the_streams_made_secure_it_is_lost(command, tmp_path):
    # The control: what an ASCII terminal does to a plain print.
    command[2] = command[2].replace("def work", "cli.secure_streams = int\n\ndef work", 1)
    done = subprocess.run(command, env=environment(**ASCII), capture_output=True, check=False)
    assert done.returncode == 1
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_away_does_not_end_the_work(command, tmp_path, stream):
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writing}
    process = subprocess.Popen(command, env=environment(), **streams)
    os.close(writing)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert (tmp_path / "work").read_text() == "finished"
    assert b"Traceback" not in (said or b"")


def test_a_terminal_that_is_closed_does_not_end_the_work(command, tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment(), stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)
    assert process.wait(60) == 0
    assert (tmp_path / "work").read_text() == "finished"


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-", "<&-"])
def test_closed_streams_do_not_end_the_work_nor_write_into_its_files(command, tmp_path, closed):
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {closed}', "sh", *command], env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work").read_text() == "finished"
    if ">&-" not in closed.replace("2>&-", ""):
        assert json.loads(done.stdout.splitlines()[-1])["title"] == "绿茶"
