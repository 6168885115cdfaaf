"""`penchant recommend`: the same Pipeline over many people, for e-mail and other channels without a request."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import track

from features.errors import TablesError
from serving.catalog_log import CatalogLog
from serving.config import ServeConfig
from serving.engine import Engine, Host, Surroundings, open_engine
from serving.errors import ProfileStoreUnavailable
from serving.experiments import Holdout
from serving.follower import Follower
from serving.hydrators import Progress
from serving.profiles import ProfileStore
from serving.query import Query
from serving.redis_client import connect
from serving.redis_server import RedisServer
from serving.telemetry import Telemetry

ITEMS = 20
"""Items per person."""

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
    ]
)

_PATIENCE_S = 60.0
_TIMEOUT_S = 5.0
_ROWS = 1000


def recommend(
    bundle: Path, users: Path, out: Path, redis_url: str = "embedded", events_redis_url: str = "", items: int = ITEMS
) -> dict[str, Any]:
    """Writes a feed for each person, the one that the service would answer now.

    Args:
        bundle: Directory of the bundle.
        users: Parquet with a column `user_id`, JSON lines with a field `user_id`, or a text file with one id a line.
        out: Parquet file to write, whole or not at all: `SCHEMA`.
        redis_url: URL of the profiles Redis, or "embedded" to start one on the data of a service that is stopped.
        events_redis_url: URL of the events Redis, which holds the live catalogue; the same one where empty.
        items: Items per person.

    Returns:
        `users`, `items_per_user` (mean), `seconds`, `personal` (people whose history was used).

    Raises:
        TablesError: The people cannot be read.
        BundleError: The bundle is refused.
        Unavailable: A Redis does not answer: nothing is written, as nobody should get what was not meant for them.
    """
    begun = time.monotonic()
    people = _people(users)
    config = ServeConfig.load(bundle=bundle)
    batch = out.with_name(out.name + ".part")
    with _opened(config, redis_url, events_redis_url) as engine, pq.ParquetWriter(batch, SCHEMA) as writer:
        holdout = Holdout(config.holdout_share, config.holdout_salt)
        console = Console(stderr=True)
        shown = personal = 0
        rows: list[dict[str, Any]] = []
        for person in track(people, "answering", console=console, disable=not console.is_terminal):
            rows.append(_answer(engine, holdout, person, items))
            shown += len(rows[-1]["item_ids"])
            personal += rows[-1]["rung"] != "popular"
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
    os.replace(batch, out)
    return {
        "users": len(people),
        "items_per_user": round(shown / max(len(people), 1), 2),
        "personal": personal,
        "seconds": round(time.monotonic() - begun, 3),
        "bundle_id": engine.bundle_id,
        "out": str(out),
    }


def _answer(engine: Engine, holdout: Holdout, person: str, items: int) -> dict[str, Any]:
    subject = f"u:{person}"
    assignment = holdout.assign(subject)
    query = Query(
        request_id=uuid.uuid4().hex,
        subject=subject,
        now_ms=int(time.time() * 1000),
        deadline=time.monotonic() + _PATIENCE_S,
        page_size=items,
        surface="batch",
        arm=assignment.arm,
        holdout=assignment.holdout,
        bucket=assignment.bucket,
    )
    slate = engine.pipelines["recommend"].run(query)
    for part, reason in query.degraded:
        if part == "PROFILE_STORE":
            raise ProfileStoreUnavailable(f"{reason}; nothing was written, run it again")
    return {
        "user_id": person,
        "item_ids": engine.catalog.ids(slate.rows),
        "scores": slate.scores,
        "rung": query.rung,
        "arm": query.arm,
        "request_id": query.request_id,
        "profile_version": query.profile.version if query.profile else 0,
        "bundle_id": engine.bundle_id,
    }


@contextlib.contextmanager
def _opened(config: ServeConfig, redis_url: str, events_redis_url: str) -> Iterator[Engine]:
    """An engine with the live catalogue as it is now."""
    with contextlib.ExitStack() as stack:
        events_redis_url = events_redis_url or redis_url
        if redis_url == "embedded":
            redis_url = stack.enter_context(RedisServer(config.state_dir, "profiles")).url
        if events_redis_url == "embedded":
            events_redis_url = stack.enter_context(RedisServer(config.state_dir, "events")).url
        profiles = stack.enter_context(connect(redis_url, _TIMEOUT_S))
        events = stack.enter_context(connect(events_redis_url, _TIMEOUT_S))
        progress = Progress()
        store = ProfileStore(profiles, config.partitions)
        engine = open_engine(config.bundle, Surroundings(config, store, progress, Telemetry()))
        Follower(Host(engine), CatalogLog(events), progress).catch_up()
        yield engine


def _people(users: Path) -> list[str]:
    """The ids in a file, each once, in order.

    Raises:
        TablesError: The file cannot be read, or names nobody.
    """
    try:
        if users.suffix == ".parquet":
            found = pq.read_table(users, columns=["user_id"]).column("user_id").cast(pa.string()).to_pylist()
        else:
            lines = [line.strip() for line in users.read_text(encoding="utf-8").splitlines()]
            found = [json.loads(line)["user_id"] if users.suffix == ".jsonl" else line for line in lines if line]
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise TablesError(
            f"{users}: no people in it ({error!r}); give Parquet or JSON lines with user_id, or text"
        ) from None
    people = list(dict.fromkeys(str(person) for person in found if person))
    if not people:
        raise TablesError(f"{users}: names nobody; give Parquet or JSON lines with user_id, or one id a line")
    return people
