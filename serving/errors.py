"""Every error that a caller of the service can see; each class carries its gRPC status.

ServingError
├── InvalidArgument          a field is wrong: the caller must change the request
├── NotFound                 the thing named does not exist
├── FailedPrecondition       the server is not set up for this request
├── ConsentWithheld          the person does not allow it
├── Unauthenticated          no token, or a wrong one
├── Unimplemented            the call does not fit its method
├── ResourceExhausted        too much, now: retry later
├── DataLoss                 what is stored is damaged: to be repaired first
├── DeadlineExceeded         the time given was not enough
├── Unavailable              a part is away: safe to retry
│   ├── ProfileStoreUnavailable
│   ├── EventLogUnavailable
│   └── CatalogLogUnavailable
└── ConfigError              the server cannot start like this
"""

from __future__ import annotations

from typing import ClassVar

from features.errors import PenchantError


class ServingError(PenchantError):
    """Root of the service's errors.

    Attributes:
        code: Name of the gRPC status that the caller gets.
        field: Path of the field that is wrong, empty where no single one is.
        retry_after_ms: When a retry makes sense, 0 where it does not.
    """

    code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", retry_after_ms: int = 0) -> None:
        super().__init__(message)
        self.field = field
        self.retry_after_ms = retry_after_ms


class InvalidArgument(ServingError):
    """A field of the request is wrong; the message says what would be right."""

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", field=field)


class NotFound(ServingError):
    """The thing named does not exist."""

    code = "NOT_FOUND"


class DataLoss(ServingError):
    """What is stored is damaged; the message says how it is repaired."""

    code = "DATA_LOSS"


class FailedPrecondition(ServingError):
    """The server is not set up for this request."""

    code = "FAILED_PRECONDITION"


class ConsentWithheld(ServingError):
    """The person does not allow it: nothing was kept."""

    code = "PERMISSION_DENIED"


class Unauthenticated(ServingError):
    """The call carries no token, or a wrong one."""

    code = "UNAUTHENTICATED"


class Unimplemented(ServingError):
    """The call does not fit its method."""

    code = "UNIMPLEMENTED"


class ResourceExhausted(ServingError):
    """Too much for now; `retry_after_ms` says when to come back."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(ServingError):
    """The time that the caller gave is over."""

    code = "DEADLINE_EXCEEDED"


class Unavailable(ServingError):
    """A part is away; nothing was done, so a retry is safe."""

    code = "UNAVAILABLE"


class ProfileStoreUnavailable(Unavailable):
    """The Redis of the profiles does not answer."""


class EventLogUnavailable(Unavailable):
    """The Redis of the events does not answer; the event is not durable."""


class CatalogLogUnavailable(Unavailable):
    """The Redis of the catalogue log does not answer; the change is not durable."""


class ConfigError(ServingError):
    """The configuration cannot work; the message says what to change."""

    code = "FAILED_PRECONDITION"


class InUse(ConfigError):
    """Another process holds what this one needs."""
