"""Another user of the machine reads nothing of a running service: no file, no folder, no Redis."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from features.errors import ForeignFileError
from penchant.client import event
from serving.config import ServeConfig
from serving.processes.supervisor import serve as run_service
from serving.redis.embedded import RedisServer
from tests.fixtures import serving
from tests.serving.faults import wait_until

OTHER = 54321
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="cannot mount or act as another user without being root")

LOOK = """
import json, os, socket, stat, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
reached = []
for path in json.load(sys.stdin):
    for look in (lambda: os.listdir(path), lambda: os.close(os.open(path, os.O_RDONLY)),
                 lambda: os.close(os.open(path, os.O_WRONLY | os.O_APPEND)),
                 lambda: socket.socket(socket.AF_UNIX).connect(path)):
        try:
            look()
            reached.append(path)
        except OSError:
            pass
print(json.dumps(sorted(set(reached))))
"""


def reached_by_another_user(paths: list[Path]) -> list[str]:
    """Returns the paths that another user can list, open or connect to."""
    look = [sys.executable, "-I", "-S", "-W", "ignore", "-c", LOOK, str(OTHER)]
    names = json.dumps([str(path) for path in paths])
    run = subprocess.run(look, input=names, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(run.stdout)
    return found


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can reach, and a umask that closes nothing; pytest's own folders are closed."""
    before = os.umask(0)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def test_nothing_of_a_running_service_can_be_read_or_reached(world, place):
    state = place / "state"
    state.mkdir()
    (state / "left-open").write_text("of an older version")
    ledger = place / "kept" / "erasures.jsonl"
    with serving(world, state, warehouse=True, warehouse_flush_s=0.1, erasure_ledger=str(ledger)) as service:
        with service.client() as client:
            client.wait_ready()
            client.ingest([event(user, "i0", "view_item") for user in ("ann", "bob")])
            client.recommend(user_id="ann", page_size=5)
            client.erase("bob")
        # The tables first, and then the file that says how far they go.
        wait_until(lambda: list(state.rglob("*.parquet")) and list(state.rglob("dataset.json")))
        paths = [state, *state.rglob("*"), *ledger.parent.rglob("*"), ledger.parent]
        names = {path.name for path in paths}
        assert {"redis.sock", "dataset.json", "erasures.jsonl"} <= names
        assert any(name.endswith(".aof") for name in names)
        for path in paths:
            ours = path.name not in ("serve.log", "left-open")  # those the test itself made
            assert not ours or not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
        for process in ("maps", "environ"):
            paths.append(Path(f"/proc/{service.ready['pid']}/{process}"))
        assert reached_by_another_user(paths) == []
        (place / "open").write_text("read me")  # a control: what is open is found
        assert reached_by_another_user([*paths, place / "open"]) == [str(place / "open")]
        assert "was open to other users; now it is not" in service.log.read_text()


def test_a_state_directory_that_another_user_put_there_is_refused(world, place):
    theirs = place / "state"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    config = ServeConfig(bundle=world, state_dir=theirs, listen="127.0.0.1:0")
    with pytest.raises(ForeignFileError, match="belongs to another user"):
        run_service(config)
    with pytest.raises(ForeignFileError, match="belongs to another user"):
        RedisServer(theirs, "events").start()
    assert list(theirs.iterdir()) == []
    theirs.rmdir()
    theirs.symlink_to(place / "elsewhere")
    os.chown(theirs, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(ForeignFileError, match="belongs to another user"):
        run_service(ServeConfig(bundle=world, state_dir=theirs, listen="127.0.0.1:0"))
    assert not (place / "elsewhere").exists()
