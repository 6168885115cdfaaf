"""Tables of the quality and the cost of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS
from benchmarks.reports import markdown

_FASTER = ("seconds_to_goal", "seconds_to_its_best")


def quality() -> str:
    """Returns the tables of model and baselines under each protocol."""
    return "\n".join(map(_quality, sorted(RESULTS.glob("quality-*.json"))))


def headline() -> str:
    """Returns the one table of quality that the README shows."""
    return _quality(RESULTS / "quality-movielens-1m-sasrec.json")


def _quality(path: Path) -> str:
    result = markdown.read(path)
    rows = [
        [name, *(f"{row[metric]:.4f}" for metric in ("hit@10", "ndcg@10")), _paired(result, name)]
        for name, row in result["baselines"].items()
    ]
    metrics = [markdown.interval(result["metrics"][metric]) for metric in ("hit@10", "ndcg@10")]
    rows.append(["**penchant**", *metrics, ""])
    sizes = f"{result['users']:,} users, {result['items']:,} items; full ranking, seen items masked"
    table = markdown.table(["", "hit@10", "ndcg@10", "penchant's ndcg@10 is higher by"], rows)
    return f"{result['title']} ({sizes})\n\n{table}{markdown.source(path, result)}"


def impressions() -> str:
    """Returns the table of the probabilities of actions on the impressions of a test."""
    path = RESULTS / "impressions-kuairand.json"
    result = markdown.read(path)
    names = {"auc": "auc", "slate_gauc": "gauc, one slate", "gauc": "gauc, live", "log_loss": "log loss", "ece": "ece"}
    rows = []
    for action, count in result["actions"].items():
        keys = [f"{action}/{name}" for name in names]
        rows.append([f"**{action}**, {count:,} times", *(markdown.interval(result["metrics"][key]) for key in keys)])
        for name, row in result["baselines"].items():
            # Means and intervals of baselines are recorded apart.
            borders = [result["baseline_intervals"][name][key] for key in keys]
            figures = [
                {"mean": row[key], "low": low, "high": high} for key, (low, high) in zip(keys, borders, strict=True)
            ]
            rows.append([name, *map(markdown.interval, figures)])
        # Only `bench impressions` compares user by user with LightGBM; `evaluate` does not.
        if "ahead" in result:
            rows.append(["penchant's minus lightgbm's", *(markdown.interval(result["ahead"][key]) for key in keys)])
    sizes = f"{result['title']}: {result['impressions']:,} impressions, {result['users']:,} users"
    return f"{sizes}\n\n" + markdown.table(["", *names.values()], rows) + markdown.source(path, result)


def training_speed() -> str:
    """Returns the tables of the trainers side by side, and of Penchant's share of the machine's arithmetic."""
    blocks = []
    for path in sorted(RESULTS.glob("training-speed*.json")):
        result = markdown.read(path)
        rows = []
        for name, trainer in result["trainers"].items():
            ratios = result["ratios"].get(name, {})
            figures = [f"{trainer[key]:,.0f}" for key in ("tokens_per_second", "targets_per_second", "seconds_to_goal")]
            # Empty for Penchant itself, and if Penchant did not reach a peer's best.
            faster = [f"{ratios[key]:.1f} times" if ratios.get(key) else "" for key in _FASTER]
            rows.append([name.replace("_equal", ", equal sizes"), *figures, f"{trainer['best']:.4f}", *faster])
        goal = f"s to validation ndcg@10 {result['goal']:.4f}"
        head = [
            "",
            "tokens/s",
            "targets/s",
            goal,
            f"best in {result['budget_seconds']:,.0f} s",
            "penchant is faster by",
            "and to its best by",
        ]
        blocks.append(f"{result['title']}\n\n{markdown.table(head, rows)}{markdown.source(path, result)}")
    for path in sorted(RESULTS.glob("training-arithmetic*.json")):
        result = markdown.read(path)
        products, share = result["product_gflops"], result["share"]
        rows = [[name, f"{products[name]:,.0f}", f"{share[name]:.1%}"] for name in products]
        head = ["matrix product", "Gflop/s", f"training at {result['achieved_gflops']:,.0f} Gflop/s is"]
        blocks.append(f"{result['title']}\n\n{markdown.table(head, rows)}{markdown.source(path, result)}")
    return "\n".join(blocks)


def cold() -> str:
    """Returns the table of cold items, placed by content alone."""
    blocks = []
    for path in sorted(RESULTS.glob("training-cold*.json")):
        result = markdown.read(path)
        names = ("recall@50", "recall@10", "ndcg@10")
        rows = [
            ["cold items", f"{result['targets']:,}", *(markdown.interval(result["metrics"][name]) for name in names)],
            [
                "trained items",
                f"{result['warm_targets']:,}",
                *(markdown.interval(result["warm"][name]) for name in names),
            ],
            ["a random order", "", f"{result['chance']:.4f}", "", ""],
        ]
        times = f"\ncold items are found {result['over_chance']:.1f} times as often as by chance.\n"
        table = markdown.table(["", "targets", *names], rows)
        blocks.append(f"{result['title']}\n\n{table}{times}{markdown.source(path, result)}")
    return "\n".join(blocks)


def growth() -> str:
    """Returns the tables of training at several sizes."""
    blocks = []
    for path in sorted(RESULTS.glob("training-growth*.json")):
        result = markdown.read(path)
        names = ("tokens_per_second", "peak_anonymous_mib", "prepare_cpu_seconds")
        rows = [
            [f"{int(events):,}", *(f"{figures[name]:,.0f}" for name in names)]
            for events, figures in result["sizes"].items()
        ]
        table = markdown.table(["events", "tokens/s", "peak memory, MiB", "CPU s until the first step"], rows)
        summary = f"\nthe slowest trains at {result['slowest_to_fastest']:.2f} of the fastest one's rate.\n"
        blocks.append(f"{result['title']}\n\n{table}{summary}{markdown.source(path, result)}")
    return "\n".join(blocks)


def catalogs() -> str:
    """Returns the table of training on catalogues of several sizes."""
    path = RESULTS / "training-catalogs.json"
    result = markdown.read(path)
    names = ("tokens_per_second", "tokens_per_cpu_second", "peak_anonymous_mib", "prepare_cpu_seconds")
    rows = [
        [
            f"{int(items):,}",
            *(f"{figures[name]:,.0f}" for name in names),
            f"{figures['neighbors']['cpu_seconds']:,.1f}",
            f"{figures['neighbors']['peak_mib']:,.0f}",
        ]
        for items, figures in result["catalogs"].items()
    ]
    head = ["items", "tokens/s", "per CPU s", "peak memory, MiB", "CPU s until the first step", "neighbours, CPU s"]
    ratios = result["slowest_to_fastest"], result["slowest_to_fastest_cpu"]
    summary = f"\nthe slowest trains at {ratios[0]:.2f} of the fastest one's rate, {ratios[1]:.2f} per CPU second.\n"
    table = markdown.table([*head, "MiB"], rows)
    return f"{result['title']}\n\n{table}{summary}{markdown.source(path, result)}"


def gpu() -> str:
    """Returns the tables of a GPU: searches against the speed of its memory, training and encoding against the CPU."""
    path = RESULTS / "gpu.json"
    result = markdown.read(path)
    trained, encoded = result["training"], result["encoding"]
    tokens = [[name, f"{rate:,.0f}"] for name, rate in trained["tokens_per_second"].items()]
    users = [[name, f"{rate:,.0f}"] for name, rate in encoded["users_per_second"].items()]
    tables = (
        _scans(result["retrieval"]),
        markdown.table(["training", "tokens/s"], tokens),
        markdown.table([f"encoding users of {encoded['events']} events", "users/s"], users),
        _trainings(trained),
    )
    counts, facts, models = result["answers"], result["gpu"], result["models"]
    summary = (
        f"{facts['name']}, copies {result['copy_gb_s']:,.0f} GB/s (read and written); "
        f"{result['retrieval'][0]['k']} rows of {result['retrieval'][0]['dim']} numbers are returned. "
        f"{counts['different']} of {counts['compared']:,} answers differ from the CPU's (control: {counts['control']} "
        f"of {counts['control_of']} spoiled ones were noticed). Quality is of relevance alone, on the test's targets. "
    )
    unproved = models.get("unproved")
    summary += f"ONNX Runtime on the GPU: unproved, {unproved}." if unproved else f"ONNX Runtime: {models['us']} us."
    return f"{summary}\n\n" + "\n".join(tables) + markdown.source(path, result)


def _scans(retrieval: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{scans['rows'] / 1e6:,.0f} million, {timing['form']}, {timing['batch']}",
            *(f"{timing[name]:.3f}" for name in ("scan_ms", "ms", "served_ms")),
            f"{timing['scan_of_copy']:.0%}",
            f"{timing['of_copy']:.0%}",
            f"{timing['queries_per_second']:,}",
        ]
        for scans in retrieval
        for timing in scans["timings"]
    ]
    head = ["items, what is scanned, queries at once", "one pass, ms", "search, ms", "from and to the CPU, ms"]
    return markdown.table([*head, "pass: of the memory's speed", "search: of it", "queries/s"], rows)


def _trainings(trained: dict[str, Any]) -> str:
    rows = [
        [
            f"{figures['batch_tokens']:,}",
            *(f"{figures[name]:,.0f}" for name in ("epochs", "seconds", "tokens_per_second")),
            *(f"{figures[name]:.4f}" for name in ("hit@10", "ndcg@10")),
            "" if figures["utilisation"] is None else f"{figures['utilisation']:.0%}",
        ]
        for figures in trained["quality"]
    ]
    head = [f"{trained['data']} to the end, events of a batch", "epochs", "s", "tokens/s", "hit@10", "ndcg@10"]
    return markdown.table([*head, "GPU at work"], rows)


def _paired(result: dict[str, Any], name: str) -> str:
    # The interval of the difference, user by user: two intervals that overlap may still differ significantly.
    difference = result.get("paired", {}).get(name, {}).get("ndcg@10")
    return markdown.interval(difference) if difference else ""
