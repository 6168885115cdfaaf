from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.grown_bundle import grow
from benchmarks.load.material import titles_of
from benchmarks.report import BenchmarkError
from features.bundle import open_bundle
from serving.engine.vetting import vet
from tests.untrained import untrained_bundle


def test_a_grown_bundle_serves_and_keeps_the_answers_of_its_template(tmp_path: Path) -> None:
    template = untrained_bundle()
    figures = grow(template, 500, tmp_path / "grown")
    bundle = open_bundle(tmp_path / "grown")
    assert figures["items"] == 500
    assert figures["index"]["recall"][10] >= 0.98
    old, new = (list(titles_of(folder)) for folder in (template, tmp_path / "grown"))
    assert new[: len(old)] == old
    assert len(set(new)) == 500
    vet(tmp_path / "grown")  # every golden request has its answer
    # Copies lie near their originals, and take part in the answers of others.
    vectors = np.load(tmp_path / "grown" / "vectors.npy")
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, vectors.shape[1])).astype(np.float32)
    assert (np.argsort(-queries @ vectors.T, axis=1)[:, :10] >= len(old)).mean() > 0.5
    assert json.loads((tmp_path / "grown" / "manifest.json").read_text())["bundle_id"] == bundle.bundle_id
    with pytest.raises(BenchmarkError, match="smaller template"):
        grow(template, 10, tmp_path / "small")
