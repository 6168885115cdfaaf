"""Items, creators and categories of a catalogue by name, and suggestions for names that it lacks."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from features.arrays import pc
from features.catalog import Catalog
from features.keys import bare_name, item_key

_FEW = 20_000
"""Names up to which signs and plurals are ignored too; of more, only case and blanks."""
_FUZZY = (2_000, 20)
"""Most names of a catalogue, and most misspelt ones, that are compared letter by letter: each costs a millisecond."""
_LONGEST = 100


def look_up(catalog: Catalog, kind: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the name in the catalogue for each name: the same if it is there, else one that differs little, or "".

    Args:
        catalog: The catalogue.
        kind: "item", "creator" or "category", an item's first one.
        names: External ids of items or creators, or names of categories.
    """
    keys = {item_key(name): name for name in names}
    rows = catalog.rows_with(kind, list(keys))
    lacking = [name for key, name in keys.items() if key not in rows]
    matches = {name: name for name in names} | dict.fromkeys(lacking, "")
    return matches | _alike(catalog.names(kind), lacking) if lacking else matches


def _alike(names: pa.ChunkedArray[Any], lacking: Sequence[str]) -> dict[str, str]:
    """Returns the names that differ little from lacking ones, by the lacking one."""
    if len(names) > _FEW:
        plain = pc.utf8_lower(pc.utf8_trim_whitespace(names))
        by_plain = {name.strip().lower(): name for name in lacking}
        matching = pc.is_in(plain, value_set=pa.array(list(by_plain), plain.type))
        pairs = zip(plain.filter(matching).to_pylist(), names.filter(matching).to_pylist(), strict=True)
        return {by_plain[low]: str(name) for low, name in pairs}
    # Reversed, so that of names that differ in case alone the first of the catalogue stands.
    catalogue = {_plain(name): str(name) for name in reversed(names.to_pylist())}
    matches = {name: catalogue[_plain(name)] for name in lacking if _plain(name) in catalogue}
    most_names, most_misspelt = _FUZZY
    unmatched = [name for name in lacking if name not in matches]
    for name in unmatched[: most_misspelt if len(catalogue) <= most_names else 0]:
        for close in difflib.get_close_matches(_plain(name)[:_LONGEST], catalogue, 1, 0.8):
            matches[name] = catalogue[close]
    return matches


def _plain(name: str) -> str:
    """Returns a name without case, blanks, signs and the s of a plural; as it is if that leaves nothing."""
    return bare_name(name).removesuffix("s") or name
