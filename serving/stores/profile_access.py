"""Access to stored profiles: their keys, their bytes, and the scripts that change them."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, TypeVar

import redis
from redis.exceptions import ResponseError

from features.controls import CONTROL, MAX_ATTRIBUTES, MAX_CONTROLS
from features.decayed_counts import MAX_STATE_SIZE
from features.errors import PenchantError, ProfileCorrupt
from features.profile import OLDER_ITEMS_CAP, RING, empty
from features.profile_codec import HEADER_SIZE, REPAIR, encode, is_newer
from features.records import ENTRY, EVENT
from features.subjects import PARTITIONS, partition_of
from serving.errors import ProfileStoreUnavailable, ResourceExhausted, Unavailable
from serving.observability.telemetry import Telemetry
from serving.redis.client import Client
from serving.redis.connection import Request, Script, ScriptCall
from serving.redis.errors import serving_error
from serving.redis.router import RedisRouter, required
from serving.stores.keys import META, address_of, partition_prefix
from serving.stores.meta import fixed_value, require_partitions

TAIL_CAP = 4096
"""Entries a tail may hold before it has been folded, which only a bot reaches."""

PATIENT_ATTEMPTS = 30
"""Attempts to replace a profile that others keep changing."""

CHUNK = 256
"""Profiles that are read or written in one round trip."""

NEWER = "a later version of Penchant wrote this profile, and this one leaves it alone; upgrade this process too"
NEWER_PAUSE_MS = 1000

T = TypeVar("T")
_EMPTY = encode(empty())
# An attribute takes up to two.
_MOST_CONTROLS = MAX_CONTROLS + 2 * MAX_ATTRIBUTES
_LARGEST_STATE = RING * EVENT.itemsize + OLDER_ITEMS_CAP * 8 + MAX_STATE_SIZE + _MOST_CONTROLS * CONTROL.itemsize + 64
_LARGEST_PROFILE = HEADER_SIZE + _LARGEST_STATE + 2 * TAIL_CAP * ENTRY.itemsize


class TailFull(ResourceExhausted):
    """A user produces events faster than they are folded; slow that user down."""


class ProfileAccess:
    """The stored profiles of all users, in one Redis or cluster; any thread may call anything."""

    def __init__(
        self,
        client: Client,
        partitions: int = PARTITIONS,
        *,
        cooldown_s: float = 0.5,
        telemetry: Telemetry | None = None,
        guarded: bool = False,
        shared_with: ProfileAccess | None = None,
    ) -> None:
        """Takes a client of `redis.client.connect`; its timeout is the most that a dead Redis costs a request.

        Args:
            client: The profiles Redis.
            partitions: Partitions of the event log.
            cooldown_s: Longest pause between tries of a failed Redis; personal answers are back that long after it is.
            telemetry: Counts `profiles_corrupt`.
            guarded: True to read and write nothing while a server could evict keys; call `check_safety` regularly.
            shared_with: The same store through other connections; one `check_safety` is enough for both.
        """
        role: Literal["", "profiles"] = "profiles" if guarded else ""
        shared_router: RedisRouter | None = shared_with.router if shared_with else None
        self.client, self.partitions = client, partitions
        self.router: RedisRouter = RedisRouter(
            client, ProfileStoreUnavailable, cooldown_s, self._refusal, guarded=role, shared_with=shared_router
        )
        self._id = ""
        self._telemetry = telemetry or Telemetry()
        self._prefixes = [partition_prefix(partition) + b"profile:" for partition in range(partitions)]

    def open(self) -> None:
        """Checks that the profiles there are spread over as many partitions, and fixes their number in a new Redis.

        Raises:
            ConfigError: They are not.
            ProfileStoreUnavailable: Redis does not answer.
        """
        require_partitions(self.router, self.partitions)

    def check_safety(self) -> None:
        """Checks the settings of every server, if the store is guarded.

        Raises:
            ProfileStoreUnavailable: A server does not answer, or is unsafe.
        """
        self.router.check_safety([META, *self._prefixes])

    def store_id(self) -> str:
        """Returns the id of this store among the copies of the log; made when it is first asked for.

        A store that loses its data while it is in use keeps its id.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        self._id = fixed_value(self.router, "profiles_id", self._id or uuid.uuid4().hex).decode()
        return self._id

    def run_ids(self) -> list[str]:
        """Returns per partition an id that changes when its Redis restarts, and so may have lost its last two seconds.

        Empty if the server is unreachable.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        run_ids = self.at_each_server(lambda server: str(server.info("server")["run_id"]))
        # Profiles are synced once a second: after a restart the projector applies the last seconds again.
        return ["" if isinstance(run_id, Unavailable) else run_id for run_id in run_ids]

    def at_each_server(self, work: Callable[[redis.Redis], T]) -> list[T | Unavailable]:
        """Calls a function once with every server; returns the results by partition.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        return self.router.at_each(self._prefixes, work)

    def headers(self, subjects: Sequence[str]) -> Sequence[bytes]:
        """Returns the header of each user's profile, empty if there is none or the key holds something else.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        requests: list[Request] = [("GETRANGE", self.key_of(subject), 0, HEADER_SIZE - 1) for subject in subjects]
        replies = self.router.run_all(requests)
        return required([b"" if isinstance(reply, ProfileCorrupt) else reply for reply in replies])

    def blobs(self, subjects: Sequence[str]) -> list[Any]:
        """Returns the bytes of each user's profile, or the error in its place.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        return self.router.run_all([("GETRANGE", self.key_of(subject), 0, _LARGEST_PROFILE) for subject in subjects])

    def blob(self, subject: str) -> bytes:
        """Returns the bytes of a user's profile, empty if there is none.

        Raises:
            ProfileStoreUnavailable: Redis does not answer, or a later version wrote the profile.
            ProfileCorrupt: The stored profile is far too large.
        """
        # One byte more than the largest profile is read of a larger one: it is refused without being fetched.
        blob: bytes = self.router.command("GETRANGE", self.key_of(subject), 0, _LARGEST_PROFILE)
        if is_newer(blob):
            raise ProfileStoreUnavailable(NEWER, retry_after_ms=NEWER_PAUSE_MS)
        if len(blob) > _LARGEST_PROFILE:
            self._telemetry.count("profiles_corrupt")
            raise ProfileCorrupt(
                f"a stored profile has more than {_LARGEST_PROFILE} bytes, which none can have; {REPAIR}"
            )
        return blob

    def key_of(self, subject: str) -> bytes:
        """Returns the key of a user's profile; it names no one."""
        return self._prefixes[partition_of(subject, self.partitions)] + address_of(subject)

    def call(self, script: Script, key: bytes, *arguments: bytes | int) -> ScriptCall:
        """Returns the call of a script about one profile."""
        return ScriptCall(script, (key,), (_EMPTY, *arguments))

    def run(self, script: Script, key: bytes, *arguments: bytes | int) -> Any:
        """Runs a script about one profile.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        return self.router.run(self.call(script, key, *arguments))

    def _refusal(self, error: ResponseError) -> PenchantError:
        """Returns the error that an error reply about one profile stands for."""
        # Scripts raise these words; redis-py puts others before them.
        message = str(error)
        if "NEWER" in message:
            return ProfileStoreUnavailable(NEWER, retry_after_ms=NEWER_PAUSE_MS)
        if "CORRUPT" in message or "WRONGTYPE" in message:
            self._telemetry.count("profiles_corrupt")
            return ProfileCorrupt(f"the stored profile is damaged ({message}); {REPAIR}")
        if "TAILFULL" in message:
            reason = "this user sends events faster than they are folded; slow down"
            return TailFull(reason, field="subject", retry_after_ms=1000)
        return serving_error(error, ProfileStoreUnavailable)


def chunks(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields values in lists of at most `size`."""
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk
