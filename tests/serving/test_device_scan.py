"""The scan of a device against the exact search, and the kernels of a GPU against their plain twins."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu import UNPROVED, answers, main
from features.catalog import Catalog
from features.vocabulary import Vocabulary
from serving.bundle import device_scan
from serving.bundle.device_scan import BLOCK, GROUP, DeviceScan, maxima_plain, scores_plain
from serving.bundle.vector_index import Index, can_scan_on, exact_search, scan_on
from serving.errors import ConfigError
from training.export.index import build

NOW = 1_700_000_000_000
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA is absent"))
DEVICES = ["cpu", CUDA]
FORMS = ["float32", "bfloat16"]


def drawn(count: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dim)) * np.exp(rng.normal(0, 0.3, (count, 1)))).astype(np.float32)


def packed(mask: np.ndarray) -> np.ndarray:
    return np.packbits(mask, bitorder="little")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None)
@given(
    count=st.sampled_from([1, GROUP - 1, GROUP, BLOCK, BLOCK + 1, 5000]),
    dim=st.sampled_from([8, 20, 64]),
    k=st.sampled_from([1, 7, 100]),
    share=st.sampled_from([None, 0.6, 0.02, 0.0]),
    lines=st.sampled_from([1, 9, 70]),
    seed=st.integers(0, 99),
)
def test_proposes_the_best_allowed_rows(device, form, count, dim, k, share, lines, seed):
    vectors, queries = drawn(count, dim, seed), drawn(lines, dim, seed + 1)
    mask = np.random.default_rng(seed).random(count) < (1.0 if share is None else share)
    rows = DeviceScan(vectors, device, form).propose(queries, k, None if share is None else packed(mask))
    expected, _ = exact_search(vectors, queries, k, packed(mask))
    for mine, best in zip(rows, expected, strict=True):
        assert mask[mine[mine >= 0]].all()
        assert np.unique(mine[mine >= 0]).size == (mine >= 0).sum() <= mask.sum()
        assert np.isin(best, mine).all()


@pytest.mark.parametrize("device", DEVICES)
def test_an_index_answers_the_same_on_a_device(device):
    vectors, ids = drawn(4000, 16), [f"i{row}" for row in range(4000)]
    catalog = Catalog(pa.table({"item_id": ids}), Vocabulary.build(ids), vectors)
    data = build(vectors, drawn(20, 16, 5), 0.98, exact_up_to=4000).data
    cpu, other = Index(data, catalog), Index(data, catalog, "cuda" if device == "cuda" else "cpu")
    other._device_scan = DeviceScan(vectors[:4000], device, "bfloat16")
    catalog.put([{"item_id": f"new{number}"} for number in range(20)], drawn(20, 16, 6), NOW)
    queries = drawn(30, 16, 7)
    for share in (None, 0.9, 0.1):
        allowed = None if share is None else packed(np.random.default_rng(1).random(catalog.size) < share)
        expected, answer = cpu.search(queries, 40, allowed), other.search(queries, 40, allowed)
        np.testing.assert_array_equal(expected[0], answer[0])
        np.testing.assert_array_equal(expected[1], answer[1])
    # Control: a device that holds another vector for one of the best rows is noticed.
    spoiled = vectors[:4000].copy()
    spoiled[cpu.search(queries, 1)[0][0, 0] % 4000] = 0
    other._device_scan = DeviceScan(spoiled, device, "bfloat16")
    assert (cpu.search(queries, 40)[0] != other.search(queries, 40)[0]).any()


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_compact_form_cannot_prove_is_scanned_in_float32(device, monkeypatch):
    # Apart by less than bf16 can tell, so that its order of them is chance.
    base = drawn(1, 64)
    vectors = base + 1e-4 * drawn(20_000, 64, 1)
    scan = DeviceScan(vectors, device, "bfloat16")
    queries = torch.from_numpy(drawn(3, 64, 2)).to(device)
    with torch.inference_mode():
        assert not scan._pass(scan._copy, queries, 30, None, 1).proven.all()
    found = scan.search(queries, 30)
    truth = (queries.double() @ torch.from_numpy(vectors).to(device).double().T).topk(30, 1).values
    np.testing.assert_allclose(found.scores.cpu(), truth.cpu(), rtol=1e-5)
    # Control: without the second look some of the best are missed.
    monkeypatch.setattr(DeviceScan, "_error", lambda self, copy, queries: torch.full_like(queries[:, 0], -1e9))
    blind = DeviceScan(vectors, device, "bfloat16").search(queries, 30)
    assert float((truth - blind.scores.double()).max()) > float((truth - found.scores.double()).max())


@pytest.mark.parametrize("device", DEVICES)
def test_equal_vectors_are_ties_and_end(device):
    scan = DeviceScan(np.ones((10_000, 16), np.float32), device, "bfloat16")
    rows = scan.propose(np.ones((2, 16), np.float32), 50)
    assert all(np.unique(mine[mine >= 0]).size >= 50 for mine in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA is absent")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [20, 64, 256])
def test_the_kernels_agree_with_their_plain_twins(form, dim):
    vectors, queries = drawn(70_001, dim), torch.from_numpy(drawn(9, dim, 1)).cuda()
    scan = DeviceScan(vectors, "cuda", form)
    for bits in (None, scan.bitmap(packed(np.random.default_rng(0).random(70_001) < 0.3))):
        bound = float(scan._error(device_scan._Copy("float32", scan._vectors, 0.0), queries).max())
        for mine, plain in zip(
            device_scan._maxima(scan._copy, queries, bits),
            maxima_plain(scan._copy.vectors, queries, bits),
            strict=True,
        ):
            torch.testing.assert_close(mine, plain, rtol=0, atol=bound)
        groups = torch.randint(0, 70_001 // GROUP, (9, 40), device="cuda")
        mine = device_scan._scores(scan._vectors, queries, groups, bits)
        torch.testing.assert_close(mine, scores_plain(scan._vectors, queries, groups, bits), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU-less machine")
def test_a_device_that_is_absent_is_named():
    assert not can_scan_on("cuda")
    with pytest.raises(ConfigError, match="no CUDA device"):
        scan_on("cuda", drawn(3, 8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="no GPU-less machine")
def test_the_proof_says_that_it_proves_nothing(capsys):
    assert main([]) == UNPROVED
    assert "unproved: no CUDA device" in capsys.readouterr().err


def test_the_proof_compares_answers_and_notices_spoiled_ones():
    found = answers(torch.device("cpu"), 3000, 8)
    assert found["different"] == 0
    assert found["compared"] > found["control"] == found["control_of"] == 8
