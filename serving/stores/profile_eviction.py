"""Eviction: inactive profiles leave the memory of Redis, and are restored when their users return."""

from __future__ import annotations

from collections.abc import Sequence

import redis

from features.profile_codec import HEADER_SIZE, is_newer
from serving.redis.connection import Request
from serving.stores.profile_access import CHUNK, ProfileAccess, chunks
from serving.stores.profile_header import FRONT, folded_until, is_evicted, last_seen, may_be_restored
from serving.stores.scripts import PROFILE_EVICT

_NEVER = 1 << 52  # later than anything, ms
_ALL_PROFILES = b"penchant:{p*}:profile:*"


class Evictions:
    """Evicts profiles of one store; any thread may call anything."""

    def __init__(self, store: ProfileAccess) -> None:
        """Takes the store."""
        self._store = store

    def evict(self, before_ms: int) -> int:
        """Evicts the profiles whose newest event is from before a time; consent and controls stay.

        A user who allows personal answers alone is in no warehouse to be restored from, so their profile stays.

        Args:
            before_ms: The time, ms: of arrival for events that came live, of the event itself for imported ones.

        Returns:
            The number of profiles evicted; those of an unreachable Redis wait for the next time.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        evicted: list[int] = []

        # By server and not by partition: SCAN goes through all keys of a server, whatever the pattern.
        def sweep(server: redis.Redis) -> None:
            for keys in chunks(server.scan_iter(_ALL_PROFILES, count=1000), CHUNK):
                evicted.append(self._evict_keys(keys, before_ms))

        self._store.at_each_server(sweep)
        return sum(evicted)

    def evict_again(self, subject: str) -> bool:
        """Evicts also what came since the eviction of a profile, to be restored with it; returns True if it did.

        Raises:
            ProfileStoreUnavailable: Redis does not answer; a repeat is safe.
        """
        [header] = self._store.headers([subject])
        if not is_evicted(header):
            return False
        return bool(self._store.run(PROFILE_EVICT, self._store.key_of(subject), header, _NEVER))

    def evicted(self, subjects: Sequence[str]) -> dict[str, int]:
        """Returns the users whose profile is evicted, with the log id up to which its state went.

        Raises:
            ProfileStoreUnavailable: Redis does not answer.
        """
        headers = zip(subjects, self._store.headers(subjects), strict=True)
        return {subject: folded_until(header) for subject, header in headers if is_evicted(header)}

    def _evict_keys(self, keys: Sequence[bytes], before_ms: int) -> int:
        # The front is enough to tell most active users apart; the script looks at the whole profile again.
        requests: list[Request] = [("GETRANGE", key, 0, FRONT - 1) for key in keys]
        calls = [
            self._store.call(PROFILE_EVICT, key, front[:HEADER_SIZE], before_ms)
            for key, front in zip(keys, self._store.router.run_all(requests), strict=True)
            if isinstance(front, bytes) and len(front) == FRONT and not is_newer(front)
            if last_seen(front) < before_ms and may_be_restored(front)
        ]
        return sum(reply == 1 for reply in self._store.router.run_all(calls)) if calls else 0
