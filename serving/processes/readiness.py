"""The state of the whole service over HTTP: `/healthz` tells liveness, `/readyz` readiness for calls.

    GET /healthz   200 while the supervisor works; 503 is a reason to restart the service
    GET /readyz    200 while calls are answered, also degraded; 503 while the service starts, stops or has no worker

Both return JSON. `degraded` holds what is wrong by part, in a text without any user's id.
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
"""Free space of a disk below which it counts as full: Redis and the warehouse need some to rewrite files."""


class Readiness:
    """Combines the states of all processes into that of the service.

    Attributes:
        phase: The phase of the service's life.
    """

    def __init__(self, config: ServeConfig) -> None:
        """Begins without processes; `watch` adds them."""
        self.phase: Literal["starting", "serving", "stopping"] = "starting"
        self._strict = config.strict_readiness
        self._folders = (config.state_dir, config.warehouse_path) if config.warehouse else (config.state_dir,)
        self._workers: Sequence[ManagedProcess] = ()
        self._readers: Sequence[ManagedProcess] = ()
        self._own_trouble: Mapping[str, str] = {}
        self._ticked: float | None = None

    def watch(self, workers: Sequence[ManagedProcess], readers: Sequence[ManagedProcess]) -> None:
        """Sets the processes of the service."""
        self._workers, self._readers = workers, readers

    def set_own_state(self, state: Mapping[str, Any]) -> None:
        """Sets the state of the supervisor's own parts: `{"trouble": {part: text}}`."""
        self._own_trouble = state["trouble"]

    def tick(self) -> None:
        """Notes that the supervisor works; after the first call, silence for `HUNG_S` counts as hung."""
        self._ticked = time.monotonic()

    def pages(self) -> Mapping[str, Render]:
        """Returns the pages for an HTTP server."""
        return {"/healthz": lambda _: _page(*self.alive()), "/readyz": lambda _: _page(*self.ready())}

    def alive(self) -> tuple[bool, dict[str, Any]]:
        """Returns True if the supervisor works, and the body of /healthz."""
        # While it starts or stops, the supervisor waits for its processes and need not tick.
        silent = time.monotonic() - self._ticked if self._ticked is not None and self.phase == "serving" else 0.0
        if silent > HUNG_S:
            return False, {"status": "hung", "seconds": round(silent)}
        return True, {"status": "alive", "phase": self.phase}

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Returns True if calls are answered, and the body of /readyz."""
        serving = sum(worker.ready for worker in self._workers)
        degraded = self.degraded()
        is_ready = self.phase == "serving" and serving > 0 and not (self._strict and degraded)
        status = "not ready" if not is_ready else "degraded" if degraded else "ready"
        workers = {"ready": serving, "of": len(self._workers)}
        return is_ready, {"status": status, "phase": self.phase, "workers": workers, "degraded": degraded}

    def degraded(self) -> dict[str, str]:
        """Returns what is wrong, by part; of several workers that report the same part, the first counts."""
        trouble = dict(self._own_trouble)
        for process in (*self._workers, *self._readers):
            trouble = process.trouble() | trouble
        for folder in self._folders:
            if problem := full_disk(folder):
                trouble["disk"] = problem
        return dict(sorted(trouble.items()))


def full_disk(folder: Path, room: int = ROOM_BYTES) -> str:
    """Returns the reason why a folder's disk takes no more files, empty if it takes some.

    Args:
        folder: A folder, which need not exist yet.
        room: Bytes that have to be free.
    """
    # A folder that does not exist yet will be on the disk of its nearest parent.
    nearest = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    if nearest is None:
        return ""
    disk = os.statvfs(nearest)
    free = disk.f_bavail * disk.f_frsize
    if free < room:
        return f"{folder.name}: {free >> 20} MiB free, {room >> 20} MiB are needed"
    # Some file systems report no inodes at all.
    if disk.f_files and not disk.f_favail:
        return f"{folder.name}: no inodes free"
    return ""


def _page(is_good: bool, body: dict[str, Any]) -> Page:
    return Page(json.dumps(body).encode() + b"\n", "application/json", 200 if is_good else 503)
