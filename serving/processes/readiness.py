"""The state of the whole service over HTTP: `/healthz` says that it lives, `/readyz` that it can be sent calls.

    GET /healthz   200 while the supervisor works; 503 is a reason to start it again
    GET /readyz    200 while calls are answered, also degraded; 503 while it starts, stops or has no worker

Both answer with JSON. `degraded` holds, by part, what is wrong, in words without any user's id.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from serving.config import ServeConfig
from serving.processes.http_server import Page, Render
from serving.processes.managed_process import ManagedProcess

HUNG_S = 15.0
"""Time without a tick of the supervisor after which the service counts as hung."""

ROOM_BYTES = 256 << 20
"""Free space of a disk below which it counts as full: Redis and the warehouse need some to write files anew."""


class Readiness:
    """Puts the states of all processes together.

    Attributes:
        phase: How far the service is.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Takes the settings; `watch` is told the processes."""
        self.phase: Literal["starting", "serving", "stopping"] = "starting"
        self._strict = config.strict_readiness
        self._folders = (config.state_dir, config.warehouse_path) if config.warehouse else (config.state_dir,)
        self._workers: Sequence[ManagedProcess] = ()
        self._readers: Sequence[ManagedProcess] = ()
        self._own: Mapping[str, str] = {}
        self._ticked: float | None = None

    def watch(self, workers: Sequence[ManagedProcess], readers: Sequence[ManagedProcess]) -> None:
        """Takes the processes of the service."""
        self._workers, self._readers = workers, readers

    def tell(self, state: Mapping[str, Any]) -> None:
        """Takes the state of the supervisor's own parts: `{"trouble": {part: text}}`."""
        self._own = state["trouble"]

    def tick(self) -> None:
        """Notes that the supervisor works; to be called all the time from the first time on."""
        self._ticked = time.monotonic()

    def pages(self) -> Mapping[str, Render]:
        """Returns the pages for an HTTP server."""
        return {"/healthz": lambda _: _page(*self.alive()), "/readyz": lambda _: _page(*self.ready())}

    def alive(self) -> tuple[bool, dict[str, Any]]:
        """Returns True if the supervisor works, and what /healthz says."""
        silent = time.monotonic() - self._ticked if self._ticked is not None and self.phase == "serving" else 0.0
        if silent > HUNG_S:
            return False, {"status": "hung", "seconds": round(silent)}
        return True, {"status": "alive", "phase": self.phase}

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Returns True if calls are answered, and what /readyz says."""
        serving = sum(worker.ready for worker in self._workers)
        degraded = self.degraded()
        is_ready = self.phase == "serving" and serving > 0 and not (self._strict and degraded)
        status = "not ready" if not is_ready else "degraded" if degraded else "ready"
        workers = {"ready": serving, "of": len(self._workers)}
        return is_ready, {"status": status, "phase": self.phase, "workers": workers, "degraded": degraded}

    def degraded(self) -> dict[str, str]:
        """Returns what is wrong, by part; of several workers that say the same part, the first counts."""
        found = dict(self._own)
        for child in (*self._workers, *self._readers):
            found = child.trouble() | found
        for folder in self._folders:
            if why := full_disk(folder):
                found["disk"] = why
        return dict(sorted(found.items()))


def full_disk(folder: Path, room: int = ROOM_BYTES) -> str:
    """Returns why nothing more can be written into a folder, empty where something can.

    Args:
        folder: A folder, which need not be there yet.
        room: Bytes that have to be free.
    """
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), None)
    if there is None:
        return ""
    disk = os.statvfs(there)
    free = disk.f_bavail * disk.f_frsize
    if free < room:
        return f"{folder.name}: {free >> 20} MiB free, {room >> 20} MiB are needed"
    if disk.f_files and not disk.f_favail:
        return f"{folder.name}: no inodes free"
    return ""


def _page(good: bool, body: dict[str, Any]) -> Page:
    return Page(json.dumps(body).encode() + b"\n", "application/json", 200 if good else 503)
