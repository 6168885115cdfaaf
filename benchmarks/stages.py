"""Measures a request without a server around it, and alternately the same native calls in a bare loop: the floor.

Both alternate over the same users against the same Redis, so that a slow moment of the machine hits both. The floor
reads the user's string, runs the user encoder, searches the index and runs the ranker, each on inputs made before;
the difference of the two is the cost of Penchant itself.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt
import onnxruntime as _onnxruntime

from benchmarks.report import facts
from features.assemble import encoder_inputs, history
from features.clock import now_ms
from features.keys import event_type_key
from features.model_inputs import ranker_width
from features.profile import Profile, empty, fold
from features.records import make_records
from features.subjects import known
from serving.config import ServeConfig
from serving.engine.engine import Engine, open_engine
from serving.engine.pipelines import Dependencies
from serving.observability.telemetry import Telemetry
from serving.pipeline.request import Request
from serving.pipeline.results import Slate
from serving.pipeline.runner import Pipeline
from serving.redis.client import connect_one
from serving.redis.connection import PipelinedConnection
from serving.redis.embedded import RedisServer
from serving.stores.catalog_log import CatalogProgress
from serving.stores.profiles import ProfileStore

# Typed Any because neither has stubs for what is used here.
faiss: Any = _faiss
onnxruntime: Any = _onnxruntime

USERS = 200
EVENTS = 100
PAGE = 10
WARM_UP = 50

Call = Callable[[int], object]


def stages(bundle: Path, *, requests: int = 1000, redis: str = "embedded", candidates: int = 500) -> dict[str, Any]:
    """Measures `Recommend` of a bundle in one process and one thread, for made-up users of popular items.

    Args:
        bundle: Directory of the bundle.
        requests: Number of requests, and of rounds of the floor.
        redis: URL of the Redis to keep the profiles in, or "embedded".
        candidates: Number of candidates of each source.

    Returns:
        `stages_us` and `floor_stages_us` (medians by name), `pipeline_us`, `floor_us` (medians of the whole),
        `ratio_to_floor`, `policy_us` (their difference), `encoding_us` and `encoding_ratio_to_floor` (of users whose
        vector is not kept, because they have had an event since), and the circumstances.

    Raises:
        BundleError: The bundle is refused.
    """
    with _store(redis) as url, connect_one(url, timeout_s=1.0) as client:
        store = ProfileStore(client)
        config = ServeConfig.load(bundle=bundle, candidates=candidates)
        engine, encoding = _engines(bundle, config, store)
        profiles = _profiles(engine)
        store.put_states(profiles.items())
        keys = [store.key_of(subject) for subject in profiles]
        figures = _measure(
            (engine, encoding), list(profiles), _Floor(engine, client, keys, profiles, candidates), requests
        )
        client.delete(*keys)
        return {
            "bundle_id": engine.bundle_id,
            "items": engine.catalog.size,
            "dim": engine.model.dim,
            "history": EVENTS,
            "candidates": candidates,
            "requests": requests,
            **figures,
            "method": "one process, one thread; pipeline and floor alternate; medians",
            **facts(),
        }


def _engines(bundle: Path, config: ServeConfig, store: ProfileStore) -> tuple[Engine, Engine]:
    """Returns the engine as it serves, and one that keeps no user vectors.

    To the second, each user is as one who has had an event since the last request.
    """
    encoding = config.model_copy(update={"user_vectors": 0})
    progress = CatalogProgress()
    return (
        open_engine(bundle, Dependencies(config, store, progress, Telemetry())),
        open_engine(bundle, Dependencies(encoding, store, progress, Telemetry())),
    )


class _Floor:
    """The native calls of one request, on inputs made beforehand."""

    def __init__(
        self, engine: Engine, client: Any, keys: list[bytes], profiles: dict[str, Profile], candidates: int
    ) -> None:
        bundle, columns = engine.bundle, engine.catalog.columns
        line, vectors = PipelinedConnection(client), np.ascontiguousarray(columns.vectors[: engine.catalog.base_size])
        index = faiss.deserialize_index(np.frombuffer(bundle.read("index.faiss"), np.uint8))
        # As serving searches: one product over a small catalogue, an inverted file over a large one.
        scan = not hasattr(index, "nprobe")
        user_session, ranker_session = _session(bundle.read("user_encoder.onnx")), _session(bundle.read("ranker.onnx"))
        inputs = [_encoder_feed(engine, profile) for profile in profiles.values()]
        users = [user_session.run(None, feed)[0] for feed in inputs]
        rows = min(candidates, engine.catalog.size)
        # If the ranker does not move the order, it judges the page only, here as in the pipeline.
        judged = rows if bundle.model.blend else PAGE
        features = np.zeros((judged, ranker_width(len(bundle.model.actions), len(bundle.model.declared))), np.float32)
        ranked = [{"user": user, "items": columns.vectors[:judged], "features": features} for user in users]
        self.calls: dict[str, Call] = {
            "redis": lambda at: line.ask(b"GET", keys[at % len(keys)]),
            "user_encoder": lambda at: user_session.run(None, inputs[at % len(inputs)]),
            "index": lambda at: (
                np.argpartition(vectors @ users[at % len(users)][0], -rows)[-rows:]
                if scan
                else index.search(users[at % len(users)], rows)
            ),
            "ranker": lambda at: ranker_session.run(None, ranked[at % len(ranked)]),
        }


def _measure(engines: tuple[Engine, Engine], subjects: list[str], floor: _Floor, requests: int) -> dict[str, Any]:
    faiss.omp_set_num_threads(1)
    pipeline, encoding = (engine.pipelines["recommend"] for engine in engines)
    measured: dict[str, list[float]] = defaultdict(list)
    floors: dict[str, list[float]] = defaultdict(list)
    encoded: list[float] = []
    for at in range(-WARM_UP - len(subjects), requests):
        slate, whole = _answer(pipeline, subjects[at % len(subjects)], at)
        _, again = _answer(encoding, subjects[at % len(subjects)], at)
        bare = {name: _nanoseconds(call, at) for name, call in floor.calls.items()}
        if at < 0:
            continue
        for name, microseconds in slate.timings:
            measured[name].append(microseconds)
        measured[""].append(whole / 1000)
        encoded.append(again / 1000)
        for name, nanoseconds in bare.items():
            floors[name].append(nanoseconds / 1000)
        floors[""].append(sum(bare.values()) / 1000)
    pipeline_us, floor_us = float(np.median(measured.pop(""))), float(np.median(floors.pop("")))
    return {
        "stages_us": {name: float(np.median(times)) for name, times in measured.items()},
        "pipeline_us": round(pipeline_us, 1),
        "floor_stages_us": {name: round(float(np.median(times)), 1) for name, times in floors.items()},
        "floor_us": round(floor_us, 1),
        "ratio_to_floor": round(pipeline_us / floor_us, 3),
        "policy_us": round(pipeline_us - floor_us, 1),
        "encoding_us": round(float(np.median(encoded)), 1),
        "encoding_ratio_to_floor": round(float(np.median(encoded)) / floor_us, 3),
    }


def _answer(pipeline: Pipeline, subject: str, at: int) -> tuple[Slate, int]:
    """Returns the answer to a user's request, and the nanoseconds that it took."""
    begun = time.perf_counter_ns()
    request = Request(
        request_id=str(at),
        subject=subject,
        now_ms=now_ms(),
        deadline=time.monotonic() + 1.0,
        page_size=PAGE,
    )
    slate = pipeline.run(request)
    whole = time.perf_counter_ns() - begun
    if slate.rung != "sequence" or slate.degraded or slate.rows.size != PAGE:
        raise RuntimeError(f"a request was not whole: rung {slate.rung}, {slate.rows.size} items, {slate.degraded}")
    return slate, whole


def _nanoseconds(call: Call, at: int) -> int:
    begun = time.perf_counter_ns()
    call(at)
    return time.perf_counter_ns() - begun


def _profiles(engine: Engine) -> dict[str, Profile]:
    """Returns profiles of users of popular items by subject, the same ones every time."""
    draw = np.random.default_rng(1)
    columns, size = engine.catalog.columns, engine.catalog.base_size
    weights = np.exp(columns.popularity[:size].astype(np.float64))
    keys = engine.catalog.vocabulary.keys
    kind = event_type_key(engine.bundle.model.event_types[0])
    profiles: dict[str, Profile] = {}
    for number in range(USERS):
        count = min(EVENTS, size // 2)
        rows = draw.choice(size, count, replace=False, p=weights / weights.sum())
        times = 1_700_000_000_000 + 60_000 * np.arange(count)
        records = make_records(keys[rows], columns.category[rows], columns.creator[rows], times, np.nan, kind)
        profiles[known(f"bench-{number}")] = fold(empty(), records, count)
    return profiles


def _encoder_feed(engine: Engine, profile: Profile) -> dict[str, npt.NDArray[Any]]:
    types = {key: 1 + at for at, key in enumerate(engine.event_types)}
    past = history(profile, engine.catalog, types)
    rows, kinds = encoder_inputs(past.rows, past.types, engine.model.max_length)
    vectors = engine.catalog.columns.vectors[rows]
    return {"vectors": vectors[None], "types": kinds[None], "lengths": np.array([rows.size], np.int64)}


def _session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _store(redis: str) -> Iterator[str]:
    if redis != "embedded":
        yield redis
        return
    with tempfile.TemporaryDirectory() as folder, RedisServer(Path(folder), "profiles") as server:
        yield server.url
