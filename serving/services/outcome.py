"""Labels of a request for metrics and the access log: its surface, and the rung of its slate."""

from __future__ import annotations

from google.protobuf.message import Message

from penchant.v1 import common_pb2
from serving.observability.telemetry import Telemetry

_RUNGS = {number: name.removeprefix("RUNG_").lower() for name, number in common_pb2.Rung.items() if number}
_PARTS = {number: name.removeprefix("PART_") for name, number in common_pb2.Part.items()}


def surface_of(request: Message | None) -> str:
    """Returns the surface of a ranking request as the caller wrote it, else ""."""
    options = getattr(request, "options", None)
    return getattr(options, "surface", "")


def rung_of(response: Message, telemetry: Telemetry) -> str:
    """Returns the rung of a response with a slate, else ""; counts the parts that the slate had to do without."""
    slate = getattr(response, "slate", None)
    if slate is None:
        return ""
    # Counted here, as the runner does not know which slates reach a caller.
    for degradation in slate.degraded:
        telemetry.count(("degraded", _PARTS.get(degradation.part, "UNSPECIFIED")))
    return _RUNGS.get(slate.rung, "")
