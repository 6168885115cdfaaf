"""Tables of the service: latency, outages, durability, freshness, sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.report import RESULTS
from benchmarks.reports import markdown


def latency() -> str:
    """Returns the table of percentiles at half of the highest rate."""
    path = RESULTS / "latency.json"
    result = markdown.read(path)
    times = result["latency_ms"]
    rows = [[f"{result['rate']:,.0f}", *(f"{times[name]:.2f}" for name in ("p50", "p90", "p99", "p99.9"))]]
    rungs = ", ".join(f"{rung} {share:.2%}" for rung, share in result["rungs"].items())
    notes = (
        f"\n{result['requests']:,} requests; errors {sum(result['errors'].values())}, degraded "
        f"{sum(result['degraded'].values())}; rungs: {rungs}; highest rate {result['highest_rate']:,.0f} a second.\n"
    )
    table = markdown.table(["requests/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms"], rows)
    return table + notes + markdown.source(path, result)


def stages() -> str:
    """Returns the table of microseconds per stage, and of the floor."""
    path = RESULTS / "stages.json"
    result = markdown.read(path)
    rows = [[name, f"{microseconds:,.0f}"] for name, microseconds in result["stages_us"].items()]
    rows.append(["**the whole request**", f"{result['pipeline_us']:,.0f}"])
    rows += [[f"floor: {name}", f"{microseconds:,.0f}"] for name, microseconds in result["floor_stages_us"].items()]
    rows.append(["**the floor**", f"{result['floor_us']:,.0f}"])
    ratio = f"\nratio to floor {result['ratio_to_floor']:.2f}, policy {result['policy_us']:,.0f} µs.\n"
    return markdown.table(["", "median µs"], rows) + ratio + markdown.source(path, result)


def redis_trouble() -> str:
    """Returns the tables of Redis in trouble, of nodes of a cluster in trouble, and of calls that end early."""
    path = RESULTS / "redis-trouble.json"
    result = markdown.read(path)
    tables = [_troubles(result["troubles"]), _cluster(result["cluster"]), _ended_early(result["canaries"])]
    if result.get("unsafe"):
        tables.append(_unsafe(result["unsafe"]))
    return "\n".join(tables) + markdown.source(path, result)


def _troubles(troubles: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{trouble['redis']}: {trouble['trouble']}",
            *_in_time(trouble),
            *(_rung_and_parts(trouble[name]) for name in ("during", "others")),
            trouble["event"],
            f"{trouble['personal_again_s']:.2f}",
        ]
        for trouble in troubles
    ]
    head = [
        "Redis of the",
        "answers",
        "late",
        "slowest, s",
        "that user's slates",
        "others'",
        "an event",
        "again after s",
    ]
    return markdown.table(head, rows)


def _cluster(troubles: list[dict[str, Any]]) -> str:
    rows = [
        [trouble["trouble"], *_in_time(trouble), *(f"{trouble[name]:.2f}" for name in ("personal_again_s", "writes_s"))]
        for trouble in troubles
    ]
    head = ["a node of a cluster", "answers", "late", "slowest, s", "personal again after s", "events taken after s"]
    return markdown.table(head, rows)


def _ended_early(trials: list[dict[str, Any]]) -> str:
    # Each column by the names that results of several versions have for it.
    columns = (("ended early", "given up"), ("personal", "own"), ("foreign",), ("seconds",))
    rows = [
        [trial["name"], *(f"{next(trial[name] for name in names if name in trial):,.0f}" for names in columns)]
        for trial in trials
    ]
    head = ["calls that end early", "ended early", "answers of their own", "answers of another's", "seconds"]
    return markdown.table(head, rows)


def _unsafe(troubles: list[dict[str, Any]]) -> str:
    rows = [
        [cause, f"{trouble['unsafe_s']:.0f}", f"{trouble['acknowledged_while_unsafe']}", f"{seconds:.2f}"]
        for trouble in troubles
        for cause, seconds in trouble["acknowledged_again_s"].items()
    ]
    head = ["the events Redis", "for s", "acknowledged meanwhile", "acknowledged again after s"]
    return markdown.table(head, rows)


def log_size() -> str:
    """Returns the table of the bytes of an event and a slate, and the growth of a log that is trimmed."""
    path = RESULTS / "log-size.json"
    result = markdown.read(path)
    names = ("payload_bytes", "redis_bytes", "file_bytes", "parquet_bytes")
    rows = [[f"{kind}", *(f"{result[kind][name]:,}" for name in names)] for kind in ("event", "slate")]
    head = ["bytes of", "its JSON", "memory", "the append-only file", "Parquet, of made-up values"]
    # A log that is trimmed must level off; the control, which is not, must show that the measure sees growth.
    halves = [result[name]["second_half_bytes"] / result[name]["first_half_bytes"] for name in ("level", "control")]
    summary = (
        f"\nThe memory of a log that is trimmed while it is written to, second half of the time over the first: "
        f"{halves[0]:.2f}; without trimming, the control: {halves[1]:.2f}.\n"
    )
    return markdown.table(head, rows) + summary + markdown.source(path, result)


def durability() -> str:
    """Returns the table of lost and doubled events, and of a control that must lose or double some."""
    kills, power, replies = (RESULTS / f"durability-{name}.json" for name in ("kills", "power", "replies"))
    killed, dark, unheard = map(markdown.read, (kills, power, replies))
    control = dark["control"]
    rows = [
        [
            f"{sum(killed['kills'].values())} kills at {killed['rate']:.0f} events/s",
            f"{killed['acknowledged']:,}",
            *(f"{sum(killed[fault].values()):,}" for fault in ("lost", "doubled")),
            "",
        ],
        [
            f"{len(dark['images'])} losses of power",
            f"{dark['acknowledged']:,}",
            *(f"{dark[fault]:,}" for fault in ("lost", "doubled")),
            f"`appendfsync {control['appendfsync']}` lost {control['lost']:,} of {control['acknowledged']:,}",
        ],
        [
            "replies that were lost",
            f"{unheard['events']:,}",
            *(f"{sum(unheard[fault].values()):,}" for fault in ("missing", "doubled")),
            f"a bare XADD, sent again, doubled {unheard['control']['doubled']} of {unheard['control']['xadd']}",
        ],
    ]
    table = markdown.table(["", "acknowledged", "lost", "doubled", "control"], rows)
    return table + "".join(markdown.source(path, markdown.read(path)) for path in (kills, power, replies))


def hosts() -> str:
    """Returns the table of several hosts on one log, killed at random."""
    path = RESULTS / "hosts.json"
    result = markdown.read(path)
    runs = [*result["runs"].items(), *((f"control: {name}", run) for name, run in result["control"].items())]
    rows = [
        [
            name,
            str(sum(run["kills"].values())),
            f"{run['acknowledged']:,}",
            *(f"{sum(run[fault].values()):,}" for fault in ("lost", "doubled")),
            str(run["warehouses"]),
            str(run["erased"]),
            str(run["early"]),
            str(run["left"]),
        ]
        for name, run in runs
    ]
    head = ["", "kill -9", "events", "lost", "doubled", "warehouses", "erased", "certified too early", "found later"]
    return markdown.table(head, rows) + markdown.source(path, result)


def rolls() -> str:
    """Returns the table of stops, rolling changes and kills under load."""
    path = RESULTS / "rolls.json"
    result = markdown.read(path)
    stops, changes, kills = result["stops"], result["rolls"], result["kills"]
    phases = [
        (f"{stops['count']} stops (SIGTERM)", stops),
        (f"{changes['count']} rolling changes", changes),
        (f"{len(kills['back_s'])} kills of a worker, back after at most {max(kills['back_s']):.1f} s", kills),
    ]
    rows = [
        [name, client, f"{phase[client]['calls']:,}", f"{sum(phase[client]['failures'].values()):,}"]
        for name, phase in phases
        for client in ("shipped", "plain")
    ]
    rows += [["all of it", "Node", f"{result['node']['calls']:,}", f"{sum(result['node']['failures'].values()):,}"]]
    control = result["control"]
    failed = sum(control["failures"].values())
    name = f"control: {control['rolls']} changes that end at once"
    rows += [[name, "one attempt", f"{control['calls']:,}", f"{failed:,}"]]
    return markdown.table(["", "client", "calls", "failed"], rows) + markdown.source(path, result)


def no_skew() -> str:
    """Returns the table of the histories that were compared, and of the differences."""
    path = RESULTS / "no-skew.json"
    result = markdown.read(path)
    every = "lives events late patched before_patch put early undone compactions prefixes slates differences"
    names = [name for name in every.split() if name in result]
    return markdown.table(names, [[f"{result[name]:,}" for name in names]]) + markdown.source(path, result)


def freshness() -> str:
    """Returns the table of the time until an event counts, in bare round trips of the same run."""
    pairs, path = RESULTS / "read-your-writes.json", RESULTS / "freshness.json"
    many, result = markdown.read(pairs), markdown.read(path)
    summary = f"{many['pairs']:,} pairs, the write and the read on different workers; faults: {len(many['faults'])}.\n"
    labels = {
        "stores": "the stores alone",
        "service": "every worker sees it",
        "answer": "another worker's answer has come",
    }
    rows = [
        [
            label,
            *(f"{result['latency_ms'][name][at]:.2f}" for at in ("p50", "p99")),
            *(f"{result['ratio'][floor][name][at]:.1f}" for floor in ("get", "durable_xadd") for at in ("p50", "p99")),
        ]
        for name, label in labels.items()
    ]
    head = ["until", "p50, ms", "p99, ms", "in GETs: p50", "p99", "in durable XADDs: p50", "p99"]
    return f"{summary}\n{markdown.table(head, rows)}{markdown.source(pairs, many)}{markdown.source(path, result)}"


def sizing() -> str:
    """Returns the table of the resources to provide, by item, user, event, slate and request."""
    path = RESULTS / "sizing.json"
    # It needs trainings of many items, so it is measured less often than the other results.
    if not path.exists():
        return "Not measured yet for this version: `make bench-sizing` does it.\n"
    result = markdown.read(path)
    large = max(result["bundles"], key=lambda bundle: bundle["items"])
    own, shared, rss = result["worker_bytes_per_item"], result["shared_bytes_per_item"], result["rss"]
    day = 86_400 / 2**30
    rows = [
        ["memory that all workers share, an item", "" if shared is None else f"{shared:,} bytes"],
        ["memory of each worker, an item", "" if own is None else f"{own:,} bytes"],
        [f"shared memory, {large['items']:,} items", f"{large['shared'] / 2**20:,.0f} MiB"],
        [f"memory of a worker, {large['items']:,} items", f"{large['worker_own'] / 2**20:,.0f} MiB"],
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
    # Bundles of one size leave the bytes of an item unknown.
    return markdown.table(["", "measured"], [row for row in rows if row[1]]) + markdown.source(path, result)


def profiles() -> str:
    """Returns the tables of the cost of users: bytes, reads against a GET, ingest against the server's own rate."""
    path = RESULTS / "profiles.json"
    result = markdown.read(path)
    reads = [(f"{result[name]['users']:,} users, folded", result[name]) for name in ("few", "many")]
    reads.append((f"{result['tail']['events']} events to fold at the read", result["tail"]))
    rows = [
        [label, *(f"{figures[name]:.0f}" for name in ("read_us", "get_us")), f"{figures['ratio']:.1f}"]
        for label, figures in reads
    ]
    summary = (
        f"{result['users']:,} users of {result['events']} events: {result['bytes_per_user']:,.0f} bytes each "
        f"(the limit: {result['limit_bytes_per_user']:,.0f}); folding {result['tail']['events']} events alone takes "
        f"{result['tail']['fold_us']:.0f} us.\n"
    )
    rates = [
        [name, *(f"{figures[f'{kind}_per_core_second']:,}" for kind in ("events", "bare")), f"{figures['ratio']:.1f}"]
        for name, figures in result["ingest"].items()
    ]
    tables = (
        markdown.table(["a read", "us", "a GET of as many bytes, us", "ratio"], rows),
        markdown.table(["a core's second of ingest into the", "events", "the bare command", "ratio"], rates),
    )
    return f"{summary}\n" + "\n".join(tables) + markdown.source(path, result)


def _in_time(trouble: dict[str, Any]) -> list[str]:
    return [f"{trouble['answers']:,}", f"{trouble['late']:,}", f"{trouble['slowest_s']:.2f}"]


def _rung_and_parts(slate: str) -> str:
    # As the proof records it: the rung, then the degraded parts, by their names in the contract.
    rung, *parts = slate.split()
    return ", ".join([rung.removeprefix("RUNG_").lower(), *(part.removeprefix("PART_") for part in parts)])
