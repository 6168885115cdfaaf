from __future__ import annotations

import pytest
import torch

from features.transforms import ItemInputShapes, item_inputs, query_inputs
from training.models import encoders
from training.models.encoders import (
    CausalAttention,
    CheapDropout,
    EncoderShape,
    ItemBags,
    ItemEncoder,
    QueryEncoder,
    UserEncoder,
)

SHAPE = EncoderShape(dim=8, layers=2, heads=2, feed_forward=16, max_length=10, types=3, dropout=0.0)
INPUTS = ItemInputShapes(token_buckets=32, max_tokens=6, category_buckets=8, max_categories=3, creator_buckets=4)
ITEMS = [
    {"item_id": "a", "title": "red shoe", "categories": ["shoes"], "creator_id": "acme", "price": 10.0},
    {"item_id": "b", "title": "blue shoe", "categories": ["shoes", "sport"], "creator_id": None, "price": None},
    {"item_id": "c", "title": None, "categories": None, "creator_id": None, "price": None},
]


def batch(length: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, length, 8), torch.randint(1, 4, (3, length)), torch.tensor([length, 2, 4])


def test_no_position_sees_the_future() -> None:
    encoder = UserEncoder(SHAPE).eval()
    vectors, types, lengths = batch()
    before = encoder(vectors, types, lengths)
    changed = vectors.clone()
    changed[:, 4:] *= -1
    after = encoder(changed, types, lengths)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_padding_and_neighbours_in_the_batch_change_nothing() -> None:
    encoder = UserEncoder(SHAPE).eval()
    vectors, types, lengths = batch()
    together = encoder.last(vectors, types, lengths)
    for at, length in enumerate(lengths.tolist()):
        alone = encoder.last(vectors[at : at + 1, :length], types[at : at + 1, :length], lengths[at : at + 1])
        assert torch.allclose(alone[0], together[at], atol=1e-5)


def test_a_person_without_events_has_a_finite_vector() -> None:
    encoder = UserEncoder(SHAPE).eval()
    empty = encoder.last(torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    assert torch.isfinite(empty).all()


def with_distances(encoder: UserEncoder) -> UserEncoder:
    """The encoder as training leaves it: the bias by distance is not zero any more."""
    for block in encoder.blocks:
        torch.nn.init.normal_(block.attention.distances)  # type: ignore[union-attr, arg-type]
    return encoder


def test_the_newest_position_alone_equals_the_whole_pass() -> None:
    encoder = with_distances(UserEncoder(SHAPE)).eval()
    vectors, types, lengths = batch()
    whole = encoder(vectors, types, lengths)[torch.arange(3), lengths - 1]
    assert torch.allclose(encoder.last(vectors, types, lengths), whole, atol=1e-5)


def test_the_bias_depends_on_distance_alone() -> None:
    attention = with_distances(UserEncoder(SHAPE)).blocks[0].attention
    bias = attention.bias(5)  # type: ignore[operator, union-attr]
    assert bias.shape == (SHAPE.heads, 5, 5)
    for back in range(5):
        assert (bias.diagonal(-back, 1, 2) == attention.distances[:, back, None]).all()  # type: ignore[index, union-attr]
    assert torch.isneginf(bias[:, 0, 1:]).all()


def test_attention_written_out_equals_the_fused_one() -> None:
    encoder = with_distances(UserEncoder(SHAPE))
    vectors, types, lengths = batch()
    assert torch.allclose(encoder.train()(vectors, types, lengths), encoder.eval()(vectors, types, lengths), atol=1e-5)


def encoded() -> tuple[ItemEncoder, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    inputs = {name: torch.from_numpy(array) for name, array in item_inputs(ITEMS, INPUTS).items()}
    return ItemEncoder(len(ITEMS), 8, INPUTS, content=True), inputs


def test_the_sparse_road_equals_the_dense_one_with_its_gradient() -> None:
    encoder, inputs = encoded()
    bags = ItemBags.build(encoder, inputs)
    dense = encoder(**inputs)
    sparse = encoder.table(bags, torch.zeros(len(ITEMS), dtype=torch.bool))
    assert torch.allclose(dense, sparse, atol=1e-6)
    pull = torch.randn_like(dense)
    gradients = []
    for road in (dense, sparse):
        encoder.zero_grad()
        (road * pull).sum().backward(retain_graph=True)
        assert encoder.words.weight.grad is not None
        gradients.append(encoder.words.weight.grad.clone())
    gradients[0][0] = 0  # the padding word, which only the dense road touches, with no effect
    assert torch.allclose(*gradients, atol=1e-6)


def test_the_vectors_of_some_items_are_their_rows_of_the_table_with_the_same_gradient() -> None:
    encoder, inputs = encoded()
    bags, rows, keep = ItemBags.build(encoder, inputs), torch.tensor([2, 0, 0]), torch.tensor([True, False, True])
    pull = torch.randn(3, 8)
    (encoder.table(bags, keep)[rows] * pull).sum().backward()
    expected = [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]
    encoder.zero_grad()
    some = encoder.vectors(encoder.ids.weight[rows], bags.take(rows), keep[rows])
    (some * pull).sum().backward()
    assert torch.allclose(some, encoder.table(bags, keep)[rows], atol=1e-6)
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert len(gradients) == len(expected) == 4
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("content", [False, True])
def test_a_table_computed_in_blocks_is_the_table(content: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, inputs = encoded()
    bags = ItemBags.build(encoder, inputs) if content else None
    keep = torch.tensor([True, False, True])
    monkeypatch.setattr(encoders, "TABLE_BLOCK", 2)
    table = encoder.finished_table(bags, keep)
    assert not table.requires_grad
    assert torch.allclose(table, encoder.table(bags, keep), atol=1e-6)


def test_history_is_added_only_where_it_is_kept() -> None:
    encoder, inputs = encoded()
    bags = ItemBags.build(encoder, inputs)
    table = encoder.table(bags, torch.tensor([True, False, True]))
    content = encoder(**inputs)
    assert torch.allclose(table[0], content[0] + encoder.ids.weight[0], atol=1e-6)
    assert torch.allclose(table[1], content[1], atol=1e-6)


def test_without_content_a_new_item_lies_at_the_origin() -> None:
    encoder = ItemEncoder(3, 8, INPUTS, content=False)
    inputs = {name: torch.from_numpy(array) for name, array in item_inputs(ITEMS, INPUTS).items()}
    assert encoder(**inputs).abs().max() == 0


def test_the_order_of_a_querys_words_and_its_padding_do_not_matter() -> None:
    encoder = QueryEncoder(32, 8).eval()
    one, other = (torch.from_numpy(query_inputs(text, INPUTS)["tokens"]) for text in ("red shoe", "shoe red"))
    assert torch.allclose(encoder(one), encoder(other), atol=1e-6)
    assert torch.allclose(encoder(one), encoder(one[:, :2]), atol=1e-6)
    assert torch.isfinite(encoder(torch.zeros_like(one))).all()


def test_cheap_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropped = CheapDropout(0.25).train()(torch.ones(200, 333))
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.01
    assert abs(float(dropped.mean()) - 1) < 0.02
    by_byte = (dropped.flatten()[: 66600 // 8 * 8].view(-1, 8) == 0).float().mean(0)
    assert (by_byte - 0.25).abs().max() < 0.02
    assert torch.equal(CheapDropout(0.25).eval()(torch.ones(3)), torch.ones(3))


def test_the_bias_of_training_is_that_of_serving() -> None:
    attention = CausalAttention(SHAPE)
    torch.nn.init.normal_(attention.distances)
    for length in (1, 2, 7, SHAPE.max_length):
        plain, slanted = attention.bias(length), attention.slanted_bias(length)
        assert torch.equal(plain, slanted)
        weights = torch.randn(plain.shape)
        gradients = [
            torch.autograd.grad((bias.exp() * weights).sum(), attention.distances)[0] for bias in (plain, slanted)
        ]
        torch.testing.assert_close(*gradients)
