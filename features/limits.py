"""Finds the processors and the memory that this process may use: of the machine, its affinity mask and its container.

In a container the kernel still reports the whole machine; what the container may take is the limit of its control group
and of every group around it. A process that takes more is throttled or killed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

_ROOT = Path("/")
_PERIOD_US = 100_000.0
_PLACE = 4
"""Field of a line of mountinfo that holds where the mount is; the one before holds what of it is mounted."""
_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


class _Mount(NamedTuple):
    """A mounted hierarchy of control groups.

    Attributes:
        place: Directory it is mounted at, without the leading slash.
        inside: The group that this directory shows.
        controller: The controller by which the kernel names the groups of version 1; empty in version 2.
    """

    place: str
    inside: str
    controller: str


def cores(root: Path = _ROOT) -> int:
    """Returns the number of processors that may work at once, at least 1; part of one counts as one.

    Args:
        root: Directory that holds `proc` and `sys`.
    """
    quotas = [math.ceil(quota) for group in _groups(root, "cpu") if (quota := _processors(group))]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def memory(root: Path = _ROOT) -> int:
    """Returns the bytes of memory that this process may use.

    Args:
        root: Directory that holds `proc` and `sys`.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Version 2 throttles above `high` and kills above `max`; version 1 says "no limit" by a number beyond any machine.
    files = ("memory.max", "memory.high", "memory.limit_in_bytes")
    limits = (_number(_text(group / name)) for group in _groups(root, "memory") for name in files)
    return min([whole, *(int(limit) for limit in limits if limit)])


def _processors(group: Path) -> float | None:
    """Returns the processors' worth of time that a group grants; None without a limit."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    granted = _number(quota)
    return granted / (_number(period) or _PERIOD_US) if granted else None


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the directories of the groups that this process is in, with those around them, of both versions."""
    for mount in _mounts(root, controller):
        top = group = root / mount.place
        own_group = _own(root, mount.controller)
        # A group that is not below what is mounted has been hidden by a namespace: then the mount shows our own.
        if ".." not in own_group.parts and own_group.is_relative_to(mount.inside):
            group = top / own_group.relative_to(mount.inside)
        yield group
        while group != top:
            group = group.parent
            yield group


def _mounts(root: Path, controller: str) -> list[_Mount]:
    mounts = []
    for line in _text(root / "proc/self/mountinfo").splitlines():
        mounted, _, source = line.partition(" - ")
        fields, kind, options = mounted.split(" "), source.partition(" ")[0], source.rpartition(" ")[2]
        if len(fields) < _PLACE + 1:  # no line of a kernel, as some sandboxes write them
            continue
        if kind == "cgroup2" or (kind == "cgroup" and controller in options.split(",")):
            place, inside = _unescaped(fields[_PLACE]).lstrip("/"), _unescaped(fields[_PLACE - 1])
            mounts.append(_Mount(place, inside, controller if kind == "cgroup" else ""))
    usual = [_Mount("sys/fs/cgroup", "/", ""), _Mount(f"sys/fs/cgroup/{controller}", "/", controller)]
    return mounts or usual


def _own(root: Path, controller: str) -> PurePosixPath:
    """Returns the group of this process in the hierarchy of a controller; the outermost if the kernel names none."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, fields = line.partition(":")
        controllers, _, path = fields.partition(":")
        if controller in controllers.split(","):
            return PurePosixPath(path)
    return PurePosixPath("/")


def _unescaped(name: str) -> str:
    """Returns a path of mountinfo, where blanks and the like are octal numbers."""
    for written, sign in _ESCAPES.items():
        name = name.replace(written, sign)
    return name


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:  # a kernel without control groups, or without this controller, has no such limit
        return ""


def _number(text: str) -> float | None:
    """Returns a limit; None for "max", -1 and any other text that is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None
