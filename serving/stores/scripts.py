"""The scripts that run inside Redis: each is one atomic step on the keys of one partition.

They stand in `lua/`. A line `--! include NAME` is replaced by another file, `--! constant NAME ...` by numbers that
Python knows too. Ids are opaque bytes in them; log ids, too large for the numbers of Lua, travel as 8 big-endian bytes.
"""

from __future__ import annotations

import re
from importlib import resources

from features.profile_codec import HEADER_SIZE, LATER_FORMATS, OLDEST_FORMAT, SMALLEST_STATE
from features.records import ENTRY
from serving.redis.connection import Script
from serving.stores.keys import LIVE, SEQUENCE_BITS

CONSTANTS = {
    "ENTRY": ENTRY.itemsize,
    "HEADER": HEADER_SIZE,
    "STATE": SMALLEST_STATE,
    "OLDEST_FORMAT": OLDEST_FORMAT,
    "FIRST_LATER_FORMAT": LATER_FORMATS[0],
    "LAST_LATER_FORMAT": LATER_FORMATS[-1],
    "LIVE_HIGH": LIVE >> 32,
    "SEQUENCE_BITS": SEQUENCE_BITS,
    "SEQUENCES": 1 << SEQUENCE_BITS,
}
"""The numbers that scripts may ask for; `LIVE_HIGH` is the upper half of the first live log id."""

_DIRECTIVE = re.compile(r"^--! (include|constant) (.+)$", re.MULTILINE)


def read_script(name: str) -> str:
    """Returns a script with its includes and constants.

    Args:
        name: Path below `lua/`, without the ending.

    Raises:
        KeyError: The script asks for a constant that does not exist.
        FileNotFoundError: The script, or one that it includes, does not exist.
    """
    text = resources.files("serving.stores").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    return _DIRECTIVE.sub(_expand, text)


def _expand(directive: re.Match[str]) -> str:
    kind, names = directive.groups()
    if kind == "include":
        return read_script(names)
    return "\n".join(f"local {name} = {CONSTANTS[name]}" for name in names.split())


def _script(name: str, *, durable: bool = False) -> Script:
    return Script.of(read_script(name), durable=durable)


# `durable`: the reply is a promise, so that the write is proved to be on disk before it counts.
PROFILE_APPLY = _script("profile/apply")
PROFILE_COMPACT = _script("profile/compact")
PROFILE_EVICT = _script("profile/evict")
PROFILE_MARK = _script("profile/mark")
PROFILE_PUT = _script("profile/put")
PROFILE_REPLACE = _script("profile/replace")

EVENT_APPEND = _script("log/event_append", durable=True)
EVENT_ERASE = _script("log/event_erase", durable=True)
EVENT_UNDO = _script("log/event_undo", durable=True)
IMPRESSION_APPEND = _script("log/impression_append")
USER_MARK = _script("log/user_mark", durable=True)
USER_RETURN = _script("log/user_return")
LOG_CLAIM = _script("log/claim")
LOG_JOIN = _script("log/join")
LOG_RELEASE = _script("log/release")
LOG_TIMES = _script("log/times")
LOG_TRIM = _script("log/trim")
CERTIFICATE_DATE = _script("log/certificate_date")
CERTIFICATE_ISSUE = _script("log/certificate_issue", durable=True)
HASH_CHOOSE = _script("log/hash_choose")
HASH_SET = _script("log/hash_set")

CATALOG_APPLIED = _script("catalog/applied")
CATALOG_LOWEST = _script("catalog/lowest")
CATALOG_PUT = _script("catalog/put", durable=True)
