"""Measures how often the survey of a data set finds the order that is there, and none in shuffled copies.

The thresholds of `training.data.survey` were set on a few data sets: here they judge other seeds, and other users of
any data sets, each drawn as a sample of the users, as it lies and with each user's events in random order.

    python -m benchmarks.survey DATA DATA ... --seeds 20 --users 2000
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import facts
from cli.options import print_result, use_cores
from features.tables.dataset import open_dataset
from training.config import load_config
from training.data.interactions import Interactions, item_vocabulary, read_interactions
from training.data.survey import evidence_of_order, repeated_share


def order_by_seed(data: Path, seeds: int, users: int) -> dict[str, Any]:
    """Judges samples of one data set.

    Args:
        data: Its directory.
        seeds: Number of samples.
        users: Users of a sample, drawn at random; all of them if there are fewer.

    Returns:
        `true` and `shuffled` {verdict: number of samples}; `true_t` and `shuffled_t`, the larger t of each sample;
        `effects` of the true ones, `repeated`.
    """
    dataset = open_dataset(data)
    _, vocabulary = item_vocabulary(dataset)
    events = read_interactions(
        dataset, vocabulary, load_config(None, {"repeats": True, "ordered": dataset.stream.has_order})
    )
    names = [str(name) for name in vocabulary.names.to_pylist()]
    verdicts: dict[str, Counter[str]] = {"true": Counter(), "shuffled": Counter()}
    largest: dict[str, list[float]] = {"true": [], "shuffled": []}
    effects, repeated = [], []
    for seed in range(seeds):
        rng = np.random.default_rng([seed, 7])
        sample = _some_users(events, rng, users)
        for name, copy in (("true", sample), ("shuffled", _shuffled(sample, rng))):
            evidence = evidence_of_order(copy, names, seed)
            verdicts[name][evidence.order] += 1
            largest[name].append(round(max(evidence.likeness, evidence.transitions), 3))
            if name == "true":
                effects.append(round(evidence.effect, 4))
        repeated.append(round(repeated_share(sample), 4))
    return {
        "data": dataset.info["name"],
        "users": min(users, len(events.users)),
        **{name: dict(counts) for name, counts in verdicts.items()},
        **{f"{name}_t": values for name, values in largest.items()},
        "effects": effects,
        "repeated": repeated,
    }


def _some_users(data: Interactions, rng: np.random.Generator, users: int) -> Interactions:
    counts = np.diff(data.offsets)
    drawn = rng.permutation(counts.size)[:users]
    ends = np.zeros_like(counts)
    ends[drawn] = counts[drawn]
    return data.sample(ends, int(ends.sum()), seed=0)


def _shuffled(data: Interactions, rng: np.random.Generator) -> Interactions:
    order = np.lexsort((rng.random(data.rows.size), data.owner()))
    return dataclasses.replace(
        data, rows=data.rows[order], values=data.values[order], types=data.types[order], target=data.target[order]
    )


def main() -> None:
    """Prints one JSON object for all the data sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="data sets whose order is known to be real")
    parser.add_argument("--seeds", type=int, default=20, help="samples of each (20)")
    parser.add_argument("--users", type=int, default=2000, help="users of a sample (2000)")
    arguments = parser.parse_args()
    use_cores()
    samples = [order_by_seed(data, arguments.seeds, arguments.users) for data in arguments.data]
    print_result({"samples": samples, **facts()})


if __name__ == "__main__":
    main()
