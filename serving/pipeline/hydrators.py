"""What is found out about a query before anything is retrieved: the person, and the words."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from features.assemble import chosen_rows, encoder_inputs, history, rows_read, seen_rows
from features.catalog import Catalog
from features.controls import Dial, Dials, arm_seed, dials
from features.errors import ProfileCorrupt
from features.profile import EVERY_PURPOSE, Purpose
from features.profile import Profile as Stored
from features.profile_codec import PAST_LOST
from features.transforms import ItemInputShapes, query_inputs, text_tokens
from serving.bundle.model import Model
from serving.concurrency import ConcurrencyLimit
from serving.errors import ProfileStoreUnavailable
from serving.experiments import Holdout
from serving.pipeline.query import Query

WAIT_SHARE = 0.5
"""Share of the time left that a query may spend waiting for a version."""

_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.01


class CatalogProgress:
    """How far this worker has followed the catalogue's changes."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self._moved = threading.Condition()

    def reach(self, version: int) -> None:
        """Notes that everything up to `version` is applied here; lower only where the log began anew."""
        with self._moved:
            self.version = version
            self._moved.notify_all()

    def wait(self, version: int, seconds: float) -> bool:
        """Waits until `version` is applied; False when the time is over first."""
        if self.version >= version:
            return True
        with self._moved:
            return self._moved.wait_for(lambda: self.version >= version, max(seconds, 0.0))


class CatalogVersion:
    """Waits for the version of the catalogue that the caller wants to see."""

    name = "catalog_version"
    part = "CATALOG_STALE"

    def __init__(self, progress: CatalogProgress, turns: ConcurrencyLimit) -> None:
        self._progress, self._turns = progress, turns

    def enable(self, query: Query) -> bool:
        """Always: the answer names the version it was made from."""
        return True

    def hydrate(self, query: Query) -> None:
        """Fills `catalog_version`."""
        wanted = query.min_catalog_version
        if wanted > self._progress.version:
            with self._turns.given_up():
                came = self._progress.wait(wanted, query.seconds_left() * WAIT_SHARE)
            if not came:
                query.degrade(self.part, f"the catalogue is at version {self._progress.version} here, not at {wanted}")
        query.catalog_version = self._progress.version


class ProfileReader(Protocol):
    """What profiles are read from: the store, and what warms a worker up."""

    def read(self, subject: str) -> Stored:
        """Returns the profile of a subject."""
        ...


class Profile:
    """Reads the person's profile: one round trip, more only while a version is waited for."""

    name = "profile"
    part = "PROFILE_STORE"

    def __init__(
        self,
        store: ProfileReader,
        catalog: Catalog,
        type_index: Mapping[int, int],
        seen_keys: npt.NDArray[np.uint32],
        turns: ConcurrencyLimit,
        default: Purpose = EVERY_PURPOSE,
        segments: Mapping[int, str] | None = None,
        holdout: Holdout | None = None,
    ) -> None:
        """Takes the store, how a bundle sees events, the segments that it has a table of, and how arms are drawn."""
        self._store, self._catalog, self._turns = store, catalog, turns
        self._type_index, self._seen_keys, self._default = type_index, seen_keys, default
        self._segments, self._holdout = segments or {}, holdout

    def reading(self, store: ProfileReader) -> Profile:
        """Returns the same hydrator with another store."""
        other = copy.copy(self)
        other._store = store
        return other

    def enable(self, query: Query) -> bool:
        """Where a person is named."""
        return bool(query.subject)

    def hydrate(self, query: Query) -> None:
        """Fills `rules` and `dials`: what the person said. Then what they did, where that may shape the answer.

        That is `profile`, `history`, `seen` and `segment`, of nobody who is held out or whose answer is not to be
        personal. Where they do not allow personal answers, nothing was kept of either, and only `withheld` is filled.
        """
        try:
            profile = self._read(query)
        except ProfileCorrupt as error:
            query.degrade("PROFILE_CORRUPT", str(error))
            return
        if profile.lost:
            query.degrade("PROFILE_CORRUPT", PAST_LOST)
        self._share_arm(query, profile)
        if not self._allows(profile):
            query.withheld = True
            return
        query.rules, query.dials = profile.controls, {**dials(profile.controls), **query.dials}
        if query.holdout or not query.personalize:
            return
        past = history(profile, self._catalog, self._type_index)
        query.seen = seen_rows(profile, self._catalog, self._seen_keys)
        query.profile, query.history = profile, past
        query.segment = self._segment(profile, query.dials)

    def _share_arm(self, query: Query, profile: Stored) -> None:
        """Puts an anonymous user who was merged into a user into that user's arm."""
        seed = arm_seed(profile.controls)
        if seed is not None and query.arm and self._holdout:
            drawn = self._holdout.drawn(seed)
            query.arm, query.holdout, query.bucket = drawn.arm, drawn.holdout, drawn.bucket

    def _segment(self, profile: Stored, turned: Dials) -> str:
        """The name of the category they choose most; of who chose nothing yet, of the one they turned up most."""
        key = profile.decayed_counts.segment()
        if not key:
            wanted = {key: value for (dial, key), value in turned.items() if dial is Dial.CATEGORY_WEIGHT and value > 0}
            key = max(wanted, key=lambda one: (wanted[one], one), default=0)
        return self._segments.get(key, "")

    def _read(self, query: Query) -> Stored:
        found = self._looked(query)
        if not self._enough(query, found):
            with self._turns.given_up():
                found = self._awaited(query, found)
        if isinstance(found, ProfileStoreUnavailable):
            raise found
        return found

    def _looked(self, query: Query) -> Stored | ProfileStoreUnavailable:
        try:
            return self._store.read(query.subject)
        except ProfileStoreUnavailable as error:
            return error

    def _enough(self, query: Query, found: Stored | ProfileStoreUnavailable) -> bool:
        """Whether there is nothing to wait for: who named no version takes what there is."""
        if isinstance(found, ProfileStoreUnavailable):
            return not query.min_profile_version
        return found.has(query.min_profile_version) or not self._allows(found)

    def _allows(self, profile: Stored) -> bool:
        return Purpose.PERSONALISE in (self._default if profile.consent is None else profile.consent)

    def _awaited(self, query: Query, found: Stored | ProfileStoreUnavailable) -> Stored | ProfileStoreUnavailable:
        """The profile with the event that is waited for, or what there is when the time is over.

        A store that does not answer is waited for as an event is: for a moment it may have had to write.
        """
        end = time.monotonic() + query.seconds_left() * WAIT_SHARE
        pause = _FIRST_PAUSE_S
        while time.monotonic() + pause < end:
            time.sleep(pause)
            found = self._looked(query)
            if self._enough(query, found):
                return found
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        if not isinstance(found, ProfileStoreUnavailable):
            wanted = query.min_profile_version
            query.degrade("PROFILE_STALE", f"the profile is at version {found.version}, not yet at {wanted}")
        return found


class UserVector:
    """Places the person in the embedding space."""

    name = "user_vector"
    part = "USER_ENCODER"

    def __init__(self, model: Model, catalog: Catalog) -> None:
        self._model, self._catalog = model, catalog

    def enable(self, query: Query) -> bool:
        """Where the user chose an item of this catalogue: showings and refusals alone tell no taste."""
        return query.history is not None and bool(chosen_rows(query.history).size)

    def hydrate(self, query: Query) -> None:
        """Fills `user_vector`, and `encoded`, from which it is made."""
        assert query.history is not None
        rows, types = encoder_inputs(rows_read(query.history), query.history.types, self._model.max_length)
        query.encoded = rows, types
        query.user_vector = self._model.encode_user(self._catalog.columns.vectors[rows], types)


class QueryVector:
    """Reads the words searched for and places them in the embedding space."""

    name = "query_vector"
    part = "SOURCE"

    def __init__(self, model: Model, shapes: ItemInputShapes) -> None:
        self._model, self._shapes = model, shapes

    def enable(self, query: Query) -> bool:
        """Where there are words."""
        return bool(query.text)

    def hydrate(self, query: Query) -> None:
        """Fills `tokens` and `query_vector`; the tokens stay where the encoder fails."""
        query.tokens = text_tokens(query.text)
        query.query_vector = self._model.encode_query(query_inputs(query.text, self._shapes)["tokens"])
