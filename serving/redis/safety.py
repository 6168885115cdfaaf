"""Refuses a Redis that could lose what it acknowledges, at the start and with every write that is acknowledged.

Settings change under a running service: by CONFIG SET, by a restart with another file, by a failover to a server that
was set up differently. So a write whose acknowledgement is a promise is followed, on its connection and in its round
trip, by WAITAOF, which says that it is on the disk of this very server, and by CONFIG GET. On a connection that is new,
and after a server was found unsafe, CONFIG GET comes first, so that nothing is written there at all.

Profiles may lose their last seconds, which the log still has, and nothing older: a Redis that evicts would forget
consent and blocks with them. Its settings are asked for on each new connection and once a second, and while they are
unsafe nothing is read from it or written to it.

Neither costs a round trip. What is left: a CONFIG SET that the server meets in the same pass of its event loop as the
write (well under a millisecond) is seen by the next write. Redis before 7.2 has no WAITAOF; there the settings alone
are looked at, so an operator who sets `appendonly yes` must wait for the first rewrite after it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import redis
from redis.exceptions import RedisError, ResponseError

from serving.errors import ConfigError, Unavailable
from serving.redis.cluster import Cluster

_OLDEST = (7, 0)
_WAIT_MS = 100
"""Longest wait for the disk; under `appendfsync always` there is nothing to wait for."""
_PAUSE_S = 0.2
"""Time for which a server that was found unsafe is not asked again."""
_RETRY_MS = 1000


def wanted_settings(role: str, clustered: bool) -> dict[str, str]:
    """Returns the settings of a Redis: one for "events" must keep what it acknowledges, one for "profiles" not evict.

    Args:
        role: "events" or "profiles".
        clustered: True for a node of a cluster.
    """
    wanted = {"maxmemory-policy": "noeviction"}
    if clustered:  # else one unreachable node takes all the others with it
        wanted["cluster-require-full-coverage"] = "no"
    if role == "events":
        wanted |= {"appendonly": "yes", "appendfsync": "always", "stream-node-max-entries": "1"}
    return wanted


def wrong_settings(wanted: Mapping[str, str], settings: Mapping[Any, Any], role: str) -> str:
    """Returns which settings are wrong and what they must be; empty if none is."""
    wrong = {name: value for name, value in wanted.items() if str(settings.get(name)) != value}
    if not wrong:
        return ""
    return (
        f"the {role} Redis may lose data, keep erased data, or become unreachable as a whole because of one node: "
        f"it has {_listed({name: str(settings.get(name, '')) for name in wrong})}; set {_listed(wrong)} (CONFIG SET)"
    )


class Guard:
    """Lets no write to one server count that this server could lose; any thread may call anything.

    Attributes:
        settings_command: The command that asks for the settings.
        proofs: The commands that follow a write; none if writes may be lost until they are repeated.
        strict: True if an unsafe server is not read from either.
        trouble: The reason for which nothing counts now, empty if all was well at the last look.
    """

    def __init__(self, role: str, clustered: bool, unavailable: type[Unavailable], timeout_s: float) -> None:
        """Takes what `wanted_settings` takes, the class of the errors, and the longest wait for a reply."""
        self._role, self._unavailable = role, unavailable
        self._wanted = wanted_settings(role, clustered)
        self.settings_command: Final[tuple[str, ...]] = ("CONFIG GET", *self._wanted)
        wait_ms = max(1, min(_WAIT_MS, int(500 * timeout_s)))
        self.strict: Final = role == "profiles"
        self.proofs: Final[tuple[tuple[str | int, ...], ...]] = (
            () if self.strict else (("WAITAOF", 1, 0, wait_ms), self.settings_command)
        )
        self.trouble = ""
        self._looked_at = float("-inf")

    def pause(self) -> None:
        """Refuses at once if the server was found unsafe a moment ago.

        Raises:
            Unavailable: It was; of the class given.
        """
        if self.trouble and time.monotonic() - self._looked_at < _PAUSE_S:
            raise self._refusal(self.trouble)

    def require(self) -> None:
        """Refuses if the server was unsafe at the last look.

        Raises:
            Unavailable: It was; of the class given.
        """
        if self.trouble:
            raise self._refusal(self.trouble)

    def admit(self, settings: Any) -> None:
        """Judges the reply to `settings_command`.

        Raises:
            Unavailable: A setting is unsafe, or cannot be read; of the class given.
        """
        if isinstance(settings, ResponseError):
            trouble = (
                f"the configuration of the {self._role} Redis cannot be checked ({settings}); allow its user CONFIG GET"
            )
        else:
            trouble = wrong_settings(self._wanted, settings, self._role)
        self._looked_at, self.trouble = time.monotonic(), trouble
        if trouble:
            raise self._refusal(trouble)

    def judge(self, proofs: Sequence[Any]) -> None:
        """Judges the replies to `proofs`.

        Raises:
            Unavailable: The writes before them do not count; of the class given.
        """
        if not proofs:
            return
        synced, settings = proofs
        self.admit(settings)
        # An error: a server without WAITAOF, or a user who may not say it.
        if not isinstance(synced, ResponseError) and not synced[0]:
            self.trouble = (
                f"the {self._role} Redis has not written this to its disk yet; wait until the rewrite that "
                "`appendonly yes` begins is done, or look at its disk"
            )
            raise self._refusal(self.trouble)

    def _refusal(self, trouble: str) -> Unavailable:
        effect = "no profile is read or written" if self.strict else "nothing is acknowledged"
        return self._unavailable(f"{effect}: {trouble}", retry_after_ms=_RETRY_MS)


def require_safe(client: redis.Redis | Cluster, role: str, unsafe: bool = False) -> None:
    """Refuses a Redis that would lose data by its configuration; of a cluster every node is looked at.

    Args:
        client: The Redis to look at.
        role: "events" needs no eviction, `appendfsync always`, and streams that give up at once what is deleted from
            them; "profiles" needs no eviction.
        unsafe: True to accept one that may lose acknowledged data.

    Raises:
        ConfigError: A setting is unsafe or cannot be read; the message names it and what it must be.
        RedisError: A server is unreachable; the others are safe.
    """
    failure: RedisError | None = None
    clustered = isinstance(client, Cluster)
    for node in client.nodes(replicas=True) if isinstance(client, Cluster) else [client]:
        try:
            _require_safe(node, role, unsafe, clustered)
        except RedisError as error:
            failure = error
    if failure:
        raise failure


def _require_safe(client: redis.Redis, role: str, unsafe: bool, clustered: bool) -> None:
    about = client.info("server")
    version = str(about["redis_version"])
    if not clustered and "cluster" in (about.get("redis_mode"), about.get("server_mode")):
        raise ConfigError("this Redis is a node of a cluster: begin its URL with redis+cluster:// or rediss+cluster://")
    if tuple(map(int, version.split(".")[:2])) < _OLDEST:
        raise ConfigError(f"this Redis is {version}; Penchant needs Redis 7.0 or Valkey 7.2, or newer")
    if unsafe:
        return
    wanted = wanted_settings(role, clustered)
    try:
        settings = client.config_get(*wanted)
    except ResponseError as error:
        raise ConfigError(
            f"the configuration of the {role} Redis cannot be checked ({error}); allow its user CONFIG GET, "
            f"or set {_listed(wanted)} yourself and set PENCHANT_UNSAFE_REDIS=true"
        ) from None
    if wrong := wrong_settings(wanted, settings, role):
        raise ConfigError(f"{wrong}, or accept that: PENCHANT_UNSAFE_REDIS=true")


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in values.items())
