"""BM25 against a formula written out by hand, and each kernel against its plain twin."""

from __future__ import annotations

import itertools
import math
import threading
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.transforms import text_tokens
from serving.bundle import postings
from serving.bundle import text_index as lexical
from serving.bundle.postings import K1, B
from serving.bundle.text_index import MAX_QUERY_TOKENS, LexicalIndex

TEXTS = ["red running shoes", "blue shoes", "red red wine", "", "a wine glass for red wine", "running"]


def make(texts: list[str]) -> LexicalIndex:
    tokens = [text_tokens(text) for text in texts]
    offsets = np.cumsum([0, *(words.size for words in tokens)]).astype(np.int64)
    return LexicalIndex(offsets, np.concatenate([np.empty(0, np.uint32), *tokens]))


def bm25(texts: list[str], query: str) -> list[float]:
    """The textbook, word by word."""
    documents = [text_tokens(text).tolist() for text in texts]
    average = sum(map(len, documents)) / len(documents)
    words = list(dict.fromkeys(text_tokens(query).tolist()))
    rarity = {}
    for word in words:
        holders = sum(word in document for document in documents)
        rarity[word] = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
    most = sum(rarity.values()) * (K1 + 1)
    scores = []
    for document in documents:
        score = 0.0
        for word in words:
            times = document.count(word)
            score += rarity[word] * times * (K1 + 1) / (times + K1 * (1 - B + B * len(document) / average))
        scores.append(score / most)
    return scores


@pytest.mark.parametrize("query", ["red", "red wine", "running shoes", "red red red", "red unknown", "wine glasses"])
def test_scores_as_the_textbook_does(query):
    index, expected = make(TEXTS), np.array(bm25(TEXTS, query))
    rows, scores = index.search(text_tokens(query), 10)
    order = sorted(np.flatnonzero(expected).tolist(), key=lambda row: (-expected[row], row))
    assert rows.tolist() == order
    np.testing.assert_allclose(scores, expected[order], rtol=1e-5)
    np.testing.assert_allclose(index.score(text_tokens(query), np.arange(6, dtype=np.int32)), expected, rtol=1e-5)
    assert 0 < scores.min() <= scores.max() <= 1


def test_a_score_does_not_depend_on_who_else_is_allowed():
    index, query = make(TEXTS), text_tokens("red wine")
    rows, scores = index.search(query, 10)
    for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
        allowed = np.packbits(np.arange(6) == row, bitorder="little")
        one, its = index.search(query, 10, allowed)
        assert one.tolist() == [row]
        assert its.tolist() == [score] == index.score(query, one).tolist()


def test_keeps_the_best_and_breaks_ties_by_row():
    index = make(["same words"] * 50 + ["same"])
    rows, _ = index.search(text_tokens("same words"), 7)
    assert rows.tolist() == list(range(7))


def test_bits_behind_the_bitmap_do_not_allow():
    index = make(["wine"] * 20)
    assert index.search(text_tokens("wine"), 20, np.full(1, 255, np.uint8))[0].tolist() == list(range(8))
    assert index.search(text_tokens("wine"), 20, np.empty(0, np.uint8))[0].size == 0


def test_items_come_change_and_go():
    index, wine = make(TEXTS), text_tokens("wine")
    index.put([6, 1], [text_tokens("wine wine"), text_tokens("white wine")])
    now = ["red running shoes", "white wine", "red red wine", "", "a wine glass for red wine", "running", "wine wine"]
    rows, scores = index.search(wine, 10)
    assert sorted(rows.tolist()) == [1, 2, 4, 6]
    assert rows[0] == 6
    np.testing.assert_array_equal(index.score(wine, rows), scores)
    assert index.search(text_tokens("blue"), 10)[0].size == 0
    # The order is that of an index built from the new texts; only the average length is the old one.
    assert rows.tolist() == make(now).search(wine, 10)[0].tolist()
    index.remove([6, 2])
    assert sorted(index.search(wine, 10)[0].tolist()) == [1, 4]
    index.put([2], [text_tokens("wine")])
    assert sorted(index.search(wine, 10)[0].tolist()) == [1, 2, 4]


def test_nothing_in_nothing_out():
    for texts in ([], ["", ""], TEXTS):
        index = make(texts)
        rows, scores = index.search(text_tokens("nowhere"), 5)
        assert rows.size == scores.size == 0
        assert index.search(np.empty(0, np.uint32), 5)[0].size == 0
        assert index.score(text_tokens("nowhere"), np.arange(len(texts), dtype=np.int32)).tolist() == [0.0] * len(texts)
    index = make([])
    index.put([0], [text_tokens("first item")])
    assert index.search(text_tokens("first"), 5)[0].tolist() == [0]


def test_only_so_many_words_count():
    index = make([" ".join(f"w{n}x" for n in range(100))])
    many = text_tokens(" ".join(f"w{n}x" for n in range(100)))
    first = index.search(many[:MAX_QUERY_TOKENS], 1)[1]
    assert index.search(many, 1)[1] == first


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="token_offsets"):
        LexicalIndex(np.array([0, 3]), np.zeros(2, np.uint32))
    with pytest.raises(ValueError, match="at least 1"):
        make(TEXTS).search(text_tokens("red"), 0)


texts = st.lists(st.lists(st.sampled_from("abcdefg"), max_size=6), max_size=12)


def agree(index: LexicalIndex, query: str) -> None:
    """Holds each kernel against its plain twin, and `score` against `search`."""
    now, tokens = index._now, text_tokens(query)
    answers = []
    for kernel in (postings.accumulate, postings.accumulate_plain):
        sums, touched, count = np.zeros(now.size, np.float32), np.empty(now.size, np.int32), 0
        for part, words in lexical.weigh(now, tokens):
            count = kernel(part, words, now.moment, sums, touched, count)
        answers.append((sums.tolist(), sorted(touched[:count].tolist())))
    assert answers[0] == answers[1]
    rows = np.arange(now.size, dtype=np.int32)
    for kernel in (postings.look_up, postings.look_up_plain):
        out = np.zeros(now.size, np.float32)
        for part, words in lexical.weigh(now, tokens):
            kernel(part, words, now.moment, rows, out)
        assert out.tolist() == answers[0][0]
    for part in (now.base, *now.live):
        counts = [np.zeros(part.tokens.size, np.int64) for _ in range(2)]
        postings.count_holders(part, np.arange(part.tokens.size), now.moment, counts[0])
        postings.count_holders_plain(part, np.arange(part.tokens.size), now.moment, counts[1])
        assert counts[0].tolist() == counts[1].tolist()


@given(texts, texts, st.lists(st.sampled_from("abcdefgh"), max_size=4), st.sets(st.integers(0, 11)))
def test_kernels_agree_with_their_plain_twins(base, live, query, gone):
    index = make([" ".join(words) for words in base])
    index.put(range(5, 5 + len(live)), [text_tokens(" ".join(words)) for words in live])
    index.remove([row for row in gone if row < len(base)])
    agree(index, " ".join(query))


changes = st.lists(
    st.tuples(st.integers(0, 15), st.none() | st.lists(st.sampled_from("abcdefg"), max_size=5)), max_size=60
)


@given(texts, changes, st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=4), st.booleans())
def test_merging_changes_no_answer(base, steps, query, in_background):
    index = make([" ".join(words) for words in base])
    whole = make([" ".join(words) for words in base])
    with mock.patch.object(lexical, "AT_ONCE", 0 if in_background else 20_000):
        for row, words in steps:
            if words is None:
                index.remove([row])
            else:
                index.put([row], [text_tokens(" ".join(words))])
        settle(index)
    # The last state of each item, put at once.
    last = dict(steps)
    whole.remove([row for row, words in last.items() if words is None])
    whole.put(
        [row for row, words in last.items() if words is not None],
        [text_tokens(" ".join(words)) for words in last.values() if words is not None],
    )
    tokens = text_tokens(" ".join(query))
    agree(index, " ".join(query))
    for merged, expected in zip(index.search(tokens, 50), whole.search(tokens, 50), strict=True):
        assert merged.tolist() == expected.tolist()
    costs = [part.cost for part in index._now.live]
    assert all(older >= lexical.STEP * newer for older, newer in itertools.pairwise(costs))


def settle(index: LexicalIndex) -> None:
    """Waits until nothing is being merged."""
    while merger := index._merger:
        merger.join()


def test_a_change_costs_what_it_changes_whatever_was_put_before():
    index, tokens = make(TEXTS), text_tokens("some words of an item")
    merged: list[int] = []

    def counted(parts, counts):
        merged.append(sum(part.cost for part in parts))
        return postings.merge_postings(parts, counts)

    puts = 512
    with mock.patch.object(lexical, "merge_postings", counted):
        for turn in range(puts):
            index.put([6 + turn], [tokens])
        settle(index)
    # Each entry is merged once for each doubling; built again by each change, they would be merged 256 times.
    assert sum(merged) <= puts * (tokens.size + 1) * (2 + math.log2(puts))
    assert len(index._now.live) <= 2 + math.log2(puts)
    assert index.search(text_tokens("words"), 1000)[0].size == puts


def test_changes_go_on_while_large_postings_are_merged():
    index, query = make(TEXTS), text_tokens("first second third")
    with mock.patch.object(lexical, "AT_ONCE", 50):
        for turn, name in enumerate(("first", "second", "third")):
            for start in range(0, 300, 30):
                index.put(range(start, start + 30), [text_tokens(f"{name} {row}") for row in range(start, start + 30)])
            rows = index.search(text_tokens(name), 1000)[0]
            assert rows.size == 300, turn
        index.remove(range(0, 300, 2))
        settle(index)
        assert sorted(index.search(query, 1000)[0].tolist()) == list(range(1, 300, 2))
        agree(index, "third 7")


def test_a_search_sees_a_change_whole_or_not_at_all():
    index, query = make(["old thing"] * 30), text_tokens("old new")
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            if index.search(query, 100)[0].size != 30:
                wrong.append(1)

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(60):
        index.put(range(30), [text_tokens("new thing" if turn % 2 else "old thing")] * 30)
    stop.set()
    thread.join()
    assert not wrong
