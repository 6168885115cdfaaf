"""Writes the tables of the docs, between `<!-- results: NAME -->` and `<!-- end -->`.

Figures come from `benchmarks/results/*.json`, settings from the classes that read them.

python -m benchmarks.tables          writes them
python -m benchmarks.tables --check  checks that they are up to date; status 1 if not
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from benchmarks.report import RESULTS
from benchmarks.reports import load, quality, serving, settings
from serving.observability.exposition import markdown as metrics

ROOT = RESULTS.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

TABLES: dict[str, Callable[[], str]] = {
    "quality": quality.quality,
    "quality-headline": quality.headline,
    "impressions": quality.impressions,
    "latency": serving.latency,
    "stages": serving.stages,
    "highest-rate": load.highest_rate,
    "overload": load.overload,
    "serving-growth": load.serving_growth,
    "training-speed": quality.training_speed,
    "training-cold": quality.cold,
    "training-growth": quality.growth,
    "training-catalogs": quality.catalogs,
    "log-size": serving.log_size,
    "redis-trouble": serving.redis_trouble,
    "durability": serving.durability,
    "hosts": serving.hosts,
    "rolls": serving.rolls,
    "no-skew": serving.no_skew,
    "freshness": serving.freshness,
    "profiles": serving.profiles,
    "serve-settings": settings.serve_settings,
    "train-settings": settings.train_settings,
    "metrics": metrics,
    "gpu": quality.gpu,
    "sizing": serving.sizing,
}

_BLOCK = re.compile(r"(<!-- results: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Writes or checks every page; returns the exit status."""
    stale = []
    # Only what stands between the marks is written; the prose around it stays.
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


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
