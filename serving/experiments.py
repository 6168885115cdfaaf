"""Who is held out of personalisation, decided by a hash, so that lift can be measured later.

The bucket of a person depends on the salt and on their id alone: it is the same on every worker, after every restart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

BUCKETS = 10_000


@dataclass(frozen=True, slots=True)
class Assignment:
    """The arm of one person; `bucket` (0 to 9999) decided it. `arm` is empty where nobody is asked about."""

    arm: str = ""
    holdout: bool = False
    bucket: int = 0


NOBODY = Assignment()


class Holdout:
    """Assigns a share of the people to the unpersonalised answer."""

    def __init__(self, share: float, salt: str) -> None:
        self._limit = round(share * BUCKETS)
        self._salt = salt.encode()[:64]

    def assign(self, subject: str) -> Assignment:
        """The arm of a subject; nobody ("") is in no arm."""
        if not subject:
            return NOBODY
        digest = hashlib.blake2b(subject.encode("utf-8", "surrogatepass"), digest_size=8, key=self._salt).digest()
        bucket = int.from_bytes(digest, "little") % BUCKETS
        held = bucket < self._limit
        return Assignment("holdout" if held else "treatment", held, bucket)
