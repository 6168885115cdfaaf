"""Requests to restore the profiles of evicted users who have returned, for the projector."""

from __future__ import annotations

from collections.abc import Mapping

from features.errors import PenchantError
from features.subjects import partition_of
from serving.log_retention import HOUR_MS
from serving.redis.connection import Argument, ScriptCall
from serving.redis.router import required
from serving.stores.event_log import EventLog
from serving.stores.scripts import USER_RETURN

_MOST_TAKEN = 1000
"""Requests of a partition that are taken at a time."""


class RestoreRequests:
    """The open requests, in the log; any thread may call anything."""

    def __init__(self, log: EventLog) -> None:
        """Takes the log."""
        self._log = log

    def add(self, seen_at: Mapping[str, int]) -> None:
        """Asks the projector for the profiles of users; a repeat changes nothing.

        A request that no projector takes within an hour is dropped: the next answer to its user asks again.

        Args:
            seen_at: Subject -> when the user was seen, ms. Users who were erased since are not asked for.

        Raises:
            EventLogUnavailable: Redis does not answer; a repeat is safe.
            ResourceExhausted: The log is full.
        """
        arguments: dict[int, list[Argument]] = {}
        for subject, at in seen_at.items():
            partition = partition_of(subject, self._log.partitions)
            arguments.setdefault(partition, []).extend((subject, self._log.subject_hash(subject), at))
        calls = [
            ScriptCall(
                USER_RETURN, (self._log.keys[partition].returned, self._log.keys[partition].erased), (HOUR_MS, *words)
            )
            for partition, words in arguments.items()
        ]
        required(self._log.router.run_all(calls))

    def take(self) -> list[str]:
        """Takes requests from every server that answers, some of them if there are many.

        Raises:
            EventLogUnavailable: No server answers.
        """
        # SPOP: if the projector dies with them, the next answer to their users asks again.
        replies = self._log.router.run_all([("SPOP", keys.returned, _MOST_TAKEN) for keys in self._log.keys])
        return [name.decode() for reply in replies if not isinstance(reply, PenchantError) for name in reply]
