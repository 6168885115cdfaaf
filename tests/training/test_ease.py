"""The forms of EASE agree with its closed form, and lambda is found on validation or told to be at its limit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.conftest import interactions
from tests.training.test_linear import last_events, sets_of_two_kinds, trial_of
from training.data.interactions import Interactions
from training.models import ease, linear, local_ease
from training.models.baselines import EaseBaseline
from training.models.ease import EaseByUsers, EaseForm, EaseSolution, ExactEase, ease_form, gram_of, search_ridge
from training.models.item_sets import ItemSets, item_sets, write_largest, write_largest_plain
from training.models.linear import fit_linear
from training.models.local_ease import (
    LocalEase,
    keep_largest,
    keep_largest_plain,
    nearest_items,
    regress,
    regress_plain,
)

RIDGE = 20.0


def random_sets(users: int, items: int, seed: int = 0, share: float = 0.2) -> ItemSets:
    """Choices at random; the last user and the last item have none."""
    random = np.random.default_rng(seed)
    chosen = random.random((users, items)) < share * random.random(items)
    chosen[-1], chosen[:, -1] = False, False
    histories = [np.flatnonzero(line).tolist() for line in chosen]
    data = interactions(histories, items)
    return item_sets(data, np.diff(data.offsets))


def dense_weights(sets: ItemSets, ridge: float = RIDGE) -> np.ndarray:
    """The closed form of the paper."""
    chosen = sets.dense().astype(np.float64)
    inverse = np.linalg.inv(chosen.T @ chosen + ridge * np.eye(sets.item_count))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights


def as_dense(rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
    table = np.zeros((rows.shape[0], rows.shape[0]))
    for item, (line, weights) in enumerate(zip(rows, scores, strict=True)):
        table[item, line[line >= 0]] = weights[line >= 0]
    return table


def solutions(sets: ItemSets, ridge: float = RIDGE) -> dict[str, EaseSolution]:
    """All forms; the local one regresses on all items that share a user, which these all do."""
    near = np.array([[j for j in range(sets.item_count) if j != i] for i in range(sets.item_count)], np.int32)
    return {
        "exact": ExactEase(gram_of(sets), ridge),
        "by users": EaseByUsers(sets, ridge),
        "local": LocalEase(sets, near, ridge),
    }


def test_the_sets_are_those_of_the_leading_choices() -> None:
    data = sets_of_two_kinds(repeats=True)
    _, ends = last_events(data)
    sets = item_sets(data, ends)
    histories = [data.rows[start : start + end] for start, end in zip(data.offsets[:-1], ends, strict=True)]
    assert [part.tolist() for part in np.split(sets.rows, sets.user_starts[1:-1])] == [
        np.unique(history).tolist() for history in histories if history.size
    ]
    dense = sets.dense()
    np.testing.assert_array_equal(gram_of(sets).numpy(), dense.T @ dense)
    assert sets.most_users == dense.sum(axis=0).max()


def test_ease_is_the_regression_of_each_item_on_the_others() -> None:
    sets = random_sets(80, 30)
    chosen = sets.dense().astype(np.float64)
    others = np.delete(np.arange(30), 7)
    inputs = chosen[:, others]
    expected = np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(29), inputs.T @ chosen[:, 7])
    for solution in solutions(sets).values():
        table = as_dense(*solution.table(29))
        np.testing.assert_allclose(table[others, 7], expected, atol=1e-6)
        assert table[7, 7] == 0


@pytest.mark.parametrize(("users", "items"), [(25, 60), (90, 40)])
@pytest.mark.parametrize("form", ["exact", "by users", "local"])
def test_a_form_has_the_weights_and_the_scores_of_the_closed_form(users: int, items: int, form: str) -> None:
    sets = random_sets(users, items)
    expected = dense_weights(sets)
    solution = solutions(sets)[form]
    rows, scores = solution.table(items - 1)
    np.testing.assert_allclose(as_dense(rows, scores), expected, atol=1e-5)
    assert (np.diff(np.abs(scores), axis=1) <= 0).all()
    assert (rows[-1] == -1).all()  # an item without users tells nothing
    few_rows, few_scores = solution.table(5)
    np.testing.assert_allclose(np.abs(few_scores), np.abs(scores[:, :5]), atol=1e-6)
    assert few_rows.shape == (items, 5)
    histories = [np.array([3, 1, 3, 8], np.int32), np.empty(0, np.int32), np.array([0], np.int32)]
    wanted = np.array([expected[np.unique(history)].sum(axis=0) for history in histories])
    np.testing.assert_allclose(solution.scores(histories), wanted, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 1000), st.sampled_from([0.5, 10.0, 3000.0]))
def test_the_forms_agree_whatever_the_sizes(users: int, items: int, seed: int, ridge: float) -> None:
    sets = random_sets(users, items, seed, share=0.6)
    tables = [as_dense(*solution.table(items - 1)) for solution in solutions(sets, ridge).values()]
    for table in tables[1:]:
        np.testing.assert_allclose(table, tables[0], atol=1e-5)


def test_past_the_limit_of_float64_the_weights_are_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ease, "EXACT_ITEMS", 10)
    sets = random_sets(40, 90)
    for name in ("exact", "by users"):
        np.testing.assert_allclose(as_dense(*solutions(sets)[name].table(89)), dense_weights(sets), atol=1e-4)


def test_the_kernels_agree_with_their_plain_twins() -> None:
    sets = random_sets(70, 50, share=0.5)
    near = nearest_items(sets)[:, :12].copy()
    weights, plain = (np.zeros((40, 12), np.float32) for _ in range(2))
    regress(sets, near, RIDGE, 10, (3, 40), weights)
    regress_plain(sets, near, RIDGE, 10, (3, 40), plain)
    np.testing.assert_allclose(weights, plain, atol=1e-6)
    assert (weights[:3] == 0).all()
    assert np.abs(weights[3:]).max() > 0.1

    inverse = torch.linalg.inv(torch.from_numpy(sets.dense() @ sets.dense().T + RIDGE * np.eye(sets.user_count)))
    diagonal = np.empty(50)
    ease.inverse_diagonal(sets, inverse.numpy(), RIDGE, (0, 50), diagonal)
    np.testing.assert_allclose(diagonal, ease.inverse_diagonal_plain(sets, inverse.numpy(), RIDGE), rtol=1e-9)
    tables = [(np.full((50, 6), -1, np.int32), np.zeros((50, 6), np.float32)) for _ in range(2)]
    ease.weigh_by_users(sets, inverse.numpy(), RIDGE, diagonal, (5, 50), *tables[0])
    ease.weigh_by_users_plain(sets, inverse.numpy(), RIDGE, diagonal, (5, 50), *tables[1])
    np.testing.assert_allclose(as_dense(*tables[0]), as_dense(*tables[1]), atol=1e-6)


@pytest.mark.parametrize("values", [[0.0, -3.0, 2.0, 0.5, -2.5], [0.0, 0.0, 0.0], [1.0], [-1.0, 2.0, 0.0, 3.0]])
def test_the_largest_weights_are_those_of_a_sort(values: Sequence[float]) -> None:
    weights = np.array(values, np.float32)
    lines = [(np.full(3, -1, np.int32), np.zeros(3, np.float32)) for _ in range(2)]
    write_largest(weights, *lines[0])
    write_largest_plain(weights, *lines[1])
    for line, plain in zip(*lines, strict=True):
        np.testing.assert_array_equal(line, plain)


def test_a_table_keeps_the_largest_weights_of_each_item_of_a_history() -> None:
    random = np.random.default_rng(0)
    near = np.array([random.permutation(30)[:8] for _ in range(30)], np.int32)
    near[4, 3:] = -1
    weights = random.standard_normal((30, 8)).astype(np.float32)
    rows, scores = np.full((30, 5), -1, np.int32), np.zeros((30, 5), np.float32)
    filled, least = np.zeros(30, np.int32), np.zeros(30, np.int32)
    for start, end in itertools.pairwise([0, 7, 30]):
        keep_largest(near[start:end], weights[start:end], start, rows, scores, filled, least)
    for item, expected in enumerate(keep_largest_plain(near, weights, 5)):
        real = rows[item] >= 0
        assert dict(zip(rows[item][real].tolist(), scores[item][real].tolist(), strict=True)) == expected


def test_blocks_and_threads_change_no_bit_of_a_local_table(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = random_sets(200, 120, share=0.3)
    near = nearest_items(sets)[:, :20].copy()
    whole = LocalEase(sets, near, RIDGE).table(10)
    monkeypatch.setattr(local_ease, "_BLOCK_ITEMS", 13)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        in_blocks = LocalEase(sets, near, RIDGE).table(10)
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(whole, in_blocks, strict=True):
        np.testing.assert_array_equal(left, right)


def named(form: EaseForm | str) -> EaseForm:
    assert isinstance(form, EaseForm), form
    return form


def test_the_form_follows_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sets_of_two_kinds()  # 300 users, 60 items
    ends = last_events(data)[1]
    few = interactions([[0, 1, 2], [3, 4], [1, 5, 6]], items=60)
    few_ends = np.diff(few.offsets)
    assert named(ease_form(data, ends)).name == "exact"
    assert named(ease_form(few, few_ends)).name == "by users"
    assert "3 users" in named(ease_form(few, few_ends)).why
    monkeypatch.setattr(ease, "USERS_WORK", 10)
    assert named(ease_form(few, few_ends)).name == "exact"
    monkeypatch.setattr(ease, "EASE_ITEMS", 2)
    assert named(ease_form(data, ends)).name == "local"
    # A table of many items keeps its regressions within `LOCAL_ENTRIES`, down to the fewest that make sense.
    monkeypatch.setattr(local_ease, "LOCAL_ENTRIES", 20 * 60)
    assert nearest_items(item_sets(data, ends)).shape == (60, 20)
    monkeypatch.setattr(local_ease, "LOCAL_ENTRIES", 15 * 60)
    why = ease_form(data, ends)
    assert isinstance(why, str)
    assert "15 nearest items" in why


def no_cosines(data: Interactions) -> tuple[np.ndarray, np.ndarray]:
    return np.full((data.items, 10), -1, np.int32), np.zeros((data.items, 10), np.float32)


def test_a_large_catalogue_takes_the_local_form_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    data = sets_of_two_kinds()
    trial, *_, ends = trial_of(data)
    exact = fit_linear(data, ends, trial, no_cosines(data)).facts
    monkeypatch.setattr(ease, "EASE_ITEMS", 2)
    monkeypatch.setattr(local_ease, "LOCAL_ITEMS", 100)
    part = fit_linear(data, ends, trial, no_cosines(data))
    assert (part.facts["table"], part.facts["form"]) == ("ease", "local")
    assert "regressed on the 59 items" in part.facts["why"]
    assert part.facts["with"] > 2 * part.facts["without"]
    # On 59 of 59 others the local form is the exact one.
    assert part.facts["with"] == pytest.approx(exact["with"], abs=0.01)
    form = named(ease_form(data, ends))
    targets, _ = last_events(data)
    baseline = EaseBaseline.best(data, form, targets, repeats=False)
    assert baseline.facts["form"] == "local"
    assert baseline.facts["lambdas"][f"{baseline.facts['lambda']:g}"] == max(baseline.facts["lambdas"].values())
    monkeypatch.setattr(linear, "ease_form", lambda *_: "too many items")
    part = fit_linear(data, ends, trial, no_cosines(data))
    assert (part.facts["form"], part.facts["why"]) == ("cosines", "too many items")


class Named:
    """A solution that is its lambda."""

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge

    def table(self, keep: int) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError(keep)

    def scores(self, histories: Sequence[np.ndarray]) -> np.ndarray:
        raise AssertionError(histories)


def best_near(peak: float, limits: tuple[float, float] = (1.0, 1e5)) -> tuple[float, ease.RidgeSearch]:
    form = EaseForm("exact", "", (10.0, 50.0, 200.0, 1000.0), limits, Named)

    def attempt(solution: EaseSolution) -> tuple[float, float]:
        assert isinstance(solution, Named)
        return solution.ridge, -abs(np.log(solution.ridge / peak))

    return search_ridge(form, attempt)


@pytest.mark.parametrize(("peak", "found"), [(60.0, 50.0), (2.6, 2.5), (17_000.0, 16_000.0), (200.0, 200.0)])
def test_lambda_is_looked_for_until_the_best_is_between_others(peak: float, found: float) -> None:
    ridge, search = best_near(peak)
    assert ridge == search.ridge == found
    assert min(search.values) < found < max(search.values)
    assert search.warning is None
    assert list(search.as_facts()["lambdas"]) == [f"{value:g}" for value in sorted(search.values)]


@pytest.mark.parametrize(("peak", "limit", "word"), [(0.01, 1.0, "least"), (1e9, 1e5, "largest")])
def test_a_best_lambda_at_its_limit_is_told(peak: float, limit: float, word: str) -> None:
    ridge, search = best_near(peak)
    assert ridge == limit
    assert search.warning is not None
    assert word in search.warning
    assert search.as_facts()["warning"] == search.warning


def test_a_lambda_at_its_limit_is_in_the_result_and_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sets_of_two_kinds()
    trial, *_, ends = trial_of(data)
    fit_linear(data, ends, trial, no_cosines(data))
    quiet = capsys.readouterr().err
    monkeypatch.setattr(ease, "LAMBDAS", (50.0,))
    monkeypatch.setattr(ease, "_limits", lambda most: (50.0, 50.0))
    part = fit_linear(data, ends, trial, no_cosines(data))
    assert "of those tried, 50" in part.facts["warning"]
    assert "of those tried, 50" in capsys.readouterr().err
    assert "of those tried, 50" not in quiet
