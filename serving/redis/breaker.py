"""A circuit breaker: keeps callers away from a server that has just failed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError, ResponseError

from serving.errors import Unavailable
from serving.redis.errors import serving_error


class CircuitBreaker:
    """A context in which Redis is called: it names errors, and keeps callers away from a server that just failed.

    After a failure one caller at a time tries whether the server is back and the others are refused at once. The pause
    between two tries doubles from an eighth of `cooldown_s` up to it: a single late reply keeps users from their
    profiles for a moment only, and a dead or frozen server soon costs no more than one timeout in `cooldown_s`.
    """

    def __init__(
        self, unavailable: type[Unavailable], cooldown_s: float = 0.5, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Makes a closed breaker.

        Args:
            unavailable: The class of error that means "this Redis does not answer".
            cooldown_s: Longest pause between tries of a failed server.
            clock: Tells the time, in seconds.
        """
        self._unavailable = unavailable
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._lock = threading.Lock()
        self._open_until, self._cause = 0.0, ""
        self._pause_s = self._first_s = cooldown_s / 8

    def __enter__(self) -> None:
        # Read without the lock, which every request would else wait for: a stale value costs one try too many.
        if not self._open_until:
            return
        with self._lock:
            now = self._clock()
            if now < self._open_until:
                wait_ms = int(1000 * (self._open_until - now)) + 1
                message = f"Redis failed a moment ago and is not asked again yet: {self._cause}"
                raise self._unavailable(message, retry_after_ms=wait_ms)
            # This caller is the one that tries. Were it to die, the next one may after the longest pause.
            self._open_until = now + self._cooldown_s
            self._pause_s = min(2 * self._pause_s, self._cooldown_s)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # A refusal closes the breaker as well: a server that refuses answers.
        if error is None or not isinstance(error, RedisError) or isinstance(error, ResponseError):
            self._open_until, self._pause_s = 0.0, self._first_s
        else:
            self._cause = str(serving_error(error, self._unavailable))
            self._open_until = self._clock() + self._pause_s
        if isinstance(error, RedisError):
            raise serving_error(error, self._unavailable) from error
