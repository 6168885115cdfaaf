"""The slates of a batch on their way into the log: in a file until the output is delivered, then logged once each.

A run writes its slates next to its output, under a name that holds the id of the run; the output holds the id too. So
one rename decides: once the output is in its place it counts as delivered, and what a crash leaves to log is logged by
the next run into the same output. The slates of an output that never came into its place are deleted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from features.private_files import open_private
from serving.errors import ConfigError, EventLogUnavailable
from serving.stores.event_log import EventLog
from serving.stores.keys import SEQUENCE_BITS
from serving.stores.log_codec import decode, subject_in
from serving.stores.log_entries import LoggedImpression

RUN = b"penchant.run"
"""Metadata key of an output that holds the id of its run."""

_DUE = ".due"
_TOGETHER = 256
_ATTEMPTS = 10
_PAUSE_S = 0.5
_CLOCKS_MS = 3_600_000
"""Most that the clock of the log may be behind that of a slate, ms."""
_log = logging.getLogger(__name__)


class SlateFile:
    """The slates of one run, in a file that no other process takes for abandoned while this is open.

    The end of the context deletes it unless the output of the run is in its place.
    """

    def __init__(self, out: Path, run: str) -> None:
        """Creates the file next to the output of the run.

        Raises:
            ConfigError: Another process, begun in the same moment, writes this output too.
        """
        self.path = out.with_name(f"{out.name}.{run}.slates")
        self._out, self._run = out, run
        # Under a name that `finish` looks for only once it is locked.
        begun = out.with_name(f"{out.name}.{run}.begun")
        self._file: IO[bytes] = open_private(begun, "xb")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        os.replace(begun, self.path)
        # Both of two runs that begin in the same moment see two files, so that at most one goes on.
        if _of(out) != [self.path]:
            self.path.unlink()
            self._file.close()
            raise _busy(out)

    def __enter__(self) -> Self:
        """Returns the file itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        if self.path.suffix != _DUE and run_of(self._out) != self._run:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def due(self) -> None:
        """Notes in the name that the output is in its place, wherever it goes from there."""
        path = self.path.with_name(f"{self.path.name}{_DUE}")
        os.replace(self.path, path)
        self.path = path

    def write(self, slates: Sequence[LoggedImpression]) -> None:
        """Adds slates."""
        self._file.writelines(slate.payload + b"\n" for slate in slates)

    def sync(self) -> None:
        """Brings all of them to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())


def finish(out: Path, log: EventLog) -> int:
    """Logs what earlier runs into an output have delivered and not logged; returns the number of these slates.

    Raises:
        ConfigError: Another process writes this output now.
        Unavailable: The events Redis does not answer; the file stays.
        ResourceExhausted: The log is full; the file stays.
    """
    finished = 0
    for path in _of(out):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _busy(out) from None
            if path.suffix == _DUE or path.name == f"{out.name}.{run_of(out)}.slates":
                logged, refused = deliver(path, log, checking=True)
                _log.warning("%s: %d slates of an earlier run are logged now, %d may not be", path, logged, refused)
                finished += logged
            else:
                _log.warning("%s is deleted: its slates were never delivered", path)
                path.unlink()
    return finished


def deliver(path: Path, log: EventLog, *, checking: bool = False) -> tuple[int, int]:
    """Logs each slate of a file once, then deletes the file.

    Args:
        path: The file.
        log: The event log.
        checking: Look first which of them are in the log already.

    Returns:
        The number of slates that are in the log, and of those that may not be: users who allow neither training nor
        measuring, or were erased meanwhile.

    Raises:
        Unavailable: The events Redis does not answer; the file stays, to be logged by the next run.
        ResourceExhausted: The log is full; the file stays.
    """
    logged = refused = 0
    for slates in _read(path):
        written = _append(log, slates, checking)
        logged, refused = logged + written, refused + len(slates) - written
    path.unlink()
    return logged, refused


def _append(log: EventLog, slates: Sequence[LoggedImpression], checking: bool) -> int:
    """Appends slates; where a reply is lost, looks which of them are there, so that none is there twice."""
    for attempt in range(_ATTEMPTS):
        try:
            missing = _missing(slates, log) if checking else slates
            return len(slates) - len(missing) + log.append_impressions(missing)
        except EventLogUnavailable:
            if attempt == _ATTEMPTS - 1:
                raise
            checking = True
            time.sleep(_PAUSE_S)
    raise AssertionError("the last attempt returns or raises")


def _missing(slates: Sequence[LoggedImpression], log: EventLog) -> list[LoggedImpression]:
    """Returns the slates that the log does not hold."""
    return [slate for slate in slates if slate.payload not in _held(slate, log)]


def _held(slate: LoggedImpression, log: EventLog) -> set[bytes]:
    """Returns the slates of the same user that came since."""
    # Only those since: the whole history of a user can be long.
    after = max(slate.timestamp - _CLOCKS_MS, 0) << SEQUENCE_BITS
    pieces = log.history(slate.subject, impressions=True, after=after)
    return {entry.payload for entries in pieces for entry in entries}


def _read(path: Path) -> Iterator[list[LoggedImpression]]:
    """Yields the slates of a file, some at a time."""
    with path.open("rb") as file:
        while lines := list(islice(file, _TOGETHER)):
            yield [_slate(line.rstrip(b"\n")) for line in lines]


def _slate(payload: bytes) -> LoggedImpression:
    fields = decode(payload)
    return LoggedImpression(subject_in(fields), fields["timestamp"], payload)


def run_of(out: Path) -> str:
    """Returns the id of the run that made an output, "" if it has none."""
    try:
        return (pq.read_schema(out).metadata or {}).get(RUN, b"").decode()
    except (OSError, pa.ArrowException):
        return ""


def _of(out: Path) -> list[Path]:
    """Returns the files of slates of an output, of any run."""
    return sorted(out.parent.glob(f"{_escaped(out.name)}.*.slates*"))


def _busy(out: Path) -> ConfigError:
    return ConfigError(f"{out} is being written by another process: wait for it, or give another --out")


def _escaped(name: str) -> str:
    """Returns a name as a pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
