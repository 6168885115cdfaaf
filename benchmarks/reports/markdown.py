"""The common parts of the tables: reading a recorded result, rows of Markdown, intervals, the line of the source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def interval(figure: dict[str, float]) -> str:
    """Returns a mean and its interval."""
    return f"{figure['mean']:.4f} ({figure['low']:.4f} to {figure['high']:.4f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    """Returns a table whose first column is aligned to the left."""
    line = ["---", *[align] * (len(head) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, line, *rows))


def source(path: Path, result: dict[str, Any]) -> str:
    """Returns the line that names a result's file, command, commit and machine."""
    machine = result["machine"]
    return (
        f"\n<sub>{path.name}: `{result['command']}`, commit {result['commit']}, "
        f"{machine['processor']}, {machine['cores']} cores</sub>\n"
    )


def read(path: Path) -> dict[str, Any]:
    """Returns a recorded result."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def escaped(text: str) -> str:
    """Returns a text that can stand in a cell."""
    # A bar would end the cell, a line break the row.
    return text.replace("|", "\\|").replace("\n", " ")
