"""The process that checks answers while a service is loaded: `python -m benchmarks.load.prober`.

Reads one line of JSON (`benchmarks.load.quality` writes it), asks the idle service, and prints a line when it has its
answers. Then it asks again and again, until the line `stop` or the end of its input, and prints its figures.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.load.generator import CallFailed, Generator
from benchmarks.load.material import titles_of
from benchmarks.load.traffic import PATHS
from benchmarks.report import BenchmarkError
from penchant.v1 import catalog_pb2, common_pb2, event_pb2, ranking_pb2

PAGE = 20
RECALL_AT = 50
WITHDRAWN = 5
_SET_AVAILABILITY = "/penchant.v1.CatalogService/SetAvailability"
_CONNECTIONS = 4
_SEEDS = 20
_SEEN_WITHIN_S = 5.0
_DEFAULT_CANDIDATES = 500
_Slates = list[list[str]]


class Prober:
    """The checks of one service, and what they have found so far."""

    def __init__(self, generator: Generator, spec: dict[str, Any]) -> None:
        """Takes the connections, and what is to be checked."""
        self._generator, self._spec = generator, spec
        self._names = set(spec["names"])
        self.withdrawn: list[str] = []
        self._requests = self._probes()
        self._unloaded: _Slates = []
        self._control = 0.0
        self._loaded: list[tuple[int, list[str]]] = []
        self._failed = self._shown = self._answers = 0
        self._events: list[tuple[bool, float, bool]] = []
        self._truth: list[tuple[bytes, set[str]]] = []
        self._recalls: list[float] = []
        self._unloaded_recall = float("nan")

    def prepare(self) -> None:
        """Withdraws some items, and asks the idle service for every answer that is compared, twice."""
        if "eligibility" in self._names:
            self._withdraw()
        self._unloaded = [self._ask(path, message) for path, message in self._requests]
        again = [self._ask(path, message) for path, message in self._requests]
        self._control = float(np.mean([a == b for a, b in zip(self._unloaded, again, strict=True)]))
        if "recall" in self._names and self._spec["bundle"]:
            self._truth = exact_neighbors(Path(self._spec["bundle"]), set(self.withdrawn))
            self._unloaded_recall = float(np.mean([self._recall(*truth) for truth in self._truth]))

    def steps(self) -> itertools.cycle[Callable[[], None]]:
        """Returns the checks in turn, without end."""
        steps: list[Callable[[], None]] = []
        if "agreement" in self._names or "eligibility" in self._names:
            steps.append(self._compare)
        if "staleness" in self._names and self._spec["items"]:
            steps.append(self._send_event)
        if self._truth:
            steps.append(self._measure_recall)
        return itertools.cycle(steps)

    def restore(self) -> None:
        """Makes the withdrawn items available again."""
        if self.withdrawn:
            self._set_available(True)

    def figures(self) -> dict[str, Any]:
        """Returns what was found; see docs/load-testing.md."""
        figures: dict[str, Any] = {"failed_checks": self._failed}
        if self._loaded and "agreement" in self._names:
            pairs = [(self._unloaded[at], slate) for at, slate in self._loaded]
            figures["agreement"] = {
                "answers": len(pairs),
                "equal": round(float(np.mean([a == b for a, b in pairs])), 4),
                "overlap": round(float(np.mean([_overlap(a, b) for a, b in pairs])), 4),
                "unloaded_equal": round(self._control, 4),
            }
        if self._events:
            at_once, waits, stale = zip(*self._events, strict=True)
            figures["staleness"] = {
                "events": len(at_once),
                "seen_in_next": round(float(np.mean(at_once)), 4),
                "slowest_ms": round(1000 * max(waits), 1),
                "marked_stale": sum(stale),
            }
        if "eligibility" in self._names:
            figures["eligibility"] = {
                "withdrawn": len(self.withdrawn),
                "answers": self._answers,
                "shown": self._shown,
            }
        if self._recalls:
            figures["recall"] = {
                "answers": len(self._recalls),
                f"recall@{RECALL_AT}": round(float(np.mean(self._recalls)), 4),
                "unloaded": round(self._unloaded_recall, 4),
            }
        return figures

    def _probes(self) -> list[tuple[str, bytes]]:
        """Returns the path and the message of each request whose answer is compared."""
        requests: list[tuple[str, bytes]] = []
        users = self._spec["users"]
        for user in users:
            request = ranking_pb2.RecommendRequest(options=_options(user, PAGE))
            requests.append((PATHS["recommend"], request.SerializeToString()))
        for user, query in zip(itertools.cycle(users), self._spec["queries"], strict=False):
            search = ranking_pb2.SearchRequest(options=_options(user, PAGE), query=query)
            requests.append((PATHS["search"], search.SerializeToString()))
        return requests

    def _ask(self, path: str, message: bytes) -> list[str]:
        answer = ranking_pb2.RecommendResponse.FromString(self._generator.call(path, message))
        # The responses of all ranking methods have their slate in field 1.
        return [item.item_id for item in answer.slate.items]

    def _compare(self) -> None:
        at = len(self._loaded) % len(self._requests)
        slate = self._ask(*self._requests[at])
        self._loaded.append((at, slate))
        self._answers += 1
        self._shown += len(set(slate) & set(self.withdrawn))

    def _send_event(self) -> None:
        """Sends an event of a new user, and asks for that user's slate until it knows the event."""
        user, items = f"load-check-{uuid.uuid4().hex}", self._spec["items"]
        event = event_pb2.Event(
            event_id=uuid.uuid4().hex, subject=common_pb2.Subject(user_id=user), event_type="view_item",
            item_id=items[len(self._events) % len(items)],
        )  # fmt: skip
        request = event_pb2.IngestRequest(events=[event])
        answer = event_pb2.IngestResponse.FromString(self._generator.call(PATHS["ingest"], request.SerializeToString()))
        version, begun, tries, stale = answer.statuses[0].profile_version, time.perf_counter(), 0, False
        if not version:
            raise CallFailed(PATHS["ingest"], str(answer.statuses[0].code), answer.statuses[0].message)
        while True:
            # Without `min_profile_version`: what every other caller of this user would get now.
            message = ranking_pb2.RecommendRequest(options=_options(user, PAGE)).SerializeToString()
            slate = ranking_pb2.RecommendResponse.FromString(self._generator.call(PATHS["recommend"], message)).slate
            tries, waited = tries + 1, time.perf_counter() - begun
            stale = stale or any(part.part == common_pb2.PART_PROFILE_STALE for part in slate.degraded)
            if slate.profile_version >= version or waited > _SEEN_WITHIN_S:
                self._events.append((tries == 1 and slate.profile_version >= version, waited, stale))
                return

    def _measure_recall(self) -> None:
        self._recalls.append(self._recall(*self._truth[len(self._recalls) % len(self._truth)]))

    def _recall(self, message: bytes, expected: set[str]) -> float:
        slate = self._ask(PATHS["similar"], message)
        return len(expected & set(slate)) / max(len(expected), 1)

    def _withdraw(self) -> None:
        # Items that users would be shown: the absence of others would prove nothing.
        popular = self._ask(*self._requests[0])
        if not popular:
            raise BenchmarkError("the service recommends nothing, so no item can be withdrawn: fill its catalogue")
        self.withdrawn = popular[:WITHDRAWN]
        self._set_available(False)
        end = time.monotonic() + _SEEN_WITHIN_S
        while set(self._ask(*self._requests[0])) & set(self.withdrawn) and time.monotonic() < end:
            time.sleep(0.05)

    def _set_available(self, available: bool) -> None:
        changes = [catalog_pb2.Availability(item_id=item, available=available) for item in self.withdrawn]
        request = catalog_pb2.SetAvailabilityRequest(changes=changes)
        answer = self._generator.call(_SET_AVAILABILITY, request.SerializeToString())
        response = catalog_pb2.SetAvailabilityResponse.FromString(answer)
        refused = [status.message for status in response.statuses if status.code]
        if refused:
            raise BenchmarkError(f"the availability of an item was not changed: {refused[0]}")

    def step(self, check: Callable[[], None]) -> None:
        """Runs one check; a call that fails counts, for the service may be overloaded on purpose."""
        try:
            check()
        except CallFailed:
            self._failed += 1


def exact_neighbors(bundle: Path, withdrawn: set[str]) -> list[tuple[bytes, set[str]]]:
    """Returns requests for similar items, and the page that an exact index answers each of them with.

    The service proposes the items whose vectors have the largest inner product with the direction of the seed's, and
    the neighbours of the seed by the bundle's table, and orders them by their cosine. The index may miss some of the
    former: these are what a page lacks.
    """
    ids = list(titles_of(bundle))
    vectors = np.load(bundle / "vectors.npy", mmap_mode="r")
    neighbors = np.load(bundle / "neighbors.npy", mmap_mode="r")
    # An item that users of the seed rather leave is no neighbour of it.
    neighbors = np.where(np.load(bundle / "neighbor_scores.npy", mmap_mode="r") > 0, neighbors, -1)
    lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    count = int(manifest.get("candidates") or manifest.get("configuration", {}).get("candidates") or 0)
    count = max(count or _DEFAULT_CANDIDATES, RECALL_AT)
    hidden = np.isin(np.array(ids), list(withdrawn))
    seeds = np.random.default_rng(0).choice(len(ids), min(_SEEDS, len(ids)), replace=False)
    return [_page(seed, ids, vectors, neighbors, lengths, hidden, count) for seed in seeds.tolist()]


def _page(
    seed: int,
    ids: Sequence[str],
    vectors: npt.NDArray[np.float32],
    neighbors: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.float32],
    hidden: npt.NDArray[np.bool_],
    count: int,
) -> tuple[bytes, set[str]]:
    """Returns the request for one seed, and its exact page."""
    products = (vectors @ (vectors[seed] / lengths[seed])).astype(np.float32)
    products[hidden] = -np.inf
    products[seed] = -np.inf
    best = np.argpartition(-products, min(count, len(ids)) - 1)[:count]
    near = neighbors[seed][neighbors[seed] >= 0]
    rows = np.unique(np.concatenate([best, near]))
    rows = rows[np.isfinite(products[rows])]
    page = rows[np.argsort(-products[rows] / lengths[rows], kind="stable")[:RECALL_AT]]
    options = ranking_pb2.RankingOptions(page_size=RECALL_AT)
    request = ranking_pb2.SimilarItemsRequest(options=options, seed_item_ids=[ids[seed]])
    expected: set[str] = {str(ids[row]) for row in page.tolist()}
    return request.SerializeToString(), expected


def _options(user: str, page_size: int) -> ranking_pb2.RankingOptions:
    return ranking_pb2.RankingOptions(subject=common_pb2.Subject(user_id=user), page_size=page_size)


def _overlap(expected: list[str], slate: list[str]) -> float:
    return len(set(expected) & set(slate)) / max(len(expected), 1)


def main() -> None:
    """Checks until the input says stop, or ends."""
    spec = json.loads(sys.stdin.readline())
    with Generator(spec["target"], _CONNECTIONS, os.environ.get("PENCHANT_TOKEN", "")) as generator:
        prober = Prober(generator, spec)
        try:
            prober.prepare()
            print(json.dumps({"withdrawn": prober.withdrawn}), flush=True)
            checks = prober.steps()
            while not select.select([sys.stdin], [], [], spec["every_s"])[0]:
                prober.step(next(checks))
        finally:
            prober.restore()
        print(json.dumps(prober.figures()), flush=True)


if __name__ == "__main__":
    main()
