"""Reads prices, lists and maps that were written as one text each.

A text is read if it can mean one thing only. One that can mean two, such as the price `1,299`, is not read, because a
wrong number is worse than a missing one.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from features.arrays import Array, Mask, matches, only, pc, to_mask, trimmed

_CURRENCY = r"(?:[A-Z]{0,3}\p{Sc}|[A-Z]{3}|kr\.?|zł|Kč|Ft|Fr\.|lei)"
_AMOUNTS = {
    r"\d{1,25}(?:\.\d{0,2}|\.\d{4,25})?": "",
    r"\d{1,25},\d{1,2}": "",
    r"\d{1,3}(?:[ \x{a0}\x{202f}'\x{2019}]\d{3})+(?:[.,]\d{1,2})?": r"[ \x{a0}\x{202f}'\x{2019}]",
    r"\d{1,3}(?:,\d{3})+\.\d{1,2}|\d{1,3}(?:,\d{3}){2,}": ",",
    r"\d{1,3}(?:\.\d{3})+,\d{1,2}|\d{1,3}(?:\.\d{3}){2,}": r"\.",
}
"""Amounts by how they are written; and the sign between their groups of three digits."""

_OPENED = ('["', "['", '{"', "{'", "('", '("')
_JUXTAPOSED = re.compile(r"[^\[,\s(]['\"]\s*['\"][^\],\s)]")
"""Two texts without a comma between them, as numpy prints them: Python would join them."""

MISSING_WORDS = ("nan", "NaN", "None", "null", "NULL", "<NA>", "NaT", "\\N", "undefined")
"""The texts that programs write for a value that is missing, where it went through text: str(None), String(null)."""

_AND = re.compile(r"(&|\b(and|und|et|y|e|og|och|en)\b)")


def prices(text: Array) -> tuple[Array, Mask]:
    """Returns the amounts of texts that are one price, and a mask of these texts: `$12.99`, `1,299.00`, `12,99 €`.

    Not read are more or less than one amount (`from 14.99`), and a last group of three digits that may be thousands or
    a fraction: `1,299`, and `1.299` where a currency stands with it, for alone it is a number as programs write it.
    """
    amount = pa.array([None] * len(text), pa.string())
    for pattern, groups in _AMOUNTS.items():
        whole = rf"^(?:{_CURRENCY}\s?)?(?:{pattern})(?:\s?{_CURRENCY})?$"
        fitting = only(text, matches(text, whole))
        bare = pc.replace_substring_regex(fitting, _CURRENCY, "")
        bare = pc.utf8_trim_whitespace(bare)
        bare = pc.replace_substring_regex(bare, groups, "") if groups else bare
        amount = pc.coalesce(amount, pc.replace_substring(bare, ",", "."))
    return pc.cast(amount, pa.float64()), to_mask(amount.is_valid())


@dataclass
class ListStyle:
    """The form in which a column writes lists of texts as one text, seen from all its cells.

    Attributes:
        sign: "|" or ";" where some cell holds it, the former first; else ",".
        parts: The texts between commas, with the number of different cells that have them.
    """

    sign: str = ","
    parts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, cells: Iterable[str]) -> ListStyle:
        """Returns the style of a column with these different cells."""
        loose = [cell for cell in cells if not _is_bracketed(cell)]
        # Names have commas in them, but hardly ever a bar or a semicolon: one cell with such a sign decides for all.
        sign = next((sign for sign in "|;" if any(sign in cell for cell in loose)), ",")
        return cls(sign, Counter(part for cell in loose for part in set(_cut(cell, ","))) if sign == "," else Counter())

    def split(self, cell: str) -> list[str]:
        """Returns the texts of one cell.

        Between commas, a last text with "and" in it ends one name (`Health, Beauty & Care`), unless another cell shares
        some of the texts.
        """
        parts = _cut(cell, self.sign)
        if self.sign == "," and len(parts) > 1 and _AND.search(parts[-1]):
            return parts if any(self.parts[part] > 1 for part in parts) else [cell.strip()]
        return parts


def distinct(column: Array) -> set[str]:
    """Returns the different texts of a column, without white space around them."""
    return {cell for cell in pc.unique(trimmed(column)[0]).to_pylist() if cell and cell not in MISSING_WORDS}


def lists(column: Array, style: ListStyle | None) -> tuple[Array, Mask]:
    """Returns lists of texts, NULL for an empty cell or one that cannot be read, and a mask of the latter.

    An array in JSON, Python or Postgres wins over signs between texts; entries are trimmed, empty ones are left out.

    Args:
        column: Texts.
        style: The style by which cells without brackets are split; None takes such a cell for a list of one.
    """
    return _by_cell(column, lambda cell: _list(cell, style), pa.list_(pa.string()))


def maps(column: Array) -> tuple[Array, Mask]:
    """Returns maps written as JSON objects, NULL for an empty cell or one that cannot be read; a mask of the latter."""
    return _by_cell(column, _map, pa.map_(pa.string(), pa.string()))


def _by_cell(column: Array, read: Callable[[str], Any], dtype: pa.DataType) -> tuple[Array, Mask]:
    """Reads each different text once; `read` gives None for one that it cannot read."""
    text, empty, broken = trimmed(column)
    empty |= to_mask(pc.is_in(text, value_set=pa.array(MISSING_WORDS)))
    encoded = only(text, ~empty).dictionary_encode()
    distinct_values = [read(cell) for cell in encoded.dictionary.to_pylist()]
    values = pa.array(distinct_values, dtype).take(encoded.indices)
    return values, broken | (to_mask(text.is_valid()) & ~empty & to_mask(values.is_null()))


def _is_bracketed(cell: str) -> bool:
    return (cell[0] + cell[-1] in ("[]", "{}") and len(cell) > 1) or cell.startswith(_OPENED)


def _list(cell: str, style: ListStyle | None) -> list[str] | None:
    if not _is_bracketed(cell):
        return style.split(cell) if style else [cell]
    if (loaded := _loaded(cell)) is not None:
        return _texts(loaded)
    # Neither JSON nor Python: a list printed without quotes, as DuckDB and Postgres print theirs.
    inner = cell[1:-1].strip()
    if cell.startswith(_OPENED) or any(sign in inner for sign in "[]{}:'"):
        return None
    parts = _cut(inner, ",")
    return None if "NULL" in parts else parts


def _loaded(cell: str) -> Any:
    """Returns a text read as JSON or else as Python, its numbers as they are written; None if it is neither."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(cell, parse_int=str, parse_float=str, parse_constant=str)
    if _JUXTAPOSED.search(cell):
        return None
    with (
        warnings.catch_warnings(),
        contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError),
    ):
        # Python warns of an escape such as \d in its source, which these texts were never meant to be.
        warnings.simplefilter("ignore")
        return ast.literal_eval(cell)
    return None


def _texts(entries: Any) -> list[str] | None:
    if not isinstance(entries, list | tuple):
        return None
    if not all(isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in entries):
        return None
    return [text for entry in entries if (text := str(entry).strip())]


def _cut(cell: str, sign: str) -> list[str]:
    """Returns the parts between separators; quotes protect the ones inside."""
    parts = next(csv.reader([cell], delimiter=sign, skipinitialspace=True)) if '"' in cell else cell.split(sign)
    return [part.strip() for part in parts if part.strip()]


def _map(cell: str) -> list[tuple[str, str]] | None:
    entries = _loaded(cell)
    if not isinstance(entries, dict):
        return None
    if not all(isinstance(value, str | int | float | None) for value in entries.values()):
        return None
    # Booleans stay as JSON writes them; as text, Python's own would be `True`.
    plain = {str(name): str(value).lower() if isinstance(value, bool) else value for name, value in entries.items()}
    return [(name, str(value)) for name, value in plain.items() if value is not None]


def as_bools(text: Array) -> Array:
    """Returns the booleans of the usual words for them, NULL elsewhere."""
    lower = pc.replace_substring_regex(pc.utf8_lower(text), r"^https?://schema\.org/", "")
    lower = pc.replace_substring_regex(lower, r"[\s_-]+", " ")
    true, false = (pc.is_in(lower, value_set=pa.array(words)) for words in (_TRUE, _FALSE))
    return only(true, to_mask(true) | to_mask(false))


# pandas makes a column of 0 and 1 floats as soon as one is missing: hence 1.0 and 0.0.
_TRUE = ("true", "t", "yes", "y", "on", "1", "1.0", "in stock", "instock", "available")
_FALSE = (
    "false",
    "f",
    "no",
    "n",
    "off",
    "0",
    "0.0",
    "out of stock",
    "outofstock",
    "sold out",
    "soldout",
    "unavailable",
)
