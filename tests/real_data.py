"""The places of the real data sets; a test that needs a missing one skips and says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def real_data(*parts: str) -> Path:
    """The path below `PENCHANT_DATA` (default `../shared/data` next to the repository); skips the test without it."""
    folder = Path(os.environ.get("PENCHANT_DATA") or ROOT.parent / "shared" / "data")
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no real data at {path}: PENCHANT_DATA names their folder")
    return path
