"""The health of a worker: checks its dependencies once a second, and sets the gRPC health of its services by them.

A service that cannot work is NOT_SERVING while the others serve on: without a safe events Redis no event can be
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
"""Time that a worker has to apply a change of the catalogue before it counts as behind."""

_PERIOD_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """A check of something that a worker needs.

    Attributes:
        name: Name of the part in /readyz.
        run: Returns what is wrong with the part, else ""; may raise PenchantError or RedisError instead.
        needed_by: Full names of the services that cannot work without the part.
    """

    name: str
    run: Callable[[], str]
    needed_by: Sequence[str] = ()


class HealthMonitor:
    """Runs the health checks of a worker until it is closed."""

    def __init__(
        self,
        checks: Sequence[HealthCheck],
        set_serving: Callable[[str, bool], None],
        report_state: Callable[[dict[str, Any]], None] = lambda _: None,
        *,
        strict: bool = False,
    ) -> None:
        """Prepares a monitor: `check` runs the checks once, `start` from then on in the background.

        Args:
            checks: Checks of all that the worker needs.
            set_serving: Sets the health of a service, by its full name.
            report_state: Takes the state of the worker: `{"trouble": {part: text}}`.
            strict: Let the worker as a whole serve only while no check fails.
        """
        self._checks, self._set_serving, self._strict = checks, set_serving, strict
        trouble = Trouble(report_state)
        self._reports = {check.name: trouble.reporter(check.name) for check in checks}
        self._serving = dict.fromkeys((OVERALL, RANKING, EVENTS, PROFILES, CATALOG), True)
        self._outages = {check.name: Outage(_log, f"degraded: {check.name}") for check in checks}
        self._setting, self._muted = threading.Lock(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        """Runs the checks in the background from now on."""
        self._thread.start()

    def mute(self) -> None:
        """Freezes the health of the services, but goes on checking: calls in progress still need safe stores."""
        with self._setting:
            self._muted = True

    def close(self) -> None:
        """Stops checking."""
        self.mute()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * _PERIOD_S)  # no longer: a Redis that hangs must not keep the worker from ending

    def check(self) -> Mapping[str, str]:
        """Runs every check once and sets the health that changed; returns what is wrong, by part."""
        trouble = {check.name: text for check in self._checks if (text := self._run_check(check))}
        unhealthy = {service for check in self._checks if check.name in trouble for service in check.needed_by}
        if self._strict and trouble:
            unhealthy |= {OVERALL, RANKING}
        # Under the lock, so that no state is set after `mute` has returned.
        with self._setting:
            for service, was_serving in self._serving.items():
                if was_serving is (service in unhealthy) and not self._muted:
                    self._serving[service] = not was_serving
                    self._set_serving(service, not was_serving)
        for check in self._checks:
            self._reports[check.name](trouble.get(check.name, ""))
        return trouble

    def _run_check(self, check: HealthCheck) -> str:
        outage = self._outages[check.name]
        try:
            text = check.run()
        except Unavailable as error:  # each call to Redis logs it
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
                self.check()
            except Exception:  # noqa: BLE001 - a defect here must not freeze the health of the worker for ever
                _log.exception("the health checks of this worker failed; trying again")


def health_checks(
    store: ProfileStore,
    log: EventLog,
    changes: CatalogLog,
    catalog_sync: CatalogSync,
    progress: CatalogProgress,
    unsafe: bool,
) -> list[HealthCheck]:
    """Returns the checks of what every worker needs: both Redis, and a catalogue that is not behind."""
    profiles = partial(redis_trouble, store.client, "profiles", unsafe, store.check_safety)
    events = partial(redis_trouble, log.client, "events", unsafe, log.check_safety)
    return [
        HealthCheck("profiles_redis", profiles, (PROFILES,)),
        HealthCheck("events_redis", events, (EVENTS, PROFILES, CATALOG)),
        HealthCheck("catalog", CatalogLagCheck(changes, catalog_sync, progress)),
    ]


def redis_trouble(
    client: Client, role: Literal["events", "profiles"], unsafe: bool, check_safety: Callable[[], None] = lambda: None
) -> str:
    """Returns the reason why a Redis takes no new data, empty if it takes some.

    Args:
        client: The Redis.
        role: Its role.
        unsafe: Accept one that may lose acknowledged data.
        check_safety: `check_safety` of the log or store, which keeps the result for the calls that use it.

    Raises:
        Unavailable: It does not answer, or its settings are unsafe.
        ConfigError: Its settings are unsafe, or it is too old.
        RedisError: It does not answer, or refuses.
    """
    check_safety()
    require_safe(client, role, unsafe)
    return write_trouble(client)


class CatalogLagCheck:
    """Checks that a worker's catalogue is not behind the log."""

    def __init__(self, changes: CatalogLog, catalog_sync: CatalogSync, progress: CatalogProgress) -> None:
        self._changes, self._catalog_sync, self._progress = changes, catalog_sync, progress
        self._caught_up = time.monotonic()

    def __call__(self) -> str:
        """Returns the lag if it is too long, else "".

        Raises:
            CatalogLogUnavailable: The log does not answer.
        """
        newest = self._changes.version()
        # Its own trouble explains a lag better than the number of versions.
        if self._catalog_sync.trouble:
            return self._catalog_sync.trouble
        behind = newest - self._progress.version
        now = time.monotonic()
        if behind <= 0:
            self._caught_up = now
        if now - self._caught_up > BEHIND_S:
            return f"{behind:,} versions behind for {now - self._caught_up:.0f} s"
        return ""
