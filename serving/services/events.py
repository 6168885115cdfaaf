"""EventService: takes events durably and applies them to profiles at once."""

# ruff: noqa: N802 - the contract names the methods

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from features.catalog import Catalog
from features.clock import now_ms
from features.errors import PenchantError
from features.event_types import hint
from features.keys import event_type_key, item_key
from features.records import pack_record
from features.subjects import Subject, id_of
from penchant.v1 import event_pb2, event_pb2_grpc
from serving.engine.engine import EngineRef
from serving.errors import InvalidArgument, ResourceExhausted, ServingError
from serving.observability.telemetry import Telemetry
from serving.services import validation as checks
from serving.services.streams import Streams
from serving.stores.event_log import EventLog
from serving.stores.log_codec import encode_event, user_fields
from serving.stores.log_entries import Appended, LoggedEvent
from serving.stores.profiles import Applied, ProfileStore

MAX_EVENTS = 1_000
FUTURE_MS = 5 * 60_000
_SHOWN = 80
"""Most characters of an id that a message shows."""
_LONG_AGO_MS = 30 * 365 * 24 * 3_600_000

_OPTIONAL = ("session_id", "request_id", "surface", "query")


@dataclass(frozen=True, slots=True)
class _Checked:
    """A valid event, and its place in the request."""

    place: int
    subject: Subject
    event: event_pb2.Event
    timestamp: int
    attributes: dict[str, str]


class EventService(event_pb2_grpc.EventServiceServicer):
    """Takes events durably and applies them to profiles at once."""

    def __init__(
        self,
        engine_ref: EngineRef,
        log: EventLog,
        store: ProfileStore,
        telemetry: Telemetry,
        streams: Streams,
        refused_in_ids: str = "",
    ) -> None:
        """Takes the stores, and the characters that no id of an event may hold."""
        self._engine_ref, self._log, self._store, self._telemetry = engine_ref, log, store, telemetry
        self._streams, self._refused_in_ids = streams, refused_in_ids

    def Ingest(self, request: event_pb2.IngestRequest, context: grpc.ServicerContext) -> event_pb2.IngestResponse:
        """Appends a batch of events; each gets a status of its own, and an invalid event does not affect the others."""
        return event_pb2.IngestResponse(statuses=self._take(request.events))

    def IngestStream(
        self, request_iterator: Iterator[event_pb2.IngestStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[event_pb2.IngestStreamResponse]:
        """Takes batch after batch; the next is read when the last is durable, so no caller can run ahead of the log."""
        with self._streams.entered(context):
            for request in request_iterator:
                statuses = self._streams.patiently(partial(self._take, request.events), context)
                yield event_pb2.IngestStreamResponse(statuses=statuses)

    def _take(self, events: Sequence[event_pb2.Event]) -> list[event_pb2.EventStatus]:
        """Checks, appends and applies a batch; the only way of an event into the log."""
        checks.count(events, "events", 1, MAX_EVENTS, "events")
        now = now_ms()
        statuses = [event_pb2.EventStatus() for _ in events]
        valid, taken = list[_Checked](), list[_Checked]()
        for place, event in enumerate(events):
            try:
                valid.append(_check(place, event, now, self._log.window_ms, self._refused_in_ids))
            except InvalidArgument as error:
                statuses[place] = _refused(error)
        if valid:
            logged, unknown = _logged(valid, self._engine_ref.engine.catalog)
            # The log first: an event that is durable is applied sooner or later, the reverse would lose it.
            appended = self._log.append(logged)
            applied = self._apply(valid, appended)
            # The log refuses some as well, such as those of a user who allows nothing.
            taken = [checked for checked, entry in zip(valid, appended, strict=True) if entry.error is None]
            hints = self._hints(taken, unknown)
            for checked, entry, is_applied in zip(valid, appended, applied, strict=True):
                statuses[checked.place] = status = _status(entry, is_applied)
                if status.code == 0:
                    status.message = "; ".join(filter(None, (status.message, hints[checked.place])))
            self._telemetry.count("events_unknown_item", sum(checked.place in unknown for checked in taken))
        self._telemetry.count(("events", "taken"), len(taken))
        self._telemetry.count(("events", "refused"), len(statuses) - len(taken))
        return statuses

    def _hints(self, taken: Sequence[_Checked], unknown: set[int]) -> dict[int, str]:
        """Returns a hint at a likely mistake for each durable event, by its place; "" if nothing is odd."""
        types, hints, odd = set(self._engine_ref.engine.event_types.values()), {}, 0
        for checked in taken:
            type_hint, item = hint(checked.event.event_type, types), checked.event.item_id[:_SHOWN]
            odd += bool(type_hint)
            is_unknown = checked.place in unknown
            item_hint = f"the catalogue has no item {item!r}: put it, or correct the id" if is_unknown else ""
            text = "; ".join(filter(None, (item_hint, type_hint)))
            hints[checked.place] = f"durable, but {text}" if text else ""
        self._telemetry.count("events_odd_type", odd)
        return hints

    def _apply(self, valid: Sequence[_Checked], appended: Sequence[Appended]) -> list[bool | PenchantError]:
        """Applies durable events to the profiles; those that fail here the projector applies later."""
        by_subject: dict[str, list[tuple[int, bytes]]] = {}
        for checked, entry in zip(valid, appended, strict=True):
            if entry.record and entry.personal:
                by_subject.setdefault(checked.subject, []).append((entry.log_id, entry.record))
        outcome: dict[str, Applied | PenchantError] = {}
        try:
            outcome = dict(zip(by_subject, self._store.apply_many(list(by_subject.items())), strict=True))
        except ServingError:
            # The events are durable, so the call succeeds: the projector applies them when the store is back.
            self._telemetry.count("events_applied_later", sum(map(len, by_subject.values())))
            return [entry.personal and not entry.record for entry in appended]
        return [
            # A duplicate whose record has left the log was applied before.
            entry.personal and (not entry.record or _is_applied(outcome[checked.subject]))
            for checked, entry in zip(valid, appended, strict=True)
        ]


def _is_applied(outcome: Applied | PenchantError) -> bool | PenchantError:
    return outcome.refused == 0 if isinstance(outcome, Applied) else outcome


def _check(place: int, event: event_pb2.Event, now: int, window_ms: int, refused_in_ids: str) -> _Checked:
    """Checks one event.

    Raises:
        InvalidArgument: A field is wrong.
    """
    subject = checks.subject(event.subject, "subject")
    checks.identifier(event.event_id, "event_id")
    checks.identifier(event.event_type, "event_type", limit=64)
    checks.identifier(event.item_id, "item_id", required=event.event_type != "search")
    checks.identifier(event.session_id, "session_id", required=False)
    checks.identifier(event.request_id, "request_id", required=False)
    for name, value in (
        ("subject.user_id" if event.subject.user_id else "subject.anonymous_id", id_of(subject)),
        ("event_id", event.event_id),
        ("item_id", event.item_id),
        ("session_id", event.session_id),
        ("request_id", event.request_id),
    ):
        checks.without(refused_in_ids, value, name)
    checks.identifier(event.surface, "surface", required=False, limit=64)
    checks.text(event.query, "query", required=event.event_type == "search")
    timestamp = event.timestamp_ms or now
    # The window is the time in which the log recognises a retry; beyond it an event could count twice.
    oldest, newest = now - window_ms, now + FUTURE_MS
    if not oldest <= timestamp <= newest:
        raise InvalidArgument(
            "timestamp_ms", f"must be {oldest} to {newest}, got {timestamp}: {_advice(timestamp, now)}"
        )
    if event.HasField("value"):
        checks.number(event.value, "value")
    if event.HasField("position"):
        checks.whole(event.position, "position", 0, 2**31 - 1)
    return _Checked(place, subject, event, timestamp, checks.attributes(event.attributes, "attributes"))


def _advice(timestamp: int, now: int) -> str:
    """Returns the likely mistake of a time that an event cannot have, and its remedy."""
    if timestamp < 0 or timestamp > now:
        return "send milliseconds since 1970, UTC, and set the caller's clock"
    # Read as seconds it would be a time of the last decades.
    if now - _LONG_AGO_MS < timestamp * 1000 < now + FUTURE_MS:
        return "send milliseconds; these look like seconds"
    return "older history belongs to bulk import, `penchant profiles rebuild`"


def _logged(valid: Sequence[_Checked], catalog: Catalog) -> tuple[list[LoggedEvent], set[int]]:
    """Returns the events as the log takes them, and the places of those whose item the catalogue does not have.

    Category and creator are those that the item has now.
    """
    logged, unknown = [], set()
    for checked in valid:
        event, item = checked.event, item_key(checked.event.item_id)
        # Stored with the event: a category that an item gets later must not rewrite the history of its users.
        value, kin = event.value if event.HasField("value") else math.nan, catalog.category_and_creator(item)
        if kin is None and event.item_id:
            unknown.add(checked.place)
        record = pack_record(item, *(kin or (0, 0)), checked.timestamp, value, event_type_key(event.event_type))
        logged.append(LoggedEvent(checked.subject, event.event_id, record, _payload(checked)))
    return logged, unknown


def _payload(checked: _Checked) -> bytes:
    """Returns an event in the columns of the events table."""
    event = checked.event
    payload: dict[str, Any] = {
        **user_fields(checked.subject),
        "event_id": event.event_id,
        "item_id": event.item_id,
        "event_type": event.event_type,
        "timestamp": checked.timestamp,
    }
    payload |= {name: getattr(event, name) for name in _OPTIONAL if getattr(event, name)}
    payload |= {name: getattr(event, name) for name in ("value", "position") if event.HasField(name)}
    if checked.attributes:
        payload["attributes"] = checked.attributes
    return encode_event(payload)


def _status(entry: Appended, applied: bool | PenchantError) -> event_pb2.EventStatus:
    if entry.error:
        return _refused(entry.error)
    status = event_pb2.EventStatus(profile_version=entry.log_id, applied=applied is True, duplicate=entry.duplicate)
    if isinstance(applied, ResourceExhausted):
        status.code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        status.message, status.field = f"durable, but not yet applied: {applied}", applied.field
    elif not entry.personal:
        status.message = "durable, and kept out of the profile: this user does not allow personal answers"
    return status


def _refused(error: ServingError) -> event_pb2.EventStatus:
    code: int = getattr(grpc.StatusCode, error.code).value[0]
    return event_pb2.EventStatus(code=code, message=str(error), field=error.field)
