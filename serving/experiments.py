"""Who is held out of personalisation, decided by a hash, so that lift can be measured later.

The bucket of a user depends on the salt and on their id alone: it is the same on every worker, after every restart. An
anonymous user who was merged into a user has that user's bucket from then on: the profile holds the seed of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from features.keys import item_key

BUCKETS = 10_000
SEEDS = 1 << 20
"""Number of seeds: enough for any share, and far too few to tell which user one is of."""


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
        """The arm of a subject by its own id; nobody ("") is in no arm."""
        return self.drawn(seed_of(subject)) if subject else NOBODY

    def drawn(self, seed: int) -> Assignment:
        """The arm of a seed, whatever the salt was when it was stored."""
        digest = hashlib.blake2b(seed.to_bytes(4, "little"), digest_size=8, key=self._salt).digest()
        bucket = int.from_bytes(digest, "little") % BUCKETS
        held = bucket < self._limit
        return Assignment("holdout" if held else "treatment", held, bucket)


def seed_of(subject: str) -> int:
    """What the arm of a subject is drawn from: a number below `SEEDS`, which does not name the user."""
    return item_key(subject) % SEEDS
