"""The models of a bundle against torch, and what a bundle with other models gets told."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from features.bundle import Bundle, open_bundle
from features.errors import BundleError
from features.manifest import FileFacts
from features.model_inputs import ranker_width
from features.transforms import ItemInputShapes, item_inputs, query_inputs
from serving.bundle import model as model_module
from serving.bundle.model import Model, ModelError
from serving.errors import ConfigError
from tests.untrained import CONFIG, untrained_bundle, untrained_run

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def run():
    return untrained_run()


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return open_bundle(untrained_bundle())


@pytest.fixture(scope="module")
def model(bundle) -> Model:
    return Model(bundle)


@pytest.fixture(scope="module")
def shapes(bundle) -> ItemInputShapes:
    return bundle.model.shapes


@torch.inference_mode()
def asked(module, *arrays: np.ndarray) -> np.ndarray:
    return module(*(torch.from_numpy(array) for array in arrays)).numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 2, CONFIG.max_length])
def test_a_person(model, run, length):
    vectors = RNG.normal(size=(length, CONFIG.dim)).astype(np.float32)
    types = RNG.integers(1, 4, length)
    expected = asked(run.user_encoder.last, vectors[None], types[None], np.array([length]))[0]
    close(model.encode_user(vectors, types), expected)


def test_many_people_answer_as_each_alone(model):
    lengths = np.array([3, 1, 7])
    real = np.arange(7) < lengths[:, None]
    vectors = RNG.normal(size=(3, 7, CONFIG.dim)).astype(np.float32) * real[..., None]
    types = RNG.integers(1, 4, (3, 7)) * real
    together = model.encode_users(vectors.astype(np.float32), types, lengths)
    for at, length in enumerate(lengths):
        close(together[at], model.encode_user(vectors[at, :length].astype(np.float32), types[at, :length]))


def test_items_and_queries(model, run, shapes):
    items = [{"item_id": "new", "title": "red shoes", "categories": ["shoes"], "price": 3.0}, {"item_id": "empty"}]
    inputs = item_inputs(items, shapes)
    close(model.encode_items(inputs), asked(run.item_encoder, *inputs.values()))
    for text in ("red shoes", "", "a b c d e f g h i j k"):
        tokens = query_inputs(text, shapes)["tokens"]
        close(model.encode_query(tokens), asked(run.query_encoder, tokens)[0])
        close(model.encode_query(tokens[0]), asked(run.query_encoder, tokens)[0])


def test_candidates_do_not_depend_on_one_another(model, run):
    user = RNG.normal(size=CONFIG.dim).astype(np.float32)
    items = RNG.normal(size=(300, CONFIG.dim)).astype(np.float32)
    features = RNG.normal(size=(300, ranker_width(1))).astype(np.float32)
    logits = model.rank(user, items, features)
    assert logits.shape == (300, 1)
    close(logits, asked(run.ranker, user[None], items, features))
    for part in (slice(0, 1), slice(7, 40), slice(299, 300)):
        # Not to the last bit: a matrix product of another shape adds in another order.
        np.testing.assert_allclose(model.rank(user, items[part], features[part]), logits[part], rtol=1e-5, atol=1e-6)
    assert model.rank(user, items[:0], features[:0]).shape == (0, 1)


def test_nobody_has_no_vector(model):
    with pytest.raises(ValueError, match="1 to 10"):
        model.encode_user(np.zeros((0, CONFIG.dim), np.float32), np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="1 to 10"):
        model.encode_user(np.zeros((11, CONFIG.dim), np.float32), np.ones(11, np.int64))


def test_what_is_not_finite_never_leaves(model):
    with pytest.raises(ModelError, match="NaN or infinity"):
        model.encode_user(np.full((1, CONFIG.dim), np.nan, np.float32), np.ones(1, np.int64))
    with pytest.raises(ModelError, match="a model failed"):
        model.encode_user(np.zeros((2, CONFIG.dim + 1), np.float32), np.ones(2, np.int64))


def changed(bundle: Bundle, tmp_path, **files: bytes) -> Bundle:
    """A bundle as `open_bundle` would return it if these were its verified files."""
    path = tmp_path / "bundle"
    shutil.copytree(bundle.path, path)
    facts = dict(bundle.manifest.files)
    for name, content in files.items():
        name = name.replace("_onnx", ".onnx")
        (path / name).write_bytes(content)
        facts[name] = FileFacts(len(content), hashlib.sha256(content).hexdigest())
    return dataclasses.replace(bundle, path=path, manifest=dataclasses.replace(bundle.manifest, files=facts))


def test_refuses_what_is_no_model(bundle, tmp_path):
    with pytest.raises(BundleError, match=r"ranker.onnx: no ONNX model"):
        Model(changed(bundle, tmp_path, ranker_onnx=b"not a model"))


def test_refuses_other_dimensions(bundle, tmp_path):
    ranker = bundle.read("ranker.onnx")
    with pytest.raises(BundleError, match=r"query_encoder.onnx: takes .*, the manifest promises"):
        Model(changed(bundle, tmp_path, query_encoder_onnx=ranker))
    graph = onnx.load_model_from_string(bundle.read("user_encoder.onnx"))
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    with pytest.raises(BundleError, match=r"user_encoder.onnx: takes"):
        Model(changed(bundle, tmp_path / "fixed", user_encoder_onnx=graph.SerializeToString()))


def test_reads_the_very_bytes_that_were_verified(bundle, tmp_path):
    moved = changed(bundle, tmp_path)
    (moved.path / "ranker.onnx").write_bytes(b"changed since")
    with pytest.raises(BundleError, match="changed while"):
        Model(moved)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="no GPU-less machine")
def test_cuda_is_not_promised_where_it_is_not(bundle):
    with pytest.raises(ConfigError, match=r"no CUDA.*onnxruntime-gpu"):
        Model(bundle, "cuda")
    assert Model(bundle, "auto").device == "cpu"


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="no GPU-less machine")
def test_a_provider_that_does_not_start_is_named_or_passed_over(bundle, model, monkeypatch):
    # A runtime that lists its CUDA provider where no driver is: its sessions fall back to the CPU.
    monkeypatch.setattr(model_module, "_providers", lambda device: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(ConfigError, match="does not start"):
            Model(bundle, "cuda")
        fallen = Model(bundle, "auto")
    assert fallen.device == "cpu"
    items, types = np.ones((3, CONFIG.dim), np.float32), np.ones(3, np.int64)
    np.testing.assert_array_equal(fallen.encode_user(items, types), model.encode_user(items, types))


@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="no GPU for ONNX")
def test_the_answers_of_a_gpu_are_those_of_the_cpu(bundle, model):
    gpu, rng = Model(bundle, "cuda"), np.random.default_rng(2)
    items = rng.normal(size=(40, CONFIG.dim)).astype(np.float32)
    features = rng.normal(size=(40, ranker_width(model.actions))).astype(np.float32)
    types = np.ones(CONFIG.max_length, np.int64)
    for ask in (
        lambda its: its.encode_user(items[: CONFIG.max_length], types),
        lambda its: its.rank(items[0], items, features),
        lambda its: its.encode_query(np.array([1, 2, 3])),
    ):
        np.testing.assert_allclose(ask(gpu), ask(model), atol=1e-4, rtol=1e-4)
