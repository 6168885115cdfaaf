"""Events and slates as the service logs them, made by its own road, for tests of what reads the log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from features.catalog import Catalog
from features.clock import now_ms
from features.model_inputs import FEATURES
from features.tables.schema import ITEMS
from features.vocabulary import Vocabulary
from penchant.v1 import common_pb2, event_pb2
from serving.log_retention import LogRetention
from serving.pipeline.candidates import Candidates
from serving.pipeline.request import Request, UserState
from serving.pipeline.results import Slate
from serving.pipeline.side_effects import PendingSlate, logged_impression
from serving.services import events as service
from serving.stores.event_log import EventLog
from serving.stores.log_entries import LoggedEvent, LoggedImpression

NOTHING_KEPT = LogRetention(0, 0)
"""Times of a log whose entries go as soon as every reader has them."""

PARTITIONS = 4
"""Of the logs and profiles of tests that need several and read all of them."""


def catalog(items: Sequence[dict[str, Any]]) -> Catalog:
    """A catalogue of canonical items without vectors."""
    table = pa.Table.from_pylist(list(items), schema=ITEMS)
    names = [item["item_id"] for item in items]
    return Catalog(table, Vocabulary.build(names), np.zeros((len(names), 2), np.float32))


ITEMS_OF_TESTS = [
    {"item_id": f"i{n}", "title": f"thing {n}", "categories": [f"c{n % 3}"], "creator_id": f"m{n % 2}"}
    for n in range(10)
]
CATALOG = catalog(ITEMS_OF_TESTS)


def event(user: str, item: str, kind: str = "view_item", *, anonymous: bool = False, **fields: Any) -> event_pb2.Event:
    """An event in the words of the contract."""
    subject = common_pb2.Subject(anonymous_id=user) if anonymous else common_pb2.Subject(user_id=user)
    fields.setdefault("event_id", f"{user}-{item}-{kind}-{time.time_ns()}")
    return event_pb2.Event(subject=subject, item_id=item, event_type=kind, **fields)


def logged(*events: event_pb2.Event, of: Catalog = CATALOG) -> list[LoggedEvent]:
    """What EventService hands to the log for them."""
    checked = [service._check(place, one, now_ms(), 10**12, "") for place, one in enumerate(events)]
    return service._logged(checked, of)[0]


def ingest(log: EventLog, *events: event_pb2.Event, of: Catalog = CATALOG) -> list[int]:
    """Appends them; their log ids."""
    appended = log.append(logged(*events, of=of))
    assert all(one.error is None for one in appended)
    return [one.log_id for one in appended]


def slate(user: str, request_id: str, rows: Sequence[int], **fields: Any) -> LoggedImpression:
    """What the impression log gets for a slate of these rows of `CATALOG`."""
    subject = user if user.startswith(("u:", "a:")) else f"u:{user}"
    sources, unknown = fields.pop("sources", None), fields.pop("unknown", ())
    state = {name: fields.pop(name) for name in UserState._fields if name in fields}
    request = Request(request_id, subject, fields.pop("at", now_ms()), 0.0, len(rows), surface="home", **fields)
    shown = np.array(rows, np.int32)
    scores = np.linspace(1, 0, len(rows)).astype(np.float32)
    proposed = np.array(list(sources.values()), np.float32) if sources else scores[None]
    candidates = Candidates(shown, proposed, tuple(sources or ("popular",)))
    answer = Slate(
        shown, scores, np.ones(len(rows)), candidates, None, {}, [], unknown=unknown, user=UserState(**state)
    )
    return logged_impression(pending(request, answer))


def pending(request: Request, answer: Slate) -> PendingSlate:
    """A slate of `CATALOG` on its way to the impression log."""
    return PendingSlate(request, answer, CATALOG, "bundle-1", FEATURES.fingerprint())
