"""The health of a worker: looks at what it needs once a second, and sets the gRPC health of its services accordingly.

A service that cannot work says NOT_SERVING while the others serve on: without a safe events Redis no event can be
taken, but rankings can be made. The worker as a whole, and ranking with it, serve as long as the worker answers,
degraded or not, unless readiness is strict.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from redis.exceptions import RedisError

from features.errors import PenchantError
from serving.engine.catalog_sync import CatalogSync
from serving.errors import Unavailable
from serving.observability.outages import Outage
from serving.redis.client import Client
from serving.redis.errors import serving_error
from serving.redis.safety import require_safe
from serving.redis.servers import write_trouble
from serving.restart import Trouble, described
from serving.stores.catalog_log import CatalogLog, CatalogProgress
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore

RANKING = "penchant.v1.RankingService"
EVENTS = "penchant.v1.EventService"
PROFILES = "penchant.v1.ProfileService"
CATALOG = "penchant.v1.CatalogService"
OVERALL = ""
"""The service name of gRPC's health protocol that stands for the server as a whole."""

BEHIND_S = 5.0
"""Time that a worker may take to apply a change of the catalogue before it counts as behind."""

_PERIOD_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a worker needs.

    Attributes:
        name: Its name in /readyz.
        look: Returns what is wrong with it, empty where nothing is; may raise PenchantError or RedisError instead.
        needed_by: Full names of the services that cannot work without it.
    """

    name: str
    look: Callable[[], str]
    needed_by: Sequence[str] = ()


class HealthMonitor:
    """Looks at the parts of a worker until it is closed."""

    def __init__(
        self,
        parts: Sequence[Part],
        say: Callable[[str, bool], None],
        tell: Callable[[dict[str, Any]], None] = lambda _: None,
        *,
        strict: bool = False,
    ) -> None:
        """Takes what to look at and whom to tell; `look` does so once, `start` from then on in the background.

        Args:
            parts: What the worker needs.
            say: Sets whether a service, by its full name, serves.
            tell: Told the state of the worker: `{"trouble": {part: text}}`.
            strict: Let the worker as a whole serve only while no part is in trouble.
        """
        self._parts, self._say, self._strict = parts, say, strict
        trouble = Trouble(tell)
        self._reports = {part.name: trouble.reporter(part.name) for part in parts}
        self._serving = dict.fromkeys((OVERALL, RANKING, EVENTS, PROFILES, CATALOG), True)
        self._outages = {part.name: Outage(_log, f"degraded: {part.name}") for part in parts}
        self._saying, self._quiet = threading.Lock(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        """Says again what does not serve, for a server that has just begun and says that all does; then goes on."""
        for service, serving in self._serving.items():
            if not serving:
                self._say(service, False)
        self._thread.start()

    def hush(self) -> None:
        """Says nothing more of the services, and goes on looking: calls in hand still need safe stores."""
        with self._saying:
            self._quiet = True

    def close(self) -> None:
        """Stops looking."""
        self.hush()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * _PERIOD_S)  # a Redis that hangs keeps no worker from ending

    def look(self) -> Mapping[str, str]:
        """Looks at every part once, and says what changed; returns what is wrong, by part."""
        wrong = {part.name: text for part in self._parts if (text := self._looked(part))}
        missing = {service for part in self._parts if part.name in wrong for service in part.needed_by}
        if self._strict and wrong:
            missing |= {OVERALL, RANKING}
        with self._saying:
            for service, before in self._serving.items():
                if before is (service in missing) and not self._quiet:
                    self._serving[service] = not before
                    self._say(service, not before)
        for part in self._parts:
            self._reports[part.name](wrong.get(part.name, ""))
        return wrong

    def _looked(self, part: Part) -> str:
        outage = self._outages[part.name]
        try:
            text = part.look()
        except Unavailable as error:  # of which each call to Redis speaks
            return described(error)
        except (RedisError, PenchantError) as error:
            text = described(serving_error(error, Unavailable) if isinstance(error, RedisError) else error)
        if text:
            outage.failed(text)
        else:
            outage.works()
        return text

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                self.look()
            except Exception:  # noqa: BLE001 - a defect here must not leave the health of the worker as it was for ever
                _log.exception("the health of this worker cannot be told; trying again")


def parts_of(
    store: ProfileStore,
    log: EventLog,
    changes: CatalogLog,
    follower: CatalogSync,
    progress: CatalogProgress,
    unsafe: bool,
) -> list[Part]:
    """Returns what every worker needs: both Redis, and a catalogue that is not behind."""
    profiles = partial(redis_trouble, store.client, "profiles", unsafe, store.check_safety)
    events = partial(redis_trouble, log.client, "events", unsafe, log.check_safety)
    return [
        Part("profiles_redis", profiles, (PROFILES,)),
        Part("events_redis", events, (EVENTS, PROFILES, CATALOG)),
        Part("catalog", Catalogue(changes, follower, progress)),
    ]


def redis_trouble(
    client: Client, role: Literal["events", "profiles"], unsafe: bool, look: Callable[[], None] = lambda: None
) -> str:
    """Returns why a Redis can hold nothing new, empty where it can.

    Args:
        client: The Redis.
        role: What it is for.
        unsafe: Accept one that may lose acknowledged data.
        look: Looks at the settings for those who use it, and keeps what it sees: `check_safety` of the log or store.

    Raises:
        Unavailable: It does not answer, or its settings are unsafe.
        ConfigError: Its settings are unsafe, or it is too old.
        RedisError: It does not answer, or refuses.
    """
    look()
    require_safe(client, role, unsafe)
    return write_trouble(client)


class Catalogue:
    """Says whether a worker's catalogue is behind the log; called, returns why, empty where it is not."""

    def __init__(self, changes: CatalogLog, follower: CatalogSync, progress: CatalogProgress) -> None:
        self._changes, self._follower, self._progress = changes, follower, progress
        self._caught_up = time.monotonic()

    def __call__(self) -> str:
        """Looks.

        Raises:
            CatalogLogUnavailable: The log does not answer.
        """
        newest = self._changes.version()
        if self._follower.trouble:
            return self._follower.trouble
        behind = newest - self._progress.version
        now = time.monotonic()
        if behind <= 0:
            self._caught_up = now
        if now - self._caught_up > BEHIND_S:
            return f"{behind:,} versions behind for {now - self._caught_up:.0f} s"
        return ""
