"""The power fails while events are written: what was acknowledged is on the disk.

    python -m tests.proofs.power_loss [--images 20]

The events Redis keeps its data on an ext4 of its own, in a file that a loop device presents as a disk. At random
moments, writes in flight, the server is frozen for as long as it takes to copy that file: the copy holds what had
reached the disk, and nothing of what was in the memory of the kernel. (A kill alone proves nothing, as the page cache
survives it.) What the disk was given counts as written: a disk that lies about that is not part of this. Each copy is
mounted, which replays the journal of the file system, a server starts on it, and is asked for all that had been
acknowledged before the copy began: first by reading the log, then by sending every one of those events again. The
control, `appendfsync no`, loses some.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from features.records import make_records
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent
from tests.proofs.threads import WorkerThreads
from tests.serving.faults import insist

PARTITIONS = 4
USERS = 50
BATCH = 10
WRITERS = 3
DISK_BYTES = 128 << 20
FUTURE = 4_000_000_000_000


class CannotMountError(Exception):
    """No file system can be made or mounted on this machine; the message says which."""


@dataclass(frozen=True)
class Image:
    """A disk as it was when the power failed, and the events acknowledged by then: event id -> log id."""

    disk: Path
    acknowledged: dict[str, int]


def power_loss(images: int = 20, *, fsync: str = "always", seed: int = 0, between_s: float = 0.5) -> dict[str, Any]:
    """Takes images at random moments while events are written, and examines each.

    Args:
        images: Number of images.
        fsync: The `appendfsync` of the server.
        seed: Seed of the moments.
        between_s: Mean time between two images.

    Returns:
        `images` [{`acknowledged`, `lost`, `doubled`}], and their sums.

    Raises:
        CannotMountError: No loop file system can be had here.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        taken = list(_taken(folder, images, fsync, random.Random(seed), between_s))
        counts = [_examined(image, folder) for image in taken]
    sums = {key: sum(image[key] for image in counts) for key in ("acknowledged", "lost", "doubled")}
    return {"appendfsync": fsync, "images": counts, **sums}


@contextlib.contextmanager
def mounted(disk: Path, at: Path) -> Iterator[Path]:
    """Mounts a disk.

    Raises:
        CannotMountError: It cannot be.
    """
    at.mkdir(exist_ok=True)
    _run("mount", "-o", "loop", str(disk), str(at))
    try:
        yield at
    finally:
        _run("umount", str(at))


def make_disk(path: Path) -> None:
    """Makes an empty ext4 in a file.

    Raises:
        CannotMountError: There is no mkfs.ext4.
    """
    with path.open("wb") as file:
        file.truncate(DISK_BYTES)
    _run("mkfs.ext4", "-q", "-F", str(path))


def _run(*words: str) -> None:
    try:
        subprocess.run(words, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise CannotMountError(f"cannot mount a loop file system: {words[0]} says {reason}") from error


def _taken(folder: Path, images: int, fsync: str, rng: random.Random, between_s: float) -> Iterator[Image]:
    disk = folder / "disk"
    make_disk(disk)
    with mounted(disk, folder / "mnt") as at, RedisServer(at, "events") as server:
        with connect(server.url, 5.0) as client:
            client.config_set("appendfsync", fsync)
        # All that made the file system and the server reaches the disk; from here on, only what is asked for.
        os.sync()
        with _Writers(server.url) as writers:
            for number in range(images):
                wanted = writers.count() + BATCH * WRITERS
                time.sleep(rng.random() * 2 * between_s)
                while writers.count() < wanted:
                    time.sleep(0.01)
                pid = server.pid
                assert pid, "the server ended"
                os.kill(pid, signal.SIGSTOP)
                try:
                    acknowledged = writers.acknowledged()
                    yield Image(_copied(disk, folder / f"disk-{number}"), acknowledged)
                finally:
                    os.kill(pid, signal.SIGCONT)


class _Writers(WorkerThreads):
    """Threads that append events as fast as they can, and note the acknowledged ones."""

    def __init__(self, url: str) -> None:
        super().__init__(WRITERS)
        self._url = url
        self._noted: dict[str, int] = {}

    def count(self) -> int:
        """Returns the number of acknowledged events."""
        return len(self._noted)

    def acknowledged(self) -> dict[str, int]:
        """Returns the log ids of the events acknowledged so far."""
        with self.lock:
            return dict(self._noted)

    def work(self, number: int) -> None:
        """Appends one batch after another."""
        with connect(self._url, 20.0) as client:
            log, batch = EventLog(client, PARTITIONS, unsafe=True), 0  # the control writes where events can be lost
            while not self.stopping.is_set():
                events = [event(f"{number}-{batch}-{place}") for place in range(BATCH)]
                appended = insist(lambda events=events: log.append(events), 60.0)
                with self.lock:
                    self._noted |= {one.event_id: entry.log_id for one, entry in zip(events, appended, strict=True)}
                batch += 1


def event(name: str) -> LoggedEvent:
    """Returns an event whose user and content follow from its id, so that it can be sent again."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    record = make_records(int.from_bytes(digest, "little"), 0, 0, FUTURE, np.nan, 1).tobytes()
    return LoggedEvent(f"u:{digest[0] % USERS}", name, record, json.dumps({"event_id": name}).encode())


def _copied(disk: Path, to: Path) -> Path:
    """Copies a disk as it is at one moment: once more where something was written to it meanwhile."""
    while True:
        shutil.copyfile(disk, to)
        if _digest(disk) == _digest(to):
            return to


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _examined(image: Image, folder: Path) -> dict[str, int]:
    """Starts a server on an image and asks it for the acknowledged events."""
    with (
        mounted(image.disk, folder / "image") as at,
        RedisServer(at, "events") as server,
        connect(server.url, 60.0) as client,
    ):
        log = EventLog(client, PARTITIONS, unsafe=True)
        stored = _places(log)
        lost = sum(stored.get(name) != [place] for name, place in image.acknowledged.items())
        kept = [name for name in image.acknowledged if name in stored]
        for start in range(0, len(kept), 500):
            log.append([event(name) for name in kept[start : start + 500]])
        doubled = sum(len(places) - 1 for places in _places(log).values())
    image.disk.unlink()
    return {"acknowledged": len(image.acknowledged), "lost": lost, "doubled": doubled}


def _places(log: EventLog) -> dict[str, list[int]]:
    """Returns every log id of each event id."""
    places: dict[str, list[int]] = {}
    for partition in range(PARTITIONS):
        for entry in log.read(partition, count=10_000_000):
            places.setdefault(entry.event_id, []).append(entry.log_id)
    return places


def main() -> None:
    """Prints one line of JSON; the status is 1 if the proof failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    try:
        result = power_loss(words.images, seed=words.seed)
        control = power_loss(3, fsync="no", seed=words.seed)
    except CannotMountError as error:
        print(json.dumps({"proved": False, "reason": str(error)}))
        return
    print(json.dumps(result | {"proved": True, "control": control}))
    if result["lost"] or result["doubled"] or not control["lost"]:
        raise SystemExit("the proof failed")


if __name__ == "__main__":
    main()
