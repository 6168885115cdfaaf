"""Admission to the event log: new entries go to the servers that have memory for them, some entries in a step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

from features.errors import PenchantError
from features.subjects import partition_of
from serving.errors import ResourceExhausted, Unavailable
from serving.redis.connection import Request, ScriptCall
from serving.redis.router import RedisRouter, required
from serving.stores.log_entries import LoggedEvent, LoggedImpression

_MEMORY_CHECK_S = 1.0
"""Age of the last reading of the memory at which an append brings a new one with it."""

_MEMORY_KNOWN_S = 5.0
"""Age at which a reading no longer counts; a caller that sends so seldom can wait for a new one."""

_TOGETHER = 64
"""Entries of a partition that are appended in one step: other clients wait behind it, and each is a write to disk."""

_New = TypeVar("_New", LoggedEvent, LoggedImpression)


class Admission:
    """Sends new entries to the partitions of a log, as long as their servers have memory."""

    def __init__(self, router: RedisRouter, streams: Sequence[bytes]) -> None:
        """Takes the servers, and a key of each partition."""
        self._router, self._streams = router, streams
        self._memory = [_Memory(0.0, -_MEMORY_KNOWN_S)] * len(streams)

    def send(
        self, entries: Sequence[_New], call: Callable[[int, Sequence[_New]], ScriptCall], mark: float
    ) -> list[Any]:
        """Sends entries to the servers that have memory for them; returns each reply, or the error in its place.

        Raises:
            EventLogUnavailable: None of them answers.
            ResourceExhausted: None of them has memory.
        """
        replies: list[Any] = [None] * len(entries)
        places: dict[int, list[int]] = {}
        for place, entry in enumerate(entries):
            places.setdefault(partition_of(entry.subject, len(self._streams)), []).append(place)
        # A caller that has not sent for long, or was refused, reads the memory before it sends.
        self._measure([partition for partition in places if self._memory[partition].unknown(mark)])
        for partition in [partition for partition in places if self._memory[partition].share > mark]:
            refused = _full(self._memory[partition].share, mark)
            for place in places.pop(partition):
                replies[place] = refused
        if entries and not places:
            raise replies[0]
        pieces = [
            (partition, indices[start : start + _TOGETHER])
            for partition, indices in places.items()
            for start in range(0, len(indices), _TOGETHER)
        ]
        # The memory is read in the same round trip: no append waits for it alone.
        stale = [partition for partition in places if self._memory[partition].age > _MEMORY_CHECK_S]
        calls = [call(partition, [entries[place] for place in indices]) for partition, indices in pieces]
        for (_, indices), answer in zip(pieces, self._measure(stale, calls), strict=True):
            answers = [answer] * len(indices) if isinstance(answer, PenchantError) else answer
            for place, reply in zip(indices, answers, strict=True):
                replies[place] = reply
        return replies

    def _measure(self, partitions: Collection[int], calls: Sequence[ScriptCall] = ()) -> list[Any]:
        """Reads how much memory some servers use; returns the replies to calls in the same round trip.

        Raises:
            EventLogUnavailable: None of them answers.
        """
        requests: list[Request] = [*calls, *[(b"INFO", b"memory")] * len(partitions)]
        keys = [call.keys[0] for call in calls] + [self._streams[partition] for partition in partitions]
        replies = self._router.run_all(requests, keys)
        for partition, reply in zip(partitions, replies[len(calls) :], strict=True):
            # An unreachable server is not refused for its memory: the append itself says that it is unreachable.
            share = 0.0 if isinstance(reply, Unavailable) else _memory_used(required([reply])[0])
            self._memory[partition] = _Memory(share, time.monotonic())
        return replies[: len(calls)]


class _Memory(NamedTuple):
    """The share of its memory that a server used, and the time of that reading, s."""

    share: float
    at: float

    @property
    def age(self) -> float:
        """Seconds since the reading."""
        return time.monotonic() - self.at

    def unknown(self, mark: float) -> bool:
        """Returns True if the reading is too old to go by; of a full server it is sooner."""
        return self.age > (_MEMORY_CHECK_S / 4 if self.share > mark else _MEMORY_KNOWN_S)


def _memory_used(reply: bytes) -> float:
    """Returns the share of its memory that a server uses, from the reply of INFO; 0 without a limit."""
    numbers = dict(re.findall(rb"^(used_memory|maxmemory):(\d+)", reply, re.MULTILINE))
    used, most = int(numbers[b"used_memory"]), int(numbers[b"maxmemory"])
    return used / most if most else 0.0


def _full(share: float, mark: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"the event log uses {share:.0%} of its memory and takes no more above {mark:.0%}; "
        "look whether its consumers run, or raise maxmemory",
        retry_after_ms=1000,
    )
