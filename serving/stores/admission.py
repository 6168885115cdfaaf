"""Admission to the event log: what is new goes to the servers that have memory for it, some entries in a step."""

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
"""Time after which an append brings news of the memory with it."""

_MEMORY_KNOWN_S = 5.0
"""Time for which such news counts; who sends so seldom can wait for newer ones."""

_TOGETHER = 64
"""Entries of a partition that are appended in one step: others wait behind a step, and each is a write to disk."""

_New = TypeVar("_New", LoggedEvent, LoggedImpression)


class Admission:
    """Sends what is new to the partitions of a log, as long as their servers have memory."""

    def __init__(self, nodes: RedisRouter, streams: Sequence[bytes]) -> None:
        """Takes the servers, and a key of each partition."""
        self._nodes, self._streams = nodes, streams
        self._memory = [_Memory(0.0, -_MEMORY_KNOWN_S)] * len(streams)

    def send(self, new: Sequence[_New], call: Callable[[int, Sequence[_New]], ScriptCall], mark: float) -> list[Any]:
        """Sends what is new to the servers that have memory for it; what came of each, or the error that kept it away.

        Raises:
            EventLogUnavailable: None of them answers.
            ResourceExhausted: None of them has memory.
        """
        replies: list[Any] = [None] * len(new)
        places: dict[int, list[int]] = {}
        for place, one in enumerate(new):
            places.setdefault(partition_of(one.subject, len(self._streams)), []).append(place)
        self._look([partition for partition in places if self._memory[partition].unknown(mark)])
        for partition in [partition for partition in places if self._memory[partition].share > mark]:
            refused = _full(self._memory[partition].share, mark)
            for place in places.pop(partition):
                replies[place] = refused
        if new and not places:
            raise replies[0]
        pieces = [
            (partition, own[start : start + _TOGETHER])
            for partition, own in places.items()
            for start in range(0, len(own), _TOGETHER)
        ]
        # News of the memory come with what is sent: nothing waits for them.
        stale = [partition for partition in places if self._memory[partition].age > _MEMORY_CHECK_S]
        found = self._look(stale, [call(partition, [new[place] for place in own]) for partition, own in pieces])
        for (_, own), answer in zip(pieces, found, strict=True):
            answers = [answer] * len(own) if isinstance(answer, PenchantError) else answer
            for place, reply in zip(own, answers, strict=True):
                replies[place] = reply
        return replies

    def _look(self, partitions: Collection[int], beside: Sequence[ScriptCall] = ()) -> list[Any]:
        """Learns how much memory the servers of some partitions use; returns the replies to what is asked beside that.

        Raises:
            EventLogUnavailable: None of them answers.
        """
        asked: list[Request] = [*beside, *[(b"INFO", b"memory")] * len(partitions)]
        keys = [call.keys[0] for call in beside] + [self._streams[partition] for partition in partitions]
        replies = self._nodes.run_all(asked, keys)
        for partition, reply in zip(partitions, replies[len(beside) :], strict=True):
            share = 0.0 if isinstance(reply, Unavailable) else _memory_used(required([reply])[0])
            self._memory[partition] = _Memory(share, time.monotonic())
        return replies[: len(beside)]


class _Memory(NamedTuple):
    """The share of its memory that a server used, and when that was found out."""

    share: float
    at: float

    @property
    def age(self) -> float:
        """Seconds since it was found out."""
        return time.monotonic() - self.at

    def unknown(self, mark: float) -> bool:
        """Whether this is too old to go by; what is refused for it is refused for what is so now."""
        return self.age > (_MEMORY_CHECK_S / 4 if self.share > mark else _MEMORY_KNOWN_S)


def _memory_used(said: bytes) -> float:
    """The share of its memory that a server uses, by what INFO says; 0 where it may use any."""
    numbers = dict(re.findall(rb"^(used_memory|maxmemory):(\d+)", said, re.MULTILINE))
    used, most = int(numbers[b"used_memory"]), int(numbers[b"maxmemory"])
    return used / most if most else 0.0


def _full(share: float, mark: float) -> ResourceExhausted:
    return ResourceExhausted(
        f"the event log uses {share:.0%} of its memory and takes no more above {mark:.0%}; "
        "look whether its consumers run, or raise maxmemory",
        retry_after_ms=1000,
    )
