"""Writes the tables of the docs, between `<!-- results: NAME -->` and `<!-- end -->`.

Figures come from `benchmarks/results/*.json`, settings from the classes that read them.

python -m benchmarks.tables          writes them
python -m benchmarks.tables --check  says whether they are what the results say; status 1 if not
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import SecretStr

from benchmarks.report import RESULTS
from serving.observability.exposition import markdown

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

ROOT = RESULTS.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_WORDS = {int: "integer", float: "number", bool: "true or false", Path: "path", str: "text", SecretStr: "secret"}
_FASTER = ("seconds_to_goal", "seconds_to_its_best")
_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Writes or checks every page; the exit status."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fresh = _BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}{block[3]}", text)
        if fresh != text:
            stale.append(page.relative_to(ROOT))
            if "--check" not in arguments:
                page.write_text(fresh, encoding="utf-8")
    if stale and "--check" in arguments:
        pages = ", ".join(map(str, stale))
        print(f"{pages}: not what benchmarks/results says; run python -m benchmarks.tables", file=sys.stderr)
        return 1
    return 0


def quality() -> str:
    """Model and baselines under each protocol."""
    blocks = []
    for path in sorted(RESULTS.glob("quality-*.json")):
        result = _read(path)
        rows = [
            [name, *(f"{row[metric]:.4f}" for metric in ("hit@10", "ndcg@10")), _paired(result, name)]
            for name, row in result["baselines"].items()
        ]
        ours = [_interval(result["metrics"][metric]) for metric in ("hit@10", "ndcg@10")]
        rows.append(["**penchant**", *ours, ""])
        sizes = f"{result['users']:,} people, {result['items']:,} items; full ranking, seen items masked"
        table = _table(["", "hit@10", "ndcg@10", "penchant's ndcg@10 is higher by"], rows)
        blocks.append(f"{result['title']} ({sizes})\n\n{table}{_source(path, result)}")
    return "\n".join(blocks)


def impressions() -> str:
    """Probabilities of actions on the impressions of a test, beside plain rates."""
    path = RESULTS / "impressions-kuairand.json"
    result = _read(path)
    names = {"auc": "auc", "slate_gauc": "gauc, one slate", "gauc": "gauc, live", "log_loss": "log loss", "ece": "ece"}
    rows = []
    for action, count in result["actions"].items():
        keys = [f"{action}/{name}" for name in names]
        rows.append([f"**{action}**, {count:,} times", *(_interval(result["metrics"][key]) for key in keys)])
        for name, row in result["baselines"].items():
            borders = [result["baseline_intervals"][name][key] for key in keys]
            figures = [
                {"mean": row[key], "low": low, "high": high} for key, (low, high) in zip(keys, borders, strict=True)
            ]
            rows.append([name, *map(_interval, figures)])
        if "ahead" in result:
            rows.append(["ours minus lightgbm's", *(_interval(result["ahead"][key]) for key in keys)])
    sizes = f"{result['title']}: {result['impressions']:,} impressions, {result['users']:,} people"
    return f"{sizes}\n\n" + _table(["", *names.values()], rows) + _source(path, result)


def latency() -> str:
    """Percentiles at half of the highest rate."""
    path = RESULTS / "latency.json"
    result = _read(path)
    times = result["latency_ms"]
    rows = [[f"{result['rate']:,.0f}", *(f"{times[name]:.2f}" for name in ("p50", "p90", "p99", "p99.9"))]]
    rungs = ", ".join(f"{rung} {share:.2%}" for rung, share in result["rungs"].items())
    notes = (
        f"\n{result['requests']:,} requests; errors {sum(result['errors'].values())}, degraded "
        f"{sum(result['degraded'].values())}; rungs: {rungs}; highest rate {result['highest_rate']:,.0f} a second.\n"
    )
    return _table(["requests/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms"], rows) + notes + _source(path, result)


def stages() -> str:
    """Microseconds per stage, beside the floor."""
    path = RESULTS / "stages.json"
    result = _read(path)
    rows = [[name, f"{microseconds:,.0f}"] for name, microseconds in result["stages_us"].items()]
    rows.append(["**the whole request**", f"{result['pipeline_us']:,.0f}"])
    rows += [[f"floor: {name}", f"{microseconds:,.0f}"] for name, microseconds in result["floor_stages_us"].items()]
    rows.append(["**the floor**", f"{result['floor_us']:,.0f}"])
    ratio = f"\nratio to floor {result['ratio_to_floor']:.2f}, policy {result['policy_us']:,.0f} µs.\n"
    return _table(["", "median µs"], rows) + ratio + _source(path, result)


def training_speed() -> str:
    """Trainers side by side, and what Penchant's arithmetic rate is of the machine's."""
    blocks = []
    for path in sorted(RESULTS.glob("training-speed*.json")):
        result = _read(path)
        rows = []
        for name, one in result["trainers"].items():
            ratios = result["ratios"].get(name, {})
            figures = [f"{one[key]:,.0f}" for key in ("tokens_per_second", "targets_per_second", "seconds_to_goal")]
            faster = [f"{ratios[key]:.1f} times" if ratios.get(key) else "" for key in _FASTER]
            rows.append([name.replace("_equal", ", equal sizes"), *figures, f"{one['best']:.4f}", *faster])
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
        blocks.append(f"{result['title']}\n\n{_table(head, rows)}{_source(path, result)}")
    for path in sorted(RESULTS.glob("training-arithmetic*.json")):
        result = _read(path)
        products, share = result["product_gflops"], result["share"]
        rows = [[name, f"{products[name]:,.0f}", f"{share[name]:.1%}"] for name in products]
        head = ["matrix product", "Gflop/s", f"training at {result['achieved_gflops']:,.0f} Gflop/s is"]
        blocks.append(f"{result['title']}\n\n{_table(head, rows)}{_source(path, result)}")
    return "\n".join(blocks)


def cold() -> str:
    """Hidden items, placed by content alone."""
    blocks = []
    for path in sorted(RESULTS.glob("training-cold*.json")):
        result = _read(path)
        names = ("recall@50", "recall@10", "ndcg@10")
        rows = [
            ["hidden items", f"{result['targets']:,}", *(_interval(result["metrics"][name]) for name in names)],
            ["trained items", f"{result['warm_targets']:,}", *(_interval(result["warm"][name]) for name in names)],
            ["a random order", "", f"{result['chance']:.4f}", "", ""],
        ]
        times = f"\nhidden items are found {result['over_chance']:.1f} times as often as by chance.\n"
        table = _table(["", "targets", *names], rows)
        blocks.append(f"{result['title']}\n\n{table}{times}{_source(path, result)}")
    return "\n".join(blocks)


def growth() -> str:
    """Training at several sizes."""
    blocks = []
    for path in sorted(RESULTS.glob("training-growth*.json")):
        result = _read(path)
        names = ("tokens_per_second", "peak_anonymous_mib", "prepare_cpu_seconds")
        rows = [
            [f"{int(events):,}", *(f"{one[name]:,.0f}" for name in names)] for events, one in result["sizes"].items()
        ]
        table = _table(["events", "tokens/s", "peak memory, MiB", "CPU s until the first step"], rows)
        said = f"\nthe slowest trains at {result['slowest_to_fastest']:.2f} of the fastest one's rate.\n"
        blocks.append(f"{result['title']}\n\n{table}{said}{_source(path, result)}")
    return "\n".join(blocks)


def redis_trouble() -> str:
    """What callers saw of Redis in trouble, of nodes of a cluster in trouble, and of calls that end early."""
    path = RESULTS / "redis-trouble.json"
    result = _read(path)
    rows = [
        [
            f"{one['redis']}: {one['trouble']}",
            *_in_time(one),
            *(_saw(one[name]) for name in ("during", "others")),
            one["event"],
            f"{one['personal_again_s']:.2f}",
        ]
        for one in result["troubles"]
    ]
    head = [
        "Redis of the",
        "answers",
        "late",
        "slowest, s",
        "that person saw",
        "others saw",
        "an event",
        "again after s",
    ]
    tables = [_table(head, rows)]
    rows = [
        [one["trouble"], *_in_time(one), *(f"{one[name]:.2f}" for name in ("personal_again_s", "writes_s"))]
        for one in result["cluster"]
    ]
    head = ["a node of a cluster", "answers", "late", "slowest, s", "personal again after s", "events taken after s"]
    tables.append(_table(head, rows))
    columns = (("ended early", "given up"), ("personal", "own"), ("foreign",), ("seconds",))
    rows = [
        [one["name"], *(f"{next(one[name] for name in names if name in one):,.0f}" for names in columns)]
        for one in result["canaries"]
    ]
    head = ["calls that end early", "ended early", "answers of their own", "answers of another's", "seconds"]
    tables.append(_table(head, rows))
    rows = [
        [what, f"{one['unsafe_s']:.0f}", f"{one['acknowledged_while_unsafe']}", f"{seconds:.2f}"]
        for one in result.get("unsafe", ())
        for what, seconds in one["acknowledged_again_s"].items()
    ]
    if rows:
        head = ["the events Redis", "for s", "acknowledged meanwhile", "acknowledged again after s"]
        tables.append(_table(head, rows))
    return "\n".join(tables) + _source(path, result)


def log_size() -> str:
    """Writes what an event and a slate take, and that the memory of a log that is trimmed levels off."""
    path = RESULTS / "log-size.json"
    result = _read(path)
    names = ("payload_bytes", "redis_bytes", "file_bytes", "parquet_bytes")
    rows = [[f"{kind}", *(f"{result[kind][name]:,}" for name in names)] for kind in ("event", "slate")]
    head = ["bytes of", "its JSON", "memory", "the append-only file", "Parquet, of made-up values"]
    halves = [result[name]["second_half_bytes"] / result[name]["first_half_bytes"] for name in ("level", "control")]
    said = (
        f"\nThe memory of a log that is trimmed while it is written to, second half of the time over the first: "
        f"{halves[0]:.2f}; without trimming, the control: {halves[1]:.2f}.\n"
    )
    return _table(head, rows) + said + _source(path, result)


def durability() -> str:
    """What was lost and what was there twice, and what a control that must fail lost or doubled."""
    kills, power, replies = (RESULTS / f"durability-{name}.json" for name in ("kills", "power", "replies"))
    killed, dark, unheard = map(_read, (kills, power, replies))
    control = dark["control"]
    rows = [
        [
            f"{sum(killed['kills'].values())} kills at {killed['rate']:.0f} events/s",
            f"{killed['acknowledged']:,}",
            *(f"{sum(killed[what].values()):,}" for what in ("lost", "doubled")),
            "",
        ],
        [
            f"{len(dark['images'])} losses of power",
            f"{dark['acknowledged']:,}",
            *(f"{dark[what]:,}" for what in ("lost", "doubled")),
            f"`appendfsync {control['appendfsync']}` lost {control['lost']:,} of {control['acknowledged']:,}",
        ],
        [
            "replies that were lost",
            f"{unheard['events']:,}",
            *(f"{sum(unheard[what].values()):,}" for what in ("missing", "doubled")),
            f"a bare XADD, sent again, doubled {unheard['control']['doubled']} of {unheard['control']['xadd']}",
        ],
    ]
    table = _table(["", "acknowledged", "lost", "doubled", "control"], rows)
    return table + "".join(_source(path, _read(path)) for path in (kills, power, replies))


def no_skew() -> str:
    """How much of how many lives was compared, and what differed."""
    path = RESULTS / "no-skew.json"
    result = _read(path)
    every = "lives events late patched before_patch put early undone compactions prefixes slates differences"
    names = [name for name in every.split() if name in result]
    return _table(names, [[f"{result[name]:,}" for name in names]]) + _source(path, result)


def freshness() -> str:
    """Read-your-writes, and how soon an event is seen, in bare round trips of the same run."""
    pairs, path = RESULTS / "read-your-writes.json", RESULTS / "freshness.json"
    many, result = _read(pairs), _read(path)
    said = f"{many['pairs']:,} pairs, the write and the read on different workers; faults: {len(many['faults'])}.\n"
    what = {
        "stores": "the stores alone",
        "service": "every worker sees it",
        "answer": "another worker's answer has come",
    }
    rows = [
        [
            told,
            *(f"{result['latency_ms'][name][at]:.2f}" for at in ("p50", "p99")),
            *(f"{result['ratio'][floor][name][at]:.1f}" for floor in ("get", "durable_xadd") for at in ("p50", "p99")),
        ]
        for name, told in what.items()
    ]
    head = ["until", "p50, ms", "p99, ms", "in GETs: p50", "p99", "in durable XADDs: p50", "p99"]
    return f"{said}\n{_table(head, rows)}{_source(pairs, many)}{_source(path, result)}"


def sizing() -> str:
    """Writes what to provide for, by item, user, event, slate and request."""
    path = RESULTS / "sizing.json"
    if not path.exists():
        return "Not measured yet for this version: `make bench-sizing` does it.\n"
    result = _read(path)
    large = max(result["bundles"], key=lambda bundle: bundle["items"])
    per_item, rss = result["worker_bytes_per_item"], result["rss"]
    day = 86_400 / 2**30
    rows = [
        ["memory of a worker, an item", f"{per_item:,} bytes" if per_item else ""],
        [f"memory of a worker, {large['items']:,} items", f"{large['worker_rss'] / 2**20:,.0f} MiB"],
        *([f"memory of the {role}", f"{rss[role] / 2**20:,.0f} MiB"] for role in rss if not role.startswith("worker")),
        [f"disk of a bundle, {large['items']:,} items", f"{large['bundle_bytes'] / 2**20:,.1f} MiB"],
        [f"profiles Redis, a user of {result['events']} events", f"{result['user_bytes']:,.0f} bytes"],
        ["events Redis, an event", f"{result['event_bytes']:,.0f} bytes"],
        [f"events Redis, a slate of {result['page']}", f"{result['slate_bytes']:,.0f} bytes"],
        ["append-only file, an event", f"{result['event_disk']:,.0f} bytes"],
        ["append-only file, a slate", f"{result['slate_disk']:,.0f} bytes"],
        ["Parquet, an event", f"{result['event_parquet']:,.0f} bytes"],
        ["Parquet, a slate", f"{result['slate_parquet']:,.0f} bytes"],
        ["events Redis, an hour of 100 slates a second", f"{result['slate_bytes'] * 100 * 3600 / 2**30:,.2f} GiB"],
        ["Parquet, a day of 100 slates a second", f"{result['slate_parquet'] * 100 * day:,.2f} GiB"],
        ["requests in a second of one core", f"{result['requests_per_core_second']:,}"],
        ["events in a second of one core", f"{result['events_per_core_second']:,}"],
        [f"start, {large['items']:,} items", f"{large['start_s']:.1f} s"],
        ["rebuild of profiles, events a second", f"{result['rebuild_events_per_second']:,}"],
    ]
    return _table(["", "measured"], [row for row in rows if row[1]]) + _source(path, result)


def profiles() -> str:
    """What people cost: bytes, reads beside a GET, ingest beside the server's own rate."""
    path = RESULTS / "profiles.json"
    result = _read(path)
    reads = [(f"{result[name]['people']:,} people, folded", result[name]) for name in ("few", "many")]
    reads.append((f"{result['tail']['events']} events to fold at the read", result["tail"]))
    rows = [
        [told, *(f"{one[name]:.0f}" for name in ("read_us", "get_us")), f"{one['ratio']:.1f}"] for told, one in reads
    ]
    said = (
        f"{result['people']:,} people of {result['events']} events: {result['bytes_per_person']:,.0f} bytes each "
        f"(the limit: {result['limit_bytes_per_person']:,.0f}); folding {result['tail']['events']} events alone takes "
        f"{result['tail']['fold_us']:.0f} us.\n"
    )
    rates = [
        [name, *(f"{one[f'{whose}_per_core_second']:,}" for whose in ("events", "bare")), f"{one['ratio']:.1f}"]
        for name, one in result["ingest"].items()
    ]
    tables = (
        _table(["a read", "us", "a GET of as many bytes, us", "ratio"], rows),
        _table(["a core's second of ingest into the", "events", "the bare command", "ratio"], rates),
    )
    return f"{said}\n" + "\n".join(tables) + _source(path, result)


def gpu() -> str:
    """Searches of a GPU beside the speed of its memory, and training and encoding beside the CPU."""
    path = RESULTS / "gpu.json"
    result = _read(path)
    rows = [
        [
            f"{one['rows'] / 1e6:,.0f} million, {line['form']}, {line['batch']}",
            *(f"{line[name]:.3f}" for name in ("scan_ms", "ms", "served_ms")),
            f"{line['scan_of_copy']:.0%}",
            f"{line['of_copy']:.0%}",
            f"{line['queries_per_second']:,}",
        ]
        for one in result["retrieval"]
        for line in one["timings"]
    ]
    head = ["items, what is scanned, queries at once", "one pass, ms", "search, ms", "from and to the CPU, ms"]
    head += ["pass: of the memory's speed", "search: of it", "queries/s"]
    tables = [_table(head, rows)]
    trained, encoded = result["training"], result["encoding"]
    rows = [[name, f"{rate:,.0f}"] for name, rate in trained["tokens_per_second"].items()]
    tables.append(_table(["training", "tokens/s"], rows))
    rows = [[name, f"{rate:,.0f}"] for name, rate in encoded["users_per_second"].items()]
    tables.append(_table([f"encoding users of {encoded['events']} events", "users/s"], rows))
    rows = [
        [
            f"{one['batch_tokens']:,}",
            *(f"{one[name]:,.0f}" for name in ("epochs", "seconds", "tokens_per_second")),
            *(f"{one[name]:.4f}" for name in ("hit@10", "ndcg@10")),
            "" if one["utilisation"] is None else f"{one['utilisation']:.0%}",
        ]
        for one in trained["quality"]
    ]
    head = [f"{trained['data']} to the end, events of a batch", "epochs", "s", "tokens/s", "hit@10", "ndcg@10"]
    tables.append(_table([*head, "GPU at work"], rows))
    found, facts = result["answers"], result["gpu"]
    models = result["models"].get("unproved")
    said = (
        f"{facts['name']}, copies {result['copy_gb_s']:,.0f} GB/s (read and written); "
        f"{result['retrieval'][0]['k']} rows of {result['retrieval'][0]['dim']} numbers are returned. "
        f"{found['different']} of {found['compared']:,} answers differ from the CPU's (control: {found['control']} of "
        f"{found['control_of']} spoiled ones were noticed). Quality is of relevance alone, on the test's targets. "
    )
    said += f"ONNX Runtime on the GPU: unproved, {models}." if models else f"ONNX Runtime: {result['models']['us']} us."
    return f"{said}\n\n" + "\n".join(tables) + _source(path, result)


def _in_time(one: dict[str, Any]) -> list[str]:
    return [f"{one['answers']:,}", f"{one['late']:,}", f"{one['slowest_s']:.2f}"]


def _saw(seen: str) -> str:
    rung, *parts = seen.split()
    return ", ".join([rung.removeprefix("RUNG_").lower(), *(part.removeprefix("PART_") for part in parts)])


def serve_settings() -> str:
    """Every setting of `penchant serve`."""
    from serving.config import PREFIX, ServeConfig

    return _settings(ServeConfig, PREFIX)


def train_settings() -> str:
    """Every setting of `penchant train`."""
    from training.config import PREFIX, TrainConfig

    return _settings(TrainConfig, PREFIX)


def _settings(config: type[BaseModel], prefix: str) -> str:
    fields = config.model_fields.items()
    rows = [
        [f"`{name}`", f"`{prefix}{name.upper()}`", _kind(field), _default(field), _escaped(field.description or "")]
        for name, field in fields
    ]
    return _table(["setting", "variable", "value", "default", "meaning"], rows, align="---")


def _kind(field: FieldInfo) -> str:
    """The values that a setting takes, with their bounds."""
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [
        f"{sign} {getattr(one, name):g}"
        for one in field.metadata
        for name, sign in bounds.items()
        if hasattr(one, name)
    ]
    return _escaped(" ".join([_named(field.annotation), ", ".join(limits)]).strip())


def _named(annotation: Any) -> str:
    """A type in the words of the page."""
    inside = [part for part in get_args(annotation) if part not in (type(None), ...)]
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{choice}`" for choice in inside)
    if get_origin(annotation) is Annotated:
        return f"{_named(inside[0])} > 0"
    if get_origin(annotation) in (tuple, list):
        return f"list of {_named(inside[0])}"
    if get_origin(annotation) is dict:
        return f"mapping of {_named(inside[0])} to {_named(inside[1])}"
    if inside:
        return _named(inside[0])
    return _WORDS.get(annotation) or str(annotation.__name__).lower()


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
    return f"`{_escaped(json.dumps(plain))}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


TABLES: dict[str, Callable[[], str]] = {
    "quality": quality,
    "impressions": impressions,
    "latency": latency,
    "stages": stages,
    "training-speed": training_speed,
    "training-cold": cold,
    "training-growth": growth,
    "log-size": log_size,
    "redis-trouble": redis_trouble,
    "durability": durability,
    "no-skew": no_skew,
    "freshness": freshness,
    "profiles": profiles,
    "serve-settings": serve_settings,
    "train-settings": train_settings,
    "metrics": markdown,
    "gpu": gpu,
    "sizing": sizing,
}


def _paired(result: dict[str, Any], name: str) -> str:
    difference = result.get("paired", {}).get(name, {}).get("ndcg@10")
    return _interval(difference) if difference else ""


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    line = ["---", *[align] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, line, *rows))


def _source(path: Path, result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"\n<sub>{path.name}: `{result['command']}`, commit {result['commit']}, "
        f"{machine['processor']}, {machine['cores']} cores</sub>\n"
    )


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
