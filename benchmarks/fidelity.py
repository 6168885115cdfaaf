"""Compares the answers of the service with those that evaluation measured: the same users, the same targets.

Each user's profile is made from the events before the target by the ordinary rebuild, the service is started as a
user would start it, and the rank of the target on the page is compared with the rank that evaluation gives it.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.report import facts
from benchmarks.service import running
from features.tables.dataset import write_dataset
from penchant.client import Client
from serving.projection.rebuild import rebuild
from training.data.interactions import Interactions, read_interactions
from training.data.split import Targets, TestProtocol, held_out
from training.evaluation.events import ModelScorer, rank_all
from training.metrics import ndcg
from training.run import LoadedRun, load_run

PAGE = 10
CALLERS = 4
TIMEOUT_S = 10.0
NOWHERE = 1 << 30


def fidelity(
    run: Path, bundle: Path, *, protocol: str = "leave-one-out", users: int = 1000, seed: int = 1
) -> dict[str, Any]:
    """Measures NDCG@10 offline and through a running service.

    Args:
        run: Directory of the run.
        bundle: The bundle that was exported from it.
        protocol: The events that the run held out.
        users: Number of users, one target each.
        seed: Seed of their choice.

    Returns:
        `ndcg@10` {`evaluate`, `recommend`, `difference`}, `same_page` (share of users whose pages are equal item by
        item), `rungs`, `degraded`, and the circumstances.
    """
    loaded = load_run(run)
    data = read_interactions(loaded.dataset, loaded.vocabulary, loaded.config)
    targets = _some(held_out(data, loaded.config, cast(TestProtocol, protocol)), users, np.random.default_rng(seed))
    offline, shown = _offline(loaded, data, targets)
    pages, rungs, degraded = _online(loaded, data, targets, bundle)
    online = np.array([_place(page, row) for page, row in zip(pages, targets.rows(data).tolist(), strict=True)])
    evaluated, recommended = (float(ndcg(ranks, PAGE).mean()) for ranks in (offline, online))
    return {
        "protocol": protocol,
        "people": len(targets),
        "ndcg@10": {
            "evaluate": round(evaluated, 6),
            "recommend": round(recommended, 6),
            "difference": round(recommended - evaluated, 6),
        },
        "same_page": float(np.mean([page == line for page, line in zip(pages, shown, strict=True)])),
        "rungs": rungs,
        "degraded": degraded,
        **facts(),
    }


def _some(targets: Targets, users: int, draw: np.random.Generator) -> Targets:
    """Returns one target each of some users."""
    order = draw.permutation(len(targets))
    _, first = np.unique(targets.users[order], return_index=True)
    chosen = order[np.sort(first)[:users]]
    return targets.take(np.sort(chosen))


def _offline(run: LoadedRun, data: Interactions, targets: Targets) -> tuple[npt.NDArray[np.int64], list[list[int]]]:
    """Returns the ranks of the targets, and the pages as rows, best first, as `penchant evaluate` makes them."""
    with torch.inference_mode():
        [ranked] = rank_all([ModelScorer(run, data, targets)], [], data, targets, run.config.repeats)
    return ranked.ranks, [line[line >= 0].tolist() for line in ranked.top]


def _online(
    run: LoadedRun, data: Interactions, targets: Targets, bundle: Path
) -> tuple[list[list[int]], dict[str, int], int]:
    """Returns the pages as rows, best first, as the service makes them; answers by rung; degraded answers."""
    user_ids = [data.users[user] for user in targets.users.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        write_dataset(Path(folder) / "data", _before(run, data, targets), run.dataset.items, name="histories")
        with running(bundle, "--state-dir", str(state)) as service:
            rebuild(Path(folder) / "data", service["redis"], service["events_redis"])
            with Client(service["listen"], timeout_s=TIMEOUT_S) as client, ThreadPoolExecutor(CALLERS) as callers:
                slates = list(callers.map(lambda user_id: client.recommend(user_id=user_id, page_size=PAGE), user_ids))
    rungs: dict[str, int] = {}
    for slate in slates:
        rungs[str(slate.rung)] = rungs.get(str(slate.rung), 0) + 1
    pages = [run.vocabulary.rows([item.item_id for item in slate.items]).tolist() for slate in slates]
    return pages, rungs, sum(bool(slate.degraded) for slate in slates)


def _before(run: LoadedRun, data: Interactions, targets: Targets) -> pa.Table:
    """Returns the events before each target, of the chosen users only."""
    starts = data.offsets[targets.users]
    keep = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, targets.positions, strict=True)])
    # A run with cold items has left their events out: its own numbers are not those of the data set.
    rows = keep if data.source_rows is None else data.source_rows[keep]
    return run.dataset.events.take(pa.array(rows))


def _place(page: list[int], row: int) -> int:
    return page.index(row) if row in page else NOWHERE
