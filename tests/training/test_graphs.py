"""Graphs against torch, on small modules with the contract's signatures."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from features.errors import ExportError
from training.export.onnx import Graph, LastHidden, parity, session_of, to_onnx
from training.models.encoders import EncoderShape, UserEncoder

DIM, LONGEST = 8, 12


def sequences(batch: int, length: int, lengths: list[int] | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch * 100 + length)
    count = np.array(lengths or [length] * batch, np.int64)
    real = np.arange(length)[None] < count[:, None]
    vectors = rng.normal(size=(batch, length, DIM)).astype(np.float32) * real[..., None]
    return {"vectors": vectors, "types": rng.integers(0, 4, (batch, length)) * real, "lengths": count}


CASES = [
    sequences(3, 5, [5, 1, 3]),
    sequences(1, 1),
    sequences(2, 1),
    sequences(1, LONGEST),
    sequences(4, LONGEST, [12, 0, 1, 7]),
]


@pytest.fixture(scope="module")
def user() -> Graph:
    torch.manual_seed(0)
    shape = EncoderShape(DIM, layers=2, heads=2, feed_forward=16, max_length=LONGEST, types=3, dropout=0.1)
    axes = {"vectors": ["batch", "length", DIM], "types": ["batch", "length"], "lengths": ["batch"]}
    return Graph("user_encoder", LastHidden(UserEncoder(shape)).eval(), "user", axes, ["batch", DIM], CASES)


@pytest.fixture(scope="module")
def exported(user) -> bytes:
    return to_onnx(user)


def test_the_user_encoder_answers_as_torch_does(user, exported):
    assert parity(user, exported) < 1e-5


def test_attention_is_one_operator_in_one_file(exported):
    model = onnx.load_model_from_string(exported)
    onnx.checker.check_model(model)
    assert [node.op_type for node in model.graph.node].count("Attention") == 2
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_padding_changes_nothing(exported):
    session = session_of(exported)
    short = sequences(1, 4)
    long = {
        "vectors": np.pad(short["vectors"], ((0, 0), (0, 5), (0, 0))),
        "types": np.pad(short["types"], ((0, 0), (0, 5))),
        "lengths": short["lengths"],
    }
    np.testing.assert_allclose(session.run(None, short)[0], session.run(None, long)[0], atol=1e-6)


def test_other_weights_do_not_pass_for_the_same(user, exported):
    other = copy.deepcopy(user.module)
    with torch.no_grad():
        next(other.parameters())[1, 0] += 0.01
    assert parity(Graph(**{**vars(user), "module": other}), exported) > 1e-5


def test_nan_weights_are_refused(user):
    broken = copy.deepcopy(user.module)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    graph = Graph(**{**vars(user), "module": broken})
    with pytest.raises(ExportError, match="NaN or infinity"):
        parity(graph, to_onnx(graph))


class Pair(nn.Module):
    """A ranker with the contract's signature; `fixed` folds the number of candidates into the graph."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.of_user, self.of_item, self.fixed = nn.Linear(DIM, 6), nn.Linear(DIM + 3, 6), fixed
        self.out = nn.Linear(6, 2)

    def forward(self, user: Tensor, items: Tensor, features: Tensor) -> Tensor:
        logits = self.out(torch.relu(self.of_user(user) + self.of_item(torch.cat([items, features], 1))))
        return logits + logits.sum(0) if self.fixed else logits


def ranker(**options: bool) -> Graph:
    rng = np.random.default_rng(0)
    cases = [
        {
            "user": rng.normal(size=(1, DIM)).astype(np.float32),
            "items": rng.normal(size=(count, DIM)).astype(np.float32),
            "features": rng.normal(size=(count, 3)).astype(np.float32),
        }
        for count in (1, 3, 100)
    ]
    axes = {"user": [1, DIM], "items": ["candidates", DIM], "features": ["candidates", 3]}
    return Graph("ranker", Pair(**options).eval(), "logits", axes, ["candidates", 2], cases)


def test_the_users_part_of_the_ranker_stands_alone():
    graph = ranker()
    data = to_onnx(graph)
    assert parity(graph, data) < 1e-5
    one = {name: array[:1] for name, array in graph.cases[2].items()}
    session = session_of(data)
    np.testing.assert_array_equal(session.run(None, one)[0], session.run(None, dict(graph.cases[2]))[0][:1])


def test_a_promise_that_is_not_kept_is_refused():
    graph = ranker()
    with pytest.raises(ExportError, match="promised as"):
        to_onnx(Graph(**{**vars(graph), "answer": ["candidates", 5]}))


def test_the_file_names_no_path_of_this_machine(exported):
    assert b".py" not in exported
    assert str(Path(__file__).parents[2]).encode() not in exported
