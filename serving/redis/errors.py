"""Error replies of Redis as exceptions, and these as errors of the service."""

from __future__ import annotations

from redis.exceptions import (
    AskError,
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from serving.errors import ResourceExhausted, ServingError, Unavailable

# The replies of a server that is about to be replaced, or whose keys are moving; MASTERDOWN is a kind of CLUSTERDOWN.
_REPLACED: dict[str, type[ResponseError]] = {
    "MOVED": MovedError,
    "ASK": AskError,
    "TRYAGAIN": TryAgainError,
    "CLUSTERDOWN": ClusterDownError,
    "MASTERDOWN": MasterDownError,
    "READONLY": ReadOnlyError,
}
_REFUSALS: dict[str, type[RedisError]] = {
    "LOADING": BusyLoadingError,
    "NOAUTH": AuthenticationError,
    "NOPERM": NoPermissionError,
    "NOSCRIPT": NoScriptError,
    "OOM": OutOfMemoryError,
    "WRONGPASS": AuthenticationError,
}


def reply_error(message: str) -> RedisError:
    """Returns the exception for an error reply."""
    code, _, text = message.partition(" ")
    if code in _REPLACED:
        return _REPLACED[code](text)
    if text == "max number of clients reached":
        return RedisConnectionError(message)
    return _REFUSALS.get(code, ResponseError)(message)


def serving_error(error: RedisError, unavailable: type[Unavailable]) -> ServingError:
    """Returns the error of the service for an error of Redis.

    Args:
        error: The exception that redis-py, or a connection, raised.
        unavailable: The class of error that means "this Redis does not answer".
    """
    if isinstance(error, OutOfMemoryError) or str(error).startswith("MISCONF"):
        return ResourceExhausted(f"Redis takes no writes: {error}; give it memory or disk space", retry_after_ms=1000)
    if isinstance(error, (AuthenticationError, AuthorizationError, NoPermissionError)):
        # Safe to retry: passwords change while services run, and become right again.
        message = f"Redis refuses these credentials: {error}; check the user and password in its URL, and its rights"
        return unavailable(message, retry_after_ms=1000)
    lacks_replicas = str(error).startswith("NOREPLICAS")
    if isinstance(error, ResponseError) and not (lacks_replicas or isinstance(error, tuple(_REPLACED.values()))):
        return ServingError(f"Redis answered: {error}")
    return unavailable(f"Redis does not answer: {error}; check that it runs and can be reached", retry_after_ms=1000)
