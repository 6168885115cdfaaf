"""Which items, creators and categories a catalogue has by name, and what a name that it lacks may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from features.arrays import pc
from features.catalog import Catalog
from features.keys import bare_name, item_key

_FEW = 20_000
"""Names up to which signs and plurals are looked through too; of more, only case and blanks."""
_FUZZY = (2_000, 20)
"""Names among which misspelt ones are looked for, and how many of these: each costs a millisecond."""
_LONGEST = 100


def look_up(catalog: Catalog, kind: str, names: Sequence[str]) -> dict[str, str]:
    """Returns what the catalogue calls each name: the name itself if it has it, else one that differs little, or "".

    Args:
        catalog: The catalogue.
        kind: "item", "creator" or "category", an item's first one.
        names: External ids of items or creators, or names of categories.
    """
    keys = {item_key(name): name for name in names}
    had = catalog.rows_with(kind, list(keys))
    lacking = [name for key, name in keys.items() if key not in had]
    found = {name: name for name in names} | dict.fromkeys(lacking, "")
    return found | _alike(catalog.names(kind), lacking) if lacking else found


def _alike(names: pa.ChunkedArray[Any], wanted: Sequence[str]) -> dict[str, str]:
    """The names that differ from wanted ones in little, by the wanted one; none where there is none."""
    if len(names) > _FEW:
        plain = pc.utf8_lower(pc.utf8_trim_whitespace(names))
        asked = {name.strip().lower(): name for name in wanted}
        same = pc.is_in(plain, value_set=pa.array(list(asked), plain.type))
        held = zip(plain.filter(same).to_pylist(), names.filter(same).to_pylist(), strict=True)
        return {asked[low]: str(name) for low, name in held}
    known = {_plain(name): str(name) for name in reversed(names.to_pylist())}
    found = {name: known[_plain(name)] for name in wanted if _plain(name) in known}
    most, often = _FUZZY
    for name in [name for name in wanted if name not in found][: often if len(known) <= most else 0]:
        for close in difflib.get_close_matches(_plain(name)[:_LONGEST], known, 1, 0.8):
            found[name] = known[close]
    return found


def _plain(name: str) -> str:
    """A name without case, blanks, signs and the s of a plural; as it is where that leaves nothing."""
    return bare_name(name).removesuffix("s") or name
