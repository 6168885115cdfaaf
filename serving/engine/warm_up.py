"""Answers made-up requests before the first call, so that no caller waits for a kernel to compile or for memory."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np

from features.catalog import Catalog
from features.clock import now_ms
from features.controls import Dial
from features.errors import PenchantError
from features.keys import event_type_key, item_key
from features.profile import RING, Profile, empty
from features.profile_codec import decode, encode
from features.records import pack_record
from features.subjects import known
from features.transforms import ItemInputShapes, item_inputs, item_text
from serving.bundle.model import Model, ModelError
from serving.observability.telemetry import Telemetry
from serving.pipeline.hydrators import ProfileHydrator
from serving.pipeline.request import NO_ROWS, Request, Rows
from serving.pipeline.runner import Pipeline

ITEM_BATCH = 256
"""Items that are embedded at once."""

_PATIENCE_S = 60.0
_ITEMS = 8
_TAIL = 70
"""More than a tail holds before it is folded."""

_EVENTS = RING + _TAIL
"""More than the ring holds: what leaves it is folded by a kernel of its own."""

_KEYED = (Dial.CREATOR_WEIGHT, Dial.CATEGORY_WEIGHT)
_log = logging.getLogger(__name__)


def warm_models(model: Model, shapes: ItemInputShapes, candidates: int) -> None:
    """Runs the models at the sizes of requests.

    Args:
        model: The models.
        shapes: How items are fed to the encoder.
        candidates: Candidates of a request.
    """
    items = item_inputs([{"item_id": "", "title": "warm"}] * ITEM_BATCH, shapes)
    try:
        model.warm(items, candidates)
    except ModelError as error:  # a model may refuse inputs that are made up
        _log.info("a model is not warm, so that its first call takes longer: %s", error)


def warm_pipelines(pipelines: Mapping[str, Pipeline], catalog: Catalog, event_types: Sequence[str]) -> None:
    """Answers a request of each method for a made-up user; it is neither stored nor logged nor counted.

    Args:
        pipelines: The pipeline of each method.
        catalog: Its items.
        event_types: Names of event types, which the user has one after the other.
    """
    rows = np.arange(min(_ITEMS, catalog.size), dtype=np.int32)
    if not rows.size:
        return
    store = _OneProfile(catalog, rows.tolist(), event_types)
    for method, pipeline in pipelines.items():
        hydrators = [
            hydrator.reading(store) if isinstance(hydrator, ProfileHydrator) else hydrator
            for hydrator in pipeline.hydrators
        ]
        quiet = dataclasses.replace(pipeline, hydrators=hydrators, side_effects=(), recorder=Telemetry())
        # Reasons and dials have kernels of their own.
        for explain in (False, True):
            try:
                quiet.run(_request(method, catalog, rows, explain))
            except PenchantError as error:
                _log.info("%s is not warm, so that its first call takes longer: %s", method, error)


def _request(method: str, catalog: Catalog, rows: Rows, explain: bool) -> Request:
    return Request(
        request_id="warm",
        subject=known("warm"),
        now_ms=now_ms(),
        deadline=time.monotonic() + _PATIENCE_S,
        page_size=_ITEMS,
        method=method,
        explain=explain,
        exclude=rows[:1],
        text=item_text(catalog.item(0)) if method == "search" else "",
        rows=rows if method == "rank" else None,
        upstream=np.ones(rows.size, np.float32) if method == "rank" else None,
        seeds=rows[:1] if method == "similar" else NO_ROWS,
        dials={(dial, int(dial in _KEYED)): 0.5 for dial in Dial} if explain else {},
    )


class _OneProfile:
    """A store with one profile in it, read as it is from Redis: a state, and entries that are not folded yet."""

    def __init__(self, catalog: Catalog, rows: Sequence[int], event_types: Sequence[str]) -> None:
        now = now_ms()
        items = [item_key(catalog.item(row)["item_id"]) for row in rows]
        stored = encode(empty())
        # Entry by entry, as the log brings them: folding a tail and leaving the ring are kernels of their own.
        for number in range(1, _EVENTS + 1):
            key, kind = items[number % len(items)], event_type_key(event_types[number % len(event_types)])
            stored += number.to_bytes(8, "big") + pack_record(key, 1, 1, now - _EVENTS + number, 1.0, kind)
            # A tail of one entry, of several, behind a state, behind a full ring, and behind one that items have left.
            if number in (1, _TAIL // 2, RING, RING + _TAIL // 2):
                stored = encode(decode(stored))
        self._stored = stored

    def read(self, subject: str) -> Profile:
        """Returns the profile, whatever the subject."""
        return decode(self._stored)
