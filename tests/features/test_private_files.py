"""What holds users' data is closed to every other user of the machine, however it was made and whatever the umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from features.errors import ForeignFileError
from features.private_files import make_folders, open_private, private_folder

OTHER = 54321
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="cannot mount or act as another user without being root")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_what_is_made_is_private_under_every_umask(tmp_path, umask):
    private_folder(tmp_path / "a" / "b")
    make_folders(tmp_path / "a" / "c" / "d")
    with open_private(tmp_path / "a" / "file", "w") as sink:
        sink.write("ä")
    assert (tmp_path / "a" / "file").read_bytes() == "ä".encode()
    assert {mode(path) for path in (tmp_path / "a", *(tmp_path / "a").rglob("*")) if path.is_dir()} == {0o700}
    assert mode(tmp_path / "a" / "file") == 0o600


def test_a_file_is_never_open_to_others_not_even_while_it_is_made(tmp_path, monkeypatch):
    os.umask(0o022)
    seen = []
    real = os.open

    def watching(path, flags, *rest, **options):
        handle = real(path, flags, *rest, **options)
        seen.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return handle

    monkeypatch.setattr(os, "open", watching)
    open_private(tmp_path / "file").close()
    assert seen == [0o600]


def test_a_folder_that_was_open_is_closed_with_all_that_is_in_it_and_one_line(tmp_path, caplog):
    for folder in ("state", "state/events", "state/events/deep"):
        (tmp_path / folder).mkdir(mode=0o755)
        (tmp_path / folder / "file").touch(0o644)
    (tmp_path / "outside").touch(0o644)
    (tmp_path / "state" / "link").symlink_to(tmp_path / "outside")
    for path in (tmp_path / "state", *(tmp_path / "state").rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o664) if not path.is_symlink() else None
    (tmp_path / "outside").chmod(0o644)
    private_folder(tmp_path / "state", deep=True)
    private_folder(tmp_path / "state", deep=True)
    assert len(caplog.records) == 1
    assert "was open to other users; now it is not (6 files and folders)" in caplog.text
    for path in (tmp_path / "state", *(tmp_path / "state").rglob("*")):
        assert path.is_symlink() or mode(path) == (0o700 if path.is_dir() else 0o600)
    assert mode(tmp_path / "outside") == 0o644  # a link is not followed


def test_a_folder_that_all_users_share_is_left_as_it_is(tmp_path, caplog):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    private_folder(shared)
    assert mode(shared) == 0o1777
    assert "is shared with other users" in caplog.text


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_is_no_plain_file_is_not_written_to(tmp_path, kind):
    path, outside = tmp_path / "file", tmp_path / "outside"
    outside.write_text("kept")
    {"link": lambda: path.symlink_to(outside), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    with pytest.raises(OSError):  # noqa: PT011 - each kind has its own message
        open_private(path)
    assert outside.read_text() == "kept"


def test_a_file_that_was_open_is_closed_when_it_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    path.chmod(0o666)
    with open_private(path, "a") as sink:
        sink.write(", after")
    assert (mode(path), path.read_text()) == (0o600, "before, after")


@needs_root
def test_what_another_user_put_there_first_is_refused(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "target").mkdir()
    for path in (theirs, theirs / "file"):
        os.chown(path, OTHER, OTHER)
    os.chown(tmp_path / "link", OTHER, OTHER, follow_symlinks=False)
    for path in (theirs, tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(ForeignFileError, match=f"belongs to another user \\(uid {OTHER}"):
            private_folder(path)
    with pytest.raises(ForeignFileError, match="belongs to another user"):
        open_private(theirs / "file")
    assert (theirs / "file").read_text() == "kept"
    ours = tmp_path / "ours"
    ours.mkdir(mode=0o777)
    ours.chmod(0o777)
    (ours / "planted").touch()
    os.chown(ours / "planted", OTHER, OTHER)
    with pytest.raises(ForeignFileError, match="planted"):
        private_folder(ours, deep=True)
