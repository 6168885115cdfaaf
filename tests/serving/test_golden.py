"""A sound bundle answers its golden requests; one wrong part and it is refused, with the answer named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from features.bundle import Bundle, open_bundle
from features.bundle_tables import read_neighbors
from features.catalog import Catalog
from features.errors import BundleError
from features.linear import ItemWeights
from features.manifest import FileFacts
from features.vocabulary import Vocabulary
from serving.bundle.golden import replay
from serving.bundle.model import Model
from serving.bundle.vector_index import Index
from tests.untrained import untrained_bundle
from training.export.index import build


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(untrained_bundle())


@pytest.fixture(scope="module")
def model(bundle) -> Model:
    return Model(bundle)


def catalog_of(bundle: Bundle, vectors: np.ndarray | None = None) -> Catalog:
    items = pa.ipc.open_file(bundle.path / "items.arrow").read_all()
    vectors = np.load(bundle.path / "vectors.npy") if vectors is None else vectors
    return Catalog(items, Vocabulary.open(bundle.path / "vocabulary.arrow"), vectors)


def weights_of(bundle: Bundle) -> ItemWeights:
    return read_neighbors(bundle, len(np.load(bundle.path / "vectors.npy")))


def check(bundle: Bundle, model: Model, catalog: Catalog) -> None:
    replay(bundle, model, catalog, Index(bundle.read("index.faiss"), catalog), weights_of(bundle))


def with_golden(bundle: Bundle, tmp_path, change) -> Bundle:
    golden = json.loads(bundle.read("golden.json"))
    change(golden)
    content = json.dumps(golden).encode()
    shutil.copytree(bundle.path, tmp_path / "bundle")
    (tmp_path / "bundle" / "golden.json").write_bytes(content)
    facts = FileFacts(len(content), hashlib.sha256(content).hexdigest())
    manifest = dataclasses.replace(bundle.manifest, files={**bundle.manifest.files, "golden.json": facts})
    return dataclasses.replace(bundle, path=tmp_path / "bundle", manifest=manifest)


def test_a_sound_bundle_passes(bundle, model):
    check(bundle, model, catalog_of(bundle))


def test_rounding_passes(bundle, model, tmp_path):
    def nudge(golden):
        golden["people"][0]["vector"] = [value + 1e-5 for value in golden["people"][0]["vector"]]

    check(with_golden(bundle, tmp_path, nudge), model, catalog_of(bundle))


def test_other_vectors_are_noticed(bundle, model):
    vectors = np.load(bundle.path / "vectors.npy")
    catalog = catalog_of(bundle, np.roll(vectors, 1, axis=0))
    index = Index(build(catalog.columns.vectors, vectors, 0.98).data, catalog)
    with pytest.raises(BundleError, match=r"people\[0\].vector is .* away from the golden answer"):
        replay(bundle, model, catalog, index, weights_of(bundle))


def test_another_index_is_noticed(bundle, model):
    catalog = catalog_of(bundle)
    vectors, other = catalog.columns.vectors, np.roll(catalog.columns.vectors, 1, axis=0)
    # Lists of rough vectors: those of whole ones are compared with vectors.npy before anything is asked.
    rough = {"exact_up_to": 0, "quantised_from": 0}
    sound = Index(build(vectors, vectors, 0.5, **rough).data, catalog)
    replay(bundle, model, catalog, sound, weights_of(bundle))
    index = Index(build(other, other, 0.5, **rough).data, catalog)
    # What it proposes is scored with the true vectors, and those scores are lower than the golden ones.
    with pytest.raises(BundleError, match=r"the index finds \d+ of \d+ best items"):
        replay(bundle, model, catalog, index, weights_of(bundle))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda golden: golden["people"][2]["features"][0].__setitem__(3, 0.9), r"people\[2\].features is"),
        (lambda golden: golden["people"][1]["logits"][0].__setitem__(0, 99.0), r"people\[1\].logits is"),
        (lambda golden: golden["people"][1]["linear"].__setitem__(0, 9.0), r"people\[1\].linear is"),
        (lambda golden: golden["people"][1]["item_ids"].__setitem__(0, "gone"), "the catalogue lacks one of"),
        (lambda golden: golden["people"][3]["events"].pop(), r"people\[3\].vector is"),
        (lambda golden: golden["queries"][0]["tokens"].pop(), r"queries\[0\]: .* has other words here"),
        (lambda golden: golden["queries"][1]["relevance"].__setitem__(0, 5.0), r"queries\[1\].relevance is"),
        (lambda golden: golden["items"][0]["vector"].pop(), r"items\[0\].vector is inf away"),
        (lambda golden: golden["people"][0].pop("vector"), "cannot be replayed: KeyError"),
        (lambda golden: golden["people"][0].update(events=[]), "cannot be replayed: ValueError"),
    ],
)
def test_each_answer_counts(bundle, model, tmp_path, change, message):
    with pytest.raises(BundleError, match=message):
        check(with_golden(bundle, tmp_path, change), model, catalog_of(bundle))
