"""The identity of a folder: a file inside tells which one it is, because its path cannot.

The same path on two hosts may be two folders, and two paths may be one. So a folder that the log knows holds a file
`.identity` with an id that it keeps for ever, and with a token that the process which holds the folder changes every
two seconds, in the file and in the log. If the file changes with the log, it is the same folder; if it does not, it is
a copy, such as a cloned disk.
"""

from __future__ import annotations

import json
import os
import re
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from features.files import sync
from serving.errors import ConfigError

NAME = ".identity"
HOST = ".host"
"""Folder below a state directory that holds the identity of the host; the directory itself may be a warehouse."""

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+")


@dataclass(frozen=True, slots=True)
class FolderIdentity:
    """The identity of a folder, as the log knows it.

    Attributes:
        copy_id: Its id; 32 hexadecimal digits.
        token: Name of the process that took the folder last, and a count.
    """

    copy_id: str
    token: str

    @property
    def process(self) -> str:
        """The part of the token that stays while the process runs."""
        return self.token.partition(".")[0]

    def next(self) -> FolderIdentity:
        """Returns the identity with the next token of the same process."""
        process, _, count = self.token.partition(".")
        return FolderIdentity(self.copy_id, f"{process}.{int(count or 0) + 1}")


def new_id() -> str:
    """Returns a new id or token."""
    return uuid.uuid4().hex


def local_folder(place: str | Path) -> Path:
    """Returns the folder that a path or a `file://` URL names.

    Raises:
        ConfigError: It is a URL of another kind.
    """
    text = str(place)
    # A URL that was a Path for a while has lost one of its slashes.
    url = _URL.match(text)
    if not url:
        return Path(text)
    if url[1].lower() == "file":
        parts = urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{text}: the folder of a file:// URL is one of this host; mount it, and name it by path")
        return Path(unquote(parts.path))
    raise ConfigError(
        f"{url[1]}://{text[url.end() :]} cannot hold a warehouse, whose files are replaced in place under a lock; "
        "give a folder that every host mounts (NFS, CephFS and the like), as a path or as file:///PATH"
    )


def read_identity(folder: Path) -> FolderIdentity | None:
    """Returns the identity of a folder, None if it has none yet.

    Raises:
        ConfigError: The file is damaged.
    """
    path = folder / NAME
    try:
        facts = json.loads(path.read_bytes())
        return FolderIdentity(str(facts["id"]), str(facts["token"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no identity ({error!r}): take it from a copy; if there is none, remove it, and penchant hosts "
            "--retire the id that is registered for this folder"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give this user access to it") from error


def write_identity(folder: Path, identity: FolderIdentity) -> None:
    """Writes the identity of a folder; it is on disk when this returns.

    Raises:
        OSError: The disk is full or gone.
    """
    # Renamed into place once it is on disk, so that no crash leaves half an identity.
    draft = folder / f"{NAME}.{identity.token}.tmp"
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as sink:
        json.dump({"id": identity.copy_id, "token": identity.token}, sink)
        sink.flush()
        os.fsync(sink.fileno())
    os.replace(draft, folder / NAME)
    sync(folder)


def host_name() -> str:
    """Returns the name of this host, as its administrator knows it."""
    return socket.gethostname()


def kernel_id() -> str:
    """Returns the id of the running kernel and of the namespace of its process ids."""
    try:
        return f"{_BOOT.read_text(encoding='ascii').strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def runs(pid: int) -> bool:
    """Returns True if a process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True
