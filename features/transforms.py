"""Pure functions from the text and fields of an item or a query to the arrays that its encoder reads."""

from __future__ import annotations

import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from features.keys import item_keys

_WORD = re.compile(r"\w+", re.UNICODE)
_DESCRIPTION_WORDS = 64
_WORDS = 1 << 16
"""Keys of words that are remembered while the texts of a catalogue are read."""


@dataclass(frozen=True, slots=True)
class ItemInputShapes:
    """Lengths of the content encoders' inputs, and numbers of buckets into which keys are hashed; 0 is padding."""

    token_buckets: int
    max_tokens: int
    category_buckets: int
    max_categories: int
    creator_buckets: int


def stem(word: str) -> str:
    """Takes a plural `s` off an English word (Harman, "How effective is suffixing?", 1991); others pass unchanged."""
    if len(word) > 4 and word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if len(word) > 2 and word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word


def words(text: str) -> list[str]:
    """Returns the words of a text: Unicode NFKC, lower case, plural taken off."""
    return [stem(word) for word in _words_as_written(text)]


def _words_as_written(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_token(word: str) -> int:
    """Returns the key of a word as it is written: CRC-32 of the UTF-8 bytes of its stem."""
    # Not the `hash` of Python, which differs from process to process.
    return zlib.crc32(stem(word).encode())


def remembering_token() -> Callable[[str], int]:
    """Returns a `word_token` that remembers words: looking one up costs a fifth of computing its key."""
    return lru_cache(_WORDS)(word_token)


def text_tokens(text: str, token_of: Callable[[str], int] = word_token) -> npt.NDArray[np.uint32]:
    """Returns one key per word of the text, in order; uint32 [n].

    Args:
        text: The text.
        token_of: Gives the key of a word: `word_token`, or a `remembering_token` for texts of a catalogue, which are
            made of few words. What users search for is not to be remembered.
    """
    return np.array(list(map(token_of, _words_as_written(text))), dtype=np.uint32)


def token_buckets(keys: npt.NDArray[Any], buckets: int) -> npt.NDArray[np.int64]:
    """Hashes keys into 1 to `buckets`, leaving 0 for padding."""
    return (1 + keys.astype(np.uint64) % np.uint64(buckets)).astype(np.int64)


WORDED = ("title", "description", "categories")
"""Fields that the text of an item is made of."""


def item_text(item: Mapping[str, Any]) -> str:
    """Returns the text of an item: title, categories, and the first words of its description."""
    # The encoder averages the words: all of a long description would outweigh the title.
    description = " ".join((item.get("description") or "").split()[:_DESCRIPTION_WORDS])
    return " ".join([item.get("title") or "", *(item.get("categories") or ()), description]).strip()


def item_inputs(items: Sequence[Mapping[str, Any]], shapes: ItemInputShapes) -> dict[str, npt.NDArray[Any]]:
    """Returns the inputs of the item encoder for items as rows of the canonical table.

    Returns:
        `tokens` int64 [n, max_tokens], `categories` int64 [n, max_categories], `creators` int64 [n] (0 = unknown),
        `prices` float32 [n] (log1p of the price; -1 = unknown).
    """
    count, token_of = len(items), remembering_token()
    tokens = np.zeros((count, shapes.max_tokens), np.int64)
    categories = np.zeros((count, shapes.max_categories), np.int64)
    creators = np.zeros(count, np.int64)
    prices = np.full(count, -1.0, np.float32)
    for row, item in enumerate(items):
        _fill(tokens[row], token_buckets(text_tokens(item_text(item), token_of), shapes.token_buckets))
        _fill(
            categories[row],
            token_buckets(item_keys(list(item.get("categories") or ())), shapes.category_buckets),
        )
        if creator := item.get("creator_id"):
            creators[row] = token_buckets(item_keys([creator]), shapes.creator_buckets)[0]
        price = item.get("price")
        if price is not None and math.isfinite(price) and price >= 0:
            prices[row] = math.log1p(price)
    return {"tokens": tokens, "categories": categories, "creators": creators, "prices": prices}


def query_inputs(text: str, shapes: ItemInputShapes) -> dict[str, npt.NDArray[Any]]:
    """Returns the input of the query encoder for one query: `tokens` int64 [1, max_tokens]."""
    tokens = np.zeros((1, shapes.max_tokens), np.int64)
    _fill(tokens[0], token_buckets(text_tokens(text), shapes.token_buckets))
    return {"tokens": tokens}


def _fill(row: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> None:
    count = min(row.size, values.size)
    row[:count] = values[:count]
