"""`penchant recommend`: the same Pipeline over many users, for e-mail and other channels without a request.

It is the service without a network: the same settings, bundle, stores, holdout and stages. The slates of the file are
logged like any others, so that a channel can be measured: when the file is in its place, and not before.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from features.files import sync
from features.item_fields import arrow_type
from features.private_files import open_private
from features.subjects import subject_of
from features.tables.user_ids import read_users
from serving.config import ServeConfig
from serving.engine.catalog_sync import CatalogSync
from serving.engine.engine import Engine, EngineRef, open_engine
from serving.engine.pipelines import Dependencies
from serving.errors import EventLogUnavailable, ResourceExhausted
from serving.experiments import Holdout
from serving.jobs.batch_log import RUN, SlateFile, deliver, finish
from serving.jobs.copies import register_made
from serving.jobs.feeds import Feed, answer
from serving.observability.telemetry import Telemetry
from serving.pipeline.side_effects import SlateCollector
from serving.privacy.ledger import Ledger
from serving.privacy.replay import replay
from serving.redis.client import connect
from serving.redis.embedded import RedisServer
from serving.redis.safety import require_safe
from serving.stores.catalog_log import CatalogLog, CatalogProgress
from serving.stores.event_log import EventLog
from serving.stores.meta import partitions_for, partitions_of
from serving.stores.profiles import ProfileStore
from serving.stores.registry import Registry

ITEMS = 20
"""Items per user."""

CHANNEL = "batch"
"""Channel that slates are logged with by default."""

SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_ids", pa.list_(pa.string()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
        pa.field("rung", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("profile_version", pa.uint64(), nullable=False),
        pa.field("bundle_id", pa.string(), nullable=False),
        # The parts that the answer did without, by their names in the contract; empty when none was.
        pa.field("degraded", pa.list_(pa.string()), nullable=False),
    ]
)

_TIMEOUT_S = 5.0
_ROWS = 1000


@dataclass(frozen=True, slots=True)
class _Service:
    """The parts of a worker of the service that answer requests, without its server."""

    engine: Engine
    log: EventLog
    holdout: Holdout
    slates: SlateCollector


def recommend(
    config: ServeConfig,
    users: Path,
    out: Path,
    items: int = ITEMS,
    *,
    channel: str = CHANNEL,
    surface: str = "",
    log: bool = True,
    fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes a feed for each user, the one that the service would answer now, then logs the slates.

    Args:
        config: The settings of the service.
        users: File of users, or a folder of Parquet: see `features.tables.user_ids`.
            The ids are those of the tables: `a:` and the anonymous id for an anonymous user.
        out: Parquet file to write, whole or not at all: `SCHEMA`. Once it is in its place it counts as delivered.
        items: Items per user.
        channel: Where the slates will be shown; logged with them.
        surface: Surface that is asked for; the ranker knows surfaces by their names.
        log: Log the slates; without, nothing can be measured by them.
        fields: Fields of the items to write too, by their names in the contract: `title`, `attributes.image`. They are
            in the column `items`, a struct for each of `item_ids`.

    Returns:
        `users`, `rejected` (rows of the file without an id), `items_per_user` (mean), `seconds`, `personal` (users
        whose history was used), `held_out`, `logged` and `not_logged` slates (of users who do not allow it), and
        `finished`: slates that an earlier run had still to log.

    Raises:
        TablesError: The users cannot be read.
        BundleError: The bundle is refused.
        ConfigError: The settings do not fit the stores, an item has no such field, or another process writes the
            same file.
        Unavailable: A Redis does not answer. Nothing is written, as no user should get a feed that is not theirs;
            where the file is in its place already, the message says so, and the next run into it logs the rest.
        ResourceExhausted: The log is full; as above.
    """
    begun = time.monotonic()
    feed = Feed.of(items, channel, surface, fields)
    user_list, run = read_users(users), uuid.uuid4().hex
    user_list.tell()
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(_opened(config))
        facts: dict[str, Any] = {"finished": finish(out, service.log)}
        slates = stack.enter_context(SlateFile(out, run))
        part = out.with_name(f"{out.name}.part")
        facts |= _write(service, user_list.ids, feed, part, run, slates if log and config.impressions else None)
        slates.sync()
        sync(part)
        # Registered first: an output without a name in the certificates of later erasures would be worse than a name
        # without an output.
        register_made(Registry(service.log), "batch", out.absolute())
        os.replace(part, out)
        slates.due()
        sync(out.parent)
        facts["logged"], facts["not_logged"] = _delivered(slates.path, service.log, out)
    rejected, seconds = len(user_list.intake.rejected), round(time.monotonic() - begun, 3)
    return facts | {"rejected": rejected, "seconds": seconds, "bundle_id": service.engine.bundle_id, "out": str(out)}


def _write(
    service: _Service, users: Sequence[str], feed: Feed, part: Path, run: str, slate_file: SlateFile | None
) -> dict[str, Any]:
    """Writes the answer of every user into a file; returns the counts that `recommend` reports."""
    console = Console(stderr=True)
    items = personal = held_out = 0
    rows: list[dict[str, Any]] = []
    schema = SCHEMA.with_metadata({RUN: run.encode()})
    if feed.fields:
        schema = schema.append(pa.field("items", pa.list_(arrow_type(feed.fields)), nullable=False))
    with open_private(part) as sink, pq.ParquetWriter(sink, schema) as writer:
        for place, user in enumerate(track(users, "answering", console=console, disable=not console.is_terminal)):
            slate, row = answer(service.engine, service.holdout, subject_of(user), user, feed)
            rows.append(row)
            items, personal = items + len(row["item_ids"]), personal + (slate.rung != "popular")
            held_out += slate.user.assignment.holdout
            # Rows and slates in step, so that a row in the output has its slate in the file, and no other.
            if len(rows) == _ROWS or place == len(users) - 1:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                slates = service.slates.take()
                if len(slates) != len(rows):
                    raise AssertionError(f"{len(rows)} answers made {len(slates)} slates")
                if slate_file:
                    slate_file.write(slates)
                rows.clear()
    return {
        "users": len(users),
        "items_per_user": round(items / max(len(users), 1), 2),
        "personal": personal,
        "held_out": held_out,
    }


def _delivered(path: Path, log: EventLog, out: Path) -> tuple[int, int]:
    """Logs the slates of an output that is in its place."""
    try:
        return deliver(path, log)
    except (EventLogUnavailable, ResourceExhausted) as error:
        message = (
            f"{out} is in its place, and not all of its slates are logged: {error}; the next run into it logs the rest"
        )
        raise type(error)(message, retry_after_ms=error.retry_after_ms) from error


@contextlib.contextmanager
def _opened(config: ServeConfig) -> Iterator[_Service]:
    """Opens the parts of a worker, with the live catalogue as it is now."""
    with contextlib.ExitStack() as stack:
        redis_url, events_redis_url = config.redis, config.events_redis or config.redis
        if redis_url == "embedded":
            redis_url = stack.enter_context(RedisServer(config.state_dir, "profiles")).url
        if events_redis_url == "embedded":
            events_redis_url = stack.enter_context(RedisServer(config.state_dir, "events")).url
        profiles = stack.enter_context(connect(redis_url, _TIMEOUT_S))
        events = stack.enter_context(connect(events_redis_url, _TIMEOUT_S))
        # With a log in another place, or another number of partitions, every user would be new.
        partitions_of(events)
        partitions = partitions_for(events, config.partitions if "partitions" in config.model_fields_set else None)
        config = config.model_copy(update={"partitions": partitions})
        require_safe(events, "events", config.unsafe_redis)
        store, log = (
            ProfileStore(profiles, partitions),
            EventLog(events, partitions, default=config.default_consent, unsafe=config.unsafe_redis),
        )
        store.open()
        if erasures := Ledger(config.ledger_path).erasures():
            replay(erasures, log, store, int(config.purge_hours * 3_600_000))
        progress, slates = CatalogProgress(), SlateCollector()
        engine = open_engine(config.bundle, Dependencies(config, store, progress, Telemetry(), slates))
        CatalogSync(EngineRef(engine), CatalogLog(events), progress).catch_up()
        yield _Service(engine, log, Holdout(config.holdout_share, config.holdout_salt), slates)
