"""The erasures of a service in a file outside its stores, so that a store put back from a backup goes through them."""

from __future__ import annotations

import json
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import ForeignFileError
from features.files import sync
from features.private_files import make_folders, open_private
from serving.errors import ConfigError, Unavailable

_ID = re.compile(r"[0-9a-f]{4}-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Erasure:
    """What it takes to make an erasure hold again; it names nobody.

    Attributes:
        certificate_id: Its certificate.
        person: Keyed hash under which the log remembers it; 16 bytes.
        address: Where the person's profile is found, `redis_client.address_of`; 16 bytes.
        log_id: Where it stands in the log.
    """

    certificate_id: str
    person: bytes
    address: bytes
    log_id: int

    @property
    def partition(self) -> int:
        """The partition of the person."""
        return int(self.certificate_id[:4], 16)


class Ledger:
    """The erasures of this service in a file that is kept outside the stores; one line of JSON each."""

    def __init__(self, path: Path) -> None:
        """Names the file; it comes into being with the first erasure."""
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
            with open_private(self._path, "ab", buffering=0) as sink:  # one write: those of several workers do not mix
                sink.write(lines)
                os.fsync(sink.fileno())
            if new:
                sync(self._path.parent)
        except (OSError, ForeignFileError) as error:
            raise Unavailable(f"the erasure holds, and {self._path} cannot be written ({error}); repeat it") from error

    def erasures(self) -> list[Erasure]:
        """All that it holds, oldest first.

        Raises:
            ConfigError: A line of it is damaged.
        """
        if not self._path.exists():
            return []
        found = []
        for number, line in enumerate(self._path.read_bytes().splitlines(), 1):
            try:
                found.append(of_line(line))
            except (ValueError, KeyError, TypeError) as error:
                # A crash leaves half of the last line, of an erasure that was not answered yet.
                raise ConfigError(
                    f"{self._path}, line {number} is no erasure ({error!r}): take it from a copy, or remove it where "
                    "it is the last one and cut short"
                ) from error
        return found


def new_certificate_id(partition: int) -> str:
    """Returns a new name for a certificate; it tells the partition."""
    return f"{partition:04x}-{secrets.token_hex(16)}"


def is_certificate_id(text: str) -> bool:
    """Returns True if a text has the form of a certificate id."""
    return bool(_ID.fullmatch(text))


def to_line(erasure: Erasure) -> dict[str, Any]:
    """An erasure as JSON."""
    line = {"certificate_id": erasure.certificate_id, "log_id": erasure.log_id}
    return line | {"person": erasure.person.hex(), "address": erasure.address.hex()}


def of_line(line: bytes) -> Erasure:
    """An erasure of a line; raises ValueError, KeyError or TypeError for what is none."""
    said = json.loads(line)
    hashes = bytes.fromhex(said["person"]), bytes.fromhex(said["address"])
    return Erasure(_require_id(said["certificate_id"]), *hashes, int(said["log_id"]))


def _require_id(certificate_id: str) -> str:
    """A certificate id as it is; raises ValueError for what is none."""
    if not is_certificate_id(certificate_id):
        raise ValueError(f"{certificate_id!r} is no certificate id")
    return certificate_id
