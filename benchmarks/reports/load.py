"""Tables of load tests: the highest rate, overload, growth with the catalogue."""

from __future__ import annotations

from typing import Any

from benchmarks.report import RESULTS
from benchmarks.reports import markdown


def highest_rate() -> str:
    """Returns the tables of the highest rates, and of the latency around each."""
    blocks = []
    for path in sorted(RESULTS.glob("highest-rate*.json")):
        result = markdown.read(path)
        rows = [_point(point) for point in result["curve"]]
        head = ["requests/s", "of the highest", "p50 ms", "p99 ms", "p99.9 ms", "CPU ms", "errors"]
        promise, half = result["promise"], result["at_half"]
        rates = ", ".join(f"{rate:,.0f}" for rate in result["highest_rates"])
        summary = (
            f"\nhighest rate at p99 <= {promise['p99_ms']:g} ms: {result['highest_rate']:,.0f} a second (searches: "
            f"{rates}); at half of it p99 is {half['p99_over_p50']:.1f} times p50.\n"
        )
        table = markdown.table(head, rows)
        blocks.append(f"{result['title']}\n\n{table}{summary}{markdown.source(path, result)}")
    return "\n".join(blocks)


def _point(point: dict[str, Any]) -> list[str]:
    # Above the highest rate a window may have no answer at all.
    times = [f"{point['latency_ms'][name]:.2f}" if point["latency_ms"] else "" for name in ("p50", "p99", "p99.9")]
    cpu = f"{point['cpu_ms']:.2f}" if "cpu_ms" in point else ""
    return [f"{point['rate']:,.0f}", f"{point['share']:.0%}", *times, cpu, f"{sum(point['errors'].values()):,}"]


def overload() -> str:
    """Returns the tables of overloads, each with its limits."""
    blocks = []
    for path in sorted(RESULTS.glob("overload*.json")):
        result = markdown.read(path)
        rows = [
            [name.replace("_", " "), f"{entry['value']:,.4g}", f"{entry['limit']:g}", "yes" if entry["kept"] else "no"]
            for name, entry in result["kept"].items()
        ]
        offered = f"offered {result['offered_rate']:,.0f} a second, {result['highest_rate']:,.0f} at most answered"
        table = markdown.table(["", "value", "limit", "kept"], rows)
        blocks.append(f"{result['title']} ({offered})\n\n{table}{markdown.source(path, result)}")
    return "\n".join(blocks)


def serving_growth() -> str:
    """Returns the tables of services of several catalogue sizes."""
    blocks = []
    for path in sorted(RESULTS.glob("serving-growth*.json")):
        result = markdown.read(path)
        rows = [
            [
                f"{size['items']:,}",
                f"{size['latency_ms']['p50']:.2f}",
                f"{size['latency_ms']['p99']:.2f}",
                f"{size['ratio']:.2f}",
                f"{size['service_bytes'] / 2**20:,.0f}",
                f"{size['worker_bytes'] / 2**20:,.0f}",
                f"{size['start_s']:.1f}",
            ]
            for size in result["serving_growth"]
        ]
        head = [
            "items",
            "p50 ms",
            "p99 ms",
            "p50 over the smallest's",
            "service MiB",
            "a further worker MiB",
            "ready, s",
        ]
        summary = (
            f"\n{result['bytes_per_item']:,.0f} bytes an item in all, {result['worker_bytes_per_item']:,.0f} in each "
            "further worker.\n"
        )
        blocks.append(f"{result['title']}\n\n{markdown.table(head, rows)}{summary}{markdown.source(path, result)}")
    return "\n".join(blocks)
