"""The gRPC status of an error: code, details and trailing metadata; no other place makes one."""

from __future__ import annotations

import logging
import uuid
from functools import lru_cache

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from serving.errors import ServingError
from serving.observability.logs import REQUEST_ID_HEADER

_DETAILS_KEY = "grpc-status-details-bin"
_STATUSES = 128
"""Statuses that are kept."""

_log = logging.getLogger(__name__)
_Status = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]


def abort(context: grpc.ServicerContext, error: Exception, request_id: str = "") -> Exception:
    """Ends a call with the status of an error; returns the exception that the method has to raise."""
    if not isinstance(error, ServingError):
        # The text of an unexpected error may name a user, so the caller gets a mark by which the log has it.
        mark = uuid.uuid4().hex[:12]
        _log.error("unexpected error %s", mark, exc_info=error)
        error = ServingError(f"unexpected error {mark}: please report it with the server's log")
    code, details, metadata = status_of(error, request_id)
    context.set_trailing_metadata(metadata)
    try:
        context.abort(code, details)
    except Exception as aborted:  # noqa: BLE001 - the exception of abort has no class of its own
        return aborted
    raise AssertionError("abort never returns")


def status_of(error: ServingError, request_id: str = "") -> _Status:
    """Returns the code, the details and the trailing metadata of an error."""
    code, details, metadata = _status(error.code, str(error), error.field, error.retry_after_ms)
    return code, details, ((REQUEST_ID_HEADER, request_id), *metadata) if request_id else metadata


# Kept, as it costs more than all else of a refusal; by its values, as an error holds the frames that raised it, and
# those hold messages.
@lru_cache(_STATUSES)
def _status(name: str, message: str, field: str, retry_after_ms: int) -> _Status:
    code = getattr(grpc.StatusCode, name)
    status = status_pb2.Status(code=code.value[0], message=message)
    metadata: list[tuple[str, str | bytes]] = []
    if field:
        description = message.removeprefix(f"{field}: ")
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if retry_after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        # gRPC clients with a retry policy wait by themselves if this is in the metadata.
        metadata.append(("grpc-retry-pushback-ms", str(retry_after_ms)))
    if status.details:
        metadata.append((_DETAILS_KEY, status.SerializeToString()))
    return code, message, tuple(metadata)
