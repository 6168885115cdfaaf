"""The processes of a service on this machine: their processor time and memory, by the kernel's own count."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from penchant.channels import is_local

_PROC = Path("/proc")
_LISTEN = "0A"
_STORES = ("redis-server", "valkey-server")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """The use of a machine by a tree of processes.

    Attributes:
        service_s: Processor seconds of the service's own processes since they began.
        stores_s: Processor seconds of the Redis servers that it started.
    """

    service_s: float
    stores_s: float

    def __sub__(self, earlier: Usage) -> Usage:
        """Returns the use since an earlier moment."""
        return Usage(self.service_s - earlier.service_s, self.stores_s - earlier.stores_s)


class ProcessTree:
    """A process and all that it started.

    Attributes:
        pid: Id of the first process.
    """

    def __init__(self, pid: int) -> None:
        """Takes the id of the first process."""
        self.pid = pid

    @classmethod
    def listening_at(cls, target: str) -> ProcessTree | None:
        """Returns the tree whose processes listen at a target; None if it is on another machine, or not to be seen."""
        if not is_local(target):
            return None
        port = target.rpartition(":")[2]
        holders = set(_holders(_listeners(int(port)))) if port.isdigit() else set()
        # Workers share a socket with the process that started them: the tree begins with that one.
        first = [pid for pid in holders if not holders & set(_ancestors(pid))]
        return cls(min(_service_root(pid) for pid in first)) if first else None

    def usage(self) -> Usage:
        """Returns the processor time of the tree, with that of processes which have ended."""
        times = {True: 0.0, False: 0.0}
        for pid in self._pids():
            fields = _stat(pid)
            if fields:
                name = fields[0]
                # Own time and that of children that were waited for: a worker that was replaced has not cost nothing.
                times[name in _STORES] += sum(map(int, fields[12:16])) * _TICK_S
        return Usage(times[False], times[True])

    def rss_bytes(self) -> int:
        """Returns the resident memory of the tree; what several processes share counts for each."""
        total = 0
        for pid in self._pids():
            with contextlib.suppress(OSError, ValueError, IndexError):
                total += int((_PROC / str(pid) / "statm").read_text(encoding="utf-8").split()[1]) * _PAGE_BYTES
        return total

    def proportional_bytes(self, *, stores: bool = True) -> dict[int, int]:
        """Returns the memory of each process; what several share is divided among them.

        Args:
            stores: Also of the Redis servers that it started.
        """
        sizes = {}
        for pid in self._pids():
            fields = _stat(pid)
            if fields and (stores or fields[0] not in _STORES):
                sizes[pid] = _mapped(pid, ("Pss:",))
        return sizes

    def _pids(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for pid in _all_pids():
            fields = _stat(pid)
            if fields:
                children.setdefault(int(fields[2]), []).append(pid)
        tree, waiting = [], [self.pid]
        while waiting:
            pid = waiting.pop()
            tree.append(pid)
            waiting += children.get(pid, [])
        return tree


def private_bytes(pid: int) -> int:
    """Returns the memory that a process shares with no other one; 0 if it has ended."""
    return _mapped(pid, ("Private_Clean:", "Private_Dirty:"))


def _mapped(pid: int, names: tuple[str, ...]) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))


def _all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir(_PROC) if name.isdigit())


def _stat(pid: int) -> list[str] | None:
    """Returns the name of a process and the fields of `stat` behind it; None if it has ended."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8")
    except OSError:
        return None
    # The name stands in brackets and may hold spaces and brackets itself.
    name = text[text.index("(") + 1 : text.rindex(")")]
    return [name, *text[text.rindex(")") + 2 :].split()]


def _ancestors(pid: int) -> Iterator[int]:
    while (fields := _stat(pid)) and (pid := int(fields[2])):
        yield pid


def _service_root(pid: int) -> int:
    """Returns the topmost process above `pid` that runs the same program: the supervisor of a worker."""
    program, root = _program(pid), pid
    for ancestor in _ancestors(pid):
        if ancestor == os.getpid() or _program(ancestor) != program or not _is_penchant(ancestor):
            break
        root = ancestor
    return root


def _program(pid: int) -> str:
    try:
        return os.readlink(_PROC / str(pid) / "exe")
    except OSError:
        return ""


def _is_penchant(pid: int) -> bool:
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return False
    return b"penchant" in command or b"serving." in command


def _listeners(port: int) -> set[str]:
    """Returns the inodes of the sockets that listen at a port of this machine."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text(encoding="utf-8").splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(fields[9])
    return inodes


def _holders(inodes: set[str]) -> Iterator[int]:
    names = {f"socket:[{inode}]" for inode in inodes}
    for pid in _all_pids():
        with contextlib.suppress(OSError):
            folder = _PROC / str(pid) / "fd"
            for entry in os.listdir(folder):
                with contextlib.suppress(OSError):
                    if os.readlink(folder / entry) in names:
                        yield pid
                        break
