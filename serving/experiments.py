"""The holdout from personalisation, drawn by a hash, so that lift can be measured later.

The bucket of a user depends on the salt and on their id alone: it is the same on every worker, after every restart. An
anonymous user who was merged into a user has that user's bucket from then on: the profile holds the seed of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from features.keys import item_key

BUCKETS = 10_000
SEEDS = 1 << 20
"""Number of seeds: enough for any share, and far too few to tell which user a seed is of."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """The arm of one user; `bucket` (0 to 9999) decided it. `arm` is empty if the request names no user."""

    arm: str = ""
    holdout: bool = False
    bucket: int = 0


UNASSIGNED = Assignment()


class Holdout:
    """Assigns a share of the users to the unpersonalised answer."""

    def __init__(self, share: float, salt: str) -> None:
        self._limit = round(share * BUCKETS)
        self._salt = salt.encode()[:64]

    def assign(self, subject: str) -> Assignment:
        """Returns the arm of a subject by its own id; "" is in no arm."""
        return self.drawn(seed_of(subject)) if subject else UNASSIGNED

    def drawn(self, seed: int) -> Assignment:
        """Returns the arm of a seed, whatever the salt was when the seed was stored."""
        digest = hashlib.blake2b(seed.to_bytes(4, "little"), digest_size=8, key=self._salt).digest()
        bucket = int.from_bytes(digest, "little") % BUCKETS
        # A threshold on the bucket: users who are held out stay so when the share grows.
        holdout = bucket < self._limit
        return Assignment("holdout" if holdout else "treatment", holdout, bucket)


def seed_of(subject: str) -> int:
    """Returns the seed of a subject's arm: a number below `SEEDS`, which does not identify the user."""
    return item_key(subject) % SEEDS
