"""The errors of the service; each class carries its gRPC status.

ServingError
├── InvalidArgument          a field is wrong: the caller must change the request
├── NotFound                 the thing named does not exist
├── FailedPrecondition       the server is not set up for this request
├── ConsentWithheld          the user does not allow it
├── Unauthenticated          no token, or a wrong one
├── Unimplemented            the call does not fit its method
├── ResourceExhausted        too much, now: retry later
│   ├── Overloaded
│   └── BatchDeferred
├── DataLoss                 stored data is damaged: to be repaired first
├── DeadlineExceeded         the time given was not enough
├── Unavailable              a part is unreachable: safe to retry
│   ├── ProfileStoreUnavailable
│   ├── EventLogUnavailable
│   └── CatalogLogUnavailable
└── ConfigError              the service cannot work as configured
"""

from __future__ import annotations

from typing import ClassVar

from features.errors import PenchantError


class ServingError(PenchantError):
    """Root of the service's errors.

    Attributes:
        code: Name of the gRPC status.
        field: Path of the wrong field, "" if it is not a single one.
        retry_after_ms: Time until a retry makes sense, 0 if it does not.
    """

    code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_ms = retry_after_ms


class InvalidArgument(ServingError):
    """A field of the request is wrong; the message tells the allowed values."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)


class NotFound(ServingError):
    """The thing named does not exist."""

    code = "NOT_FOUND"


class DataLoss(ServingError):
    """Stored data is damaged; the message tells how to repair it."""

    code = "DATA_LOSS"


class FailedPrecondition(ServingError):
    """The server is not set up for this request."""

    code = "FAILED_PRECONDITION"


class ConsentWithheld(ServingError):
    """The user does not allow it; nothing was kept."""

    code = "PERMISSION_DENIED"


class Unauthenticated(ServingError):
    """The call carries no token, or a wrong one."""

    code = "UNAUTHENTICATED"


class Unimplemented(ServingError):
    """The call does not fit its method."""

    code = "UNIMPLEMENTED"


class ResourceExhausted(ServingError):
    """Too much for now; `retry_after_ms` is the time until a retry makes sense."""

    code = "RESOURCE_EXHAUSTED"


class Overloaded(ResourceExhausted):
    """The ranking could not be answered in time."""


class BatchDeferred(ResourceExhausted):
    """The ranking is part of a batch, and interactive ones need the time."""


class DeadlineExceeded(ServingError):
    """The caller's deadline has passed."""

    code = "DEADLINE_EXCEEDED"


class Unavailable(ServingError):
    """A part is unreachable; nothing was done, so a retry is safe."""

    code = "UNAVAILABLE"


class ProfileStoreUnavailable(Unavailable):
    """The Redis of the profiles does not answer."""


class EventLogUnavailable(Unavailable):
    """The Redis of the events does not answer; the event is not durable."""


class CatalogLogUnavailable(Unavailable):
    """The Redis of the catalogue log does not answer; the change is not durable."""


class ConfigError(ServingError):
    """The service cannot work as configured; the message says what to change."""

    code = "FAILED_PRECONDITION"


class InUse(ConfigError):
    """Another process holds a file or folder that this one needs."""
