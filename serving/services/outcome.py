"""What metrics and the access log keep of a request and its answer: names of the contract, and the surface."""

from __future__ import annotations

from google.protobuf.message import Message

from penchant.v1 import common_pb2
from serving.observability.telemetry import Telemetry

_RUNGS = {number: name.removeprefix("RUNG_").lower() for name, number in common_pb2.Rung.items() if number}
_PARTS = {number: name.removeprefix("PART_") for name, number in common_pb2.Part.items()}
_NONE = ""


def surface_of(request: Message | None) -> str:
    """Returns the surface that a ranking request names, else ""; as the caller wrote it."""
    options = getattr(request, "options", None)
    return getattr(options, "surface", _NONE)


def rung_of(answer: Message, telemetry: Telemetry) -> str:
    """Returns the rung of an answer that is a slate, else ""; counts the parts that it went out without."""
    slate = getattr(answer, "slate", None)
    if slate is None:
        return _NONE
    for degradation in slate.degraded:
        telemetry.count(("degraded", _PARTS.get(degradation.part, "UNSPECIFIED")))
    return _RUNGS.get(slate.rung, _NONE)
