"""The erasures of a service in a file outside its stores, so that they can be replayed into a restored backup."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from features.errors import ForeignFileError
from features.files import sync
from features.private_files import make_folders, open_private
from serving.errors import ConfigError, Unavailable

_ID = re.compile(r"[0-9a-f]{4}-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure as far as a replay needs it; it holds no user id.

    Attributes:
        certificate_id: Id of its certificate.
        subject_hash: Keyed hash under which the log stores it; 16 bytes.
        address: Address of the user's profile, as `address_of` returns it; 16 bytes.
        log_id: Its log id.
    """

    certificate_id: str
    subject_hash: bytes
    address: bytes
    log_id: int

    @property
    def partition(self) -> int:
        """The partition of the user."""
        return int(self.certificate_id[:4], 16)


class Ledger:
    """The erasures of this service in a file that is kept outside the stores; one line of JSON each."""

    def __init__(self, path: Path) -> None:
        """Takes the path of the file, which the first erasure creates."""
        self._path = path

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def note(self, *erasures: Erasure) -> None:
        """Adds erasures; they are on disk when this returns.

        Raises:
            Unavailable: The file cannot be written; the erasure holds all the same, and a repeat notes it.
        """
        lines = b"".join(json.dumps(to_line(erasure)).encode() + b"\n" for erasure in erasures)
        try:
            make_folders(self._path.parent)
            new = not self._path.exists()
            with open_private(self._path, "ab", buffering=0) as sink:
                # One worker at a time, so that what a full disk takes of the lines can be taken back.
                fcntl.flock(sink, fcntl.LOCK_EX)
                _append(sink, lines)
            # A new file is on disk only once its directory is.
            if new:
                sync(self._path.parent)
        except (OSError, ForeignFileError) as error:
            raise Unavailable(f"the erasure holds, and {self._path} cannot be written ({error}); repeat it") from error

    def erasures(self) -> list[Erasure]:
        """Reads all erasures, oldest first.

        Raises:
            ConfigError: A line of it is damaged.
        """
        if not self._path.exists():
            return []
        erasures = []
        for number, line in enumerate(self._path.read_bytes().splitlines(), 1):
            try:
                erasures.append(of_line(line))
            except (ValueError, KeyError, TypeError) as error:
                # A crash may cut the last line short; the call that wrote it was not answered, and is repeated.
                raise ConfigError(
                    f"{self._path}, line {number} is no erasure ({error!r}): take it from a copy, or remove it if "
                    "it is the last line and cut short"
                ) from error
        return erasures


def _append(sink: IO[bytes], lines: bytes) -> None:
    """Adds lines to an open file; they are on disk when this returns, and none of them is there if it fails.

    Raises:
        OSError: The disk is full or gone.
    """
    end = sink.seek(0, os.SEEK_END)
    try:
        # A disk that is nearly full takes a part without an error. The next line would be joined to that.
        if sink.write(lines) < len(lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(sink.fileno())
    except OSError:
        os.ftruncate(sink.fileno(), end)
        raise


def new_certificate_id(partition: int) -> str:
    """Returns a new certificate id, which begins with the partition."""
    return f"{partition:04x}-{secrets.token_hex(16)}"


def is_certificate_id(text: str) -> bool:
    """Returns True if a text has the form of a certificate id."""
    return bool(_ID.fullmatch(text))


def to_line(erasure: Erasure) -> dict[str, Any]:
    """Returns an erasure as the fields of a line."""
    line = {"certificate_id": erasure.certificate_id, "log_id": erasure.log_id}
    return line | {"person": erasure.subject_hash.hex(), "address": erasure.address.hex()}


def of_line(line: bytes) -> Erasure:
    """Returns the erasure of a line; raises ValueError, KeyError or TypeError if there is none in it."""
    fields = json.loads(line)
    hashes = bytes.fromhex(fields["person"]), bytes.fromhex(fields["address"])
    return Erasure(_require_id(fields["certificate_id"]), *hashes, int(fields["log_id"]))


def _require_id(certificate_id: str) -> str:
    """Returns a certificate id; raises ValueError if the text is none."""
    if not is_certificate_id(certificate_id):
        raise ValueError(f"{certificate_id!r} is no certificate id")
    return certificate_id
