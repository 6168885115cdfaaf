"""From a run to a bundle: what is inside, the gates one by one, and that a failed gate leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import json

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch

from features.bundle import MANIFEST, open_bundle
from features.errors import BundleError, ExportError
from features.histories import history_keys
from features.model_inputs import FEATURES
from features.transforms import item_text, text_tokens
from tests.untrained import CONFIG, untrained_bundle, untrained_run
from training.data import histories
from training.data.interactions import read_interactions
from training.export import export as exporting
from training.export import golden
from training.export.export import ExportGates, publish_run
from training.export.index import build
from training.export.onnx import Graph


@pytest.fixture(scope="module")
def run():
    return untrained_run()


@pytest.fixture(scope="module")
def bundle():
    return open_bundle(untrained_bundle())


def table(bundle, name: str) -> pa.Table:
    return pa.ipc.open_file(bundle.path / name).read_all()


def test_the_manifest_says_everything_that_serving_needs(bundle, run):
    manifest = json.loads((bundle.path / MANIFEST).read_bytes())
    assert bundle.manifest.feature_fingerprint == FEATURES.fingerprint()
    assert manifest["data_fingerprint"] == run.result["data_fingerprint"]
    assert bundle.model.event_types == ("like", "purchase", "view_item")
    assert manifest["model"]["actions"] == [
        {"name": "buy", "event_type": "purchase", "min_value": None, "shown_types": [], "window_hours": 24.0}
    ]
    assert {name: manifest["model"][name] for name in ("dim", "max_length", "blend", "seen_types", "repeats")} == {
        "dim": 16,
        "max_length": 10,
        "blend": 0.25,
        "seen_types": ["purchase"],
        "repeats": False,
    }
    assert all(gate["passed"] for gate in manifest["gates"].values())
    assert set(manifest["gates"]) == {
        *(f"parity_{name}" for name in ("user_encoder", "item_encoder", "query_encoder", "ranker")),
        "index_recall@10",
        "index_recall@100",
        "assembly_differences",
    }


def test_the_tables_are_the_runs(bundle, run):
    items = table(bundle, "items.arrow")
    assert items["item_id"].to_pylist() == run.items["item_id"].to_pylist()
    np.testing.assert_array_equal(items["trained"].to_numpy(), run.trained)
    np.testing.assert_array_equal(np.load(bundle.path / "vectors.npy"), run.item_vectors)
    np.testing.assert_array_equal(np.load(bundle.path / "neighbors.npy"), run.neighbors)
    offsets, tokens = (np.load(bundle.path / name) for name in ("token_offsets.npy", "tokens.npy"))
    for row, item in enumerate(items.to_pylist()):
        np.testing.assert_array_equal(tokens[offsets[row] : offsets[row + 1]], text_tokens(item_text(item)))
    popular = table(bundle, "popular.arrow")
    everybody = np.array([segment == "" for segment in popular["segment"].to_pylist()])
    rows = popular["row"].to_numpy()[everybody]
    assert sorted(rows) == list(range(80))
    recent = run.recent_popularity[rows]
    assert (np.diff(recent) <= 0).all()
    ties = np.flatnonzero(np.diff(recent) == 0)
    assert (run.popularity[rows[ties]] >= run.popularity[rows[ties + 1]]).all()


def test_each_segment_of_enough_people_has_its_table(bundle, run):
    popular = table(bundle, "popular.arrow")
    firsts = {item["categories"][0] for item in run.items.to_pylist() if item["categories"]}
    tables = {}
    for line in popular.to_pylist():
        tables.setdefault(line["segment"], []).append(line["score"])
    assert "" in tables
    assert len(tables) > 1
    assert set(tables) - {""} <= firsts
    assert all((np.diff(scores) <= 0).all() for scores in tables.values())


def test_exporting_twice_gives_the_same_bundle(bundle, run):
    again = publish_run(run, bundle.path)
    assert again["bundle_id"] == bundle.bundle_id
    assert [entry.name for entry in bundle.path.parent.iterdir()] == ["bundle"]


def test_golden_requests_name_nobody_and_meet_every_length(bundle, run):
    people = json.loads(bundle.read("golden.json"))["people"]
    assert {1, 2, CONFIG.max_length, CONFIG.max_length + 7, 276} <= {len(person["events"]) for person in people}
    types = {event["event_type"] for person in people for event in person["events"]}
    assert types == {"like", "purchase", "view_item", "golden_unknown"}
    assert "user-" not in bundle.read("golden.json").decode()


def test_golden_best_items_are_the_exactly_best(bundle, run):
    for person in json.loads(bundle.read("golden.json"))["people"]:
        scores = run.item_vectors @ np.array(person["vector"], np.float32)
        assert person["item_ids"] == [f"item-{row}" for row in np.argsort(-scores)[:10]]
        np.testing.assert_allclose(person["relevance"], np.sort(scores)[::-1][:10], rtol=1e-4)


def refused(run, out, match: str) -> None:
    with pytest.raises(ExportError, match=match):
        publish_run(run, out)
    assert list(out.parent.iterdir()) == []


def test_a_module_that_onnx_computes_otherwise_is_refused(run, tmp_path, monkeypatch):
    honest = exporting.to_onnx

    def careless(graph: Graph) -> bytes:
        module = copy.deepcopy(graph.module)
        with torch.no_grad():
            next(module.parameters())[1, 0] += 0.1
        return honest(dataclasses.replace(graph, module=module))

    monkeypatch.setattr(exporting, "to_onnx", careless)
    refused(run, tmp_path / "b", r"gate parity_user_encoder: .* above the limit 1e-05; nothing was published")


def test_nan_weights_are_refused(run, tmp_path):
    broken = copy.deepcopy(run.user_encoder)
    with torch.no_grad():
        broken.output_norm.weight.fill_(torch.nan)
    refused(dataclasses.replace(run, user_encoder=broken), tmp_path / "b", "user_encoder: answers NaN")


def test_nan_vectors_are_refused(run, tmp_path):
    vectors = run.item_vectors.copy()
    vectors[3, 3] = np.nan
    refused(dataclasses.replace(run, item_vectors=vectors), tmp_path / "b", "NaN")


def test_roads_that_part_are_refused(run, tmp_path, monkeypatch):
    class OffByOne(golden.UserHistories):
        def before(self, person, position):
            return super().before(person, max(position - 1, 0))

    monkeypatch.setattr(golden, "UserHistories", OffByOne)
    refused(run, tmp_path / "b", r"gate assembly_differences: \d+ is \d+ above the limit 0")


def test_a_training_that_asks_todays_catalogue_for_keys_is_refused(run, tmp_path, monkeypatch):
    """Golden people had events about items that were patched since, and events that came before their item."""

    def todays(rows, columns, logged):
        return history_keys(rows, columns, dataclasses.replace(logged, carried=np.zeros_like(logged.carried)))

    monkeypatch.setattr(histories, "history_keys", todays)
    refused(run, tmp_path / "b", r"gate assembly_differences: \d+ is \d+ above the limit 0")


def test_a_category_that_no_item_has_any_more_has_no_table(run, tmp_path, monkeypatch):
    lost = {key: (np.array([0], np.int32), np.ones(1, np.float32)) for key in (1, 2**64 - 1)}
    honest = exporting.popular_in_segments
    monkeypatch.setattr(exporting, "popular_in_segments", lambda *given: honest(*given) | lost)
    catalog = exporting._write_items(run, tmp_path)
    exporting._write_tables(run, read_interactions(run.dataset, run.vocabulary, run.config), catalog, tmp_path)
    segments = pa.ipc.open_file(tmp_path / "popular.arrow").read_all()["segment"].to_pylist()
    named = {name for names in run.items["categories"].to_pylist() for name in names or ()}
    assert set(segments) <= named | {""}
    assert len(set(segments)) > 1


def test_another_bundle_is_never_overwritten(bundle, run):
    with pytest.raises(BundleError, match="another bundle"):
        publish_run(dataclasses.replace(run, popularity=run.popularity + 1), bundle.path)
    assert open_bundle(bundle.path).bundle_id == bundle.bundle_id
    assert [entry.name for entry in bundle.path.parent.iterdir()] == ["bundle"]


def test_what_is_no_bundle_is_never_overwritten(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="no bundle here"):
        publish_run(run, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_gates_name_value_and_limit():
    gates = ExportGates()
    gates.at_least("recall", 0.99, 0.98)
    with pytest.raises(ExportError, match=r"gate recall: 0.5 is 0.48 below the limit 0.98"):
        gates.at_least("recall", 0.5, 0.98)
    with pytest.raises(ExportError, match="gate parity: nan"):
        gates.at_most("parity", float("nan"), 1e-5)
    assert gates.results["recall"] == {"value": 0.5, "limit": 0.98, "passed": False}


def clusters(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(9).normal(size=(50, 16))
    return (centers[rng.integers(0, 50, count)] + 0.5 * rng.normal(size=(count, 16))).astype(np.float32)


def test_the_index_grows_with_the_catalogue():
    vectors, queries = clusters(8000, 1), clusters(100, 2)
    small, large, huge = (
        build(vectors, queries, 0.95, exact_up_to=limit, quantised_from=quantised)
        for limit, quantised in ((8000, 10**6), (7999, 10**6), (0, 8000))
    )
    assert (small.kind, small.lists, small.recall[10]) == ("Flat", 0, 1.0)
    assert large.kind == "IVF128,Flat"
    assert huge.kind == "IVF128,SQ8"
    assert len(huge.data) < len(large.data) / 2
    for built in (large, huge):
        assert min(built.recall.values()) >= 0.95
        assert 0 < built.probes < built.lists
        assert faiss.deserialize_index(np.frombuffer(built.data, np.uint8)).nprobe == built.probes


def test_what_no_list_can_find_is_searched_exactly(caplog):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2000, 64)).astype(np.float32)
    built = build(vectors, rng.normal(size=(50, 64)).astype(np.float32), 0.9999, exact_up_to=0, quantised_from=0)
    assert (built.kind, built.recall) == ("Flat", {10: 1.0, 100: 1.0})
    # Not without a word: what the lists would have found, and what the exact search costs.
    assert "no index of lists reaches recall 0.9999: IVF" in caplog.text
    assert "so every search compares all vectors" in caplog.text
    kinds = [point.kind for point in built.curve]
    assert kinds == sorted(kinds, key=["IVF64,SQ8", "IVF64,Flat", "Flat"].index)
    probes = [point.probes for point in built.curve if point.kind == "IVF64,SQ8"]
    assert probes[-1] == 32, "half of its lists, of a byte a number, cost less than the next kind"


def test_the_curve_tells_what_each_way_finds_and_how_fast():
    vectors, queries = clusters(8000, 1), clusters(100, 2)
    built = build(vectors, queries, 0.95, exact_up_to=0, quantised_from=0)
    points = [point.as_json() for point in built.curve]
    assert {"kind", "probes", "recall@10", "recall@100", "queries_per_second"} == set(points[0])
    assert points[-1]["probes"] == built.probes
    assert points[-1]["recall@100"] == round(built.recall[100], 4) >= 0.95
    assert all(point["recall@100"] < 0.95 or point["recall@10"] < 0.95 for point in points[:-1])
    assert min(point["queries_per_second"] for point in points) > 0


def test_items_with_equal_vectors_stand_for_one_another():
    vectors = np.repeat(clusters(30, 3), 100, axis=0)
    built = build(vectors, clusters(40, 4), 0.98)
    assert built.recall == {10: 1.0, 100: 1.0}
    assert build(vectors[:3], clusters(40, 4), 0.98).recall == {10: 1.0, 100: 1.0}
