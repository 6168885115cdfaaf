"""Ids become rows and come back, also from a mapped file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import VocabularyError
from features.keys import item_keys
from features.vocabulary import Vocabulary

ids = st.lists(st.text(min_size=1, max_size=12).filter(lambda s: s.isprintable() or True), unique=True, max_size=30)


@given(ids.filter(lambda names: all(_encodable(name) for name in names)))
def test_ids_and_rows_are_inverse(names):
    vocabulary = Vocabulary.build(names)
    assert vocabulary.rows(names).tolist() == list(range(len(names)))
    assert vocabulary.ids(np.arange(len(names))) == names
    assert vocabulary.rows_of_keys(item_keys(names)).tolist() == list(range(len(names)))
    assert [vocabulary.row_of_key(key) for key in item_keys(names).tolist()] == list(range(len(names)))
    assert {vocabulary.row_of_key(key) for key in (0, 2**64 - 1)} == {-1}


def _encodable(name: str) -> bool:
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)


def test_a_saved_vocabulary_opens_the_same(tmp_path):
    Vocabulary.build(["b", "a", "\0*{}\r\n\U0001f600"]).save(tmp_path / "vocabulary.arrow")
    opened = Vocabulary.open(tmp_path / "vocabulary.arrow")
    assert opened.ids([2, 0]) == ["\0*{}\r\n\U0001f600", "b"]
    assert opened.rows(["a", "nobody", ""]).tolist() == [1, -1, -1]


def test_an_empty_vocabulary_knows_nothing(tmp_path):
    Vocabulary.build([]).save(tmp_path / "v")
    assert Vocabulary.open(tmp_path / "v").rows(["a"]).tolist() == [-1]


@pytest.mark.parametrize(("names", "message"), [(["a", "b", "a"], "'a'"), (["a", ""], "empty")])
def test_ids_that_clash_are_refused(names, message):
    with pytest.raises(VocabularyError, match=message):
        Vocabulary.build(names)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "v").write_bytes(b"not arrow")
    with pytest.raises(VocabularyError, match="not a vocabulary"):
        Vocabulary.open(tmp_path / "v")
