"""Subjects, the keys of users: `u:` and a user id, or `a:` and the id of an anonymous user."""

from __future__ import annotations

import zlib
from typing import NewType

Subject = NewType("Subject", str)
"""The key of a user in every store."""

NO_SUBJECT = Subject("")
"""The subject of a request that names no user."""

PARTITIONS = 16
"""Partitions of a new event log if no number is configured."""

_KNOWN, _ANONYMOUS = "u:", "a:"
_PREFIXES = (_KNOWN, _ANONYMOUS)


def known(user_id: str) -> Subject:
    """Returns the subject of a user with an id."""
    return Subject(_KNOWN + user_id)


def anonymous(anonymous_id: str) -> Subject:
    """Returns the subject of an anonymous user."""
    return Subject(_ANONYMOUS + anonymous_id)


def is_anonymous(subject: str) -> bool:
    """Returns True if a subject is an anonymous user's."""
    return subject.startswith(_ANONYMOUS)


def id_of(subject: str) -> str:
    """Returns the id that a caller named: a user id or an anonymous id."""
    # Both prefixes have the same length.
    return subject[len(_KNOWN) :]


def user_id_of(subject: str) -> str:
    """Returns the name that tables have for a user: a user id, or the whole subject of an anonymous user.

    A user whose id itself begins like a subject is named by the subject, so no two users share a name.
    """
    user_id = id_of(subject)
    return user_id if subject.startswith(_KNOWN) and not user_id.startswith(_PREFIXES) else subject


def subject_of(user_id: str) -> Subject:
    """Returns the subject that `user_id_of` named."""
    return Subject(user_id) if user_id.startswith(_PREFIXES) else known(user_id)


def partition_of(subject: str, partitions: int) -> int:
    """Returns the partition of the event log that holds everything about a user."""
    # Part of the format of a log: by another hash, users would not be found where their entries are.
    return zlib.crc32(subject.encode()) % partitions
