"""The stages before retrieval: they find the user's profile, and place the user and the words in embedding space."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from features.assemble import chosen_rows, encoder_inputs, history_and_seen, rows_read
from features.catalog import Catalog
from features.controls import Dial, Dials, arm_seed, dials
from features.errors import ProfileCorrupt
from features.linear import LinearTerm
from features.profile import EVERY_PURPOSE, Profile, Purpose
from features.profile_codec import PAST_LOST
from features.transforms import ItemInputShapes, query_inputs
from serving.bundle.model import Model
from serving.bundle.user_vectors import UserVectors
from serving.concurrency import ConcurrencyLimit
from serving.errors import ProfileStoreUnavailable
from serving.experiments import Assignment, Holdout
from serving.pipeline.request import Degraded, Request, UserState
from serving.pipeline.results import Hydrated
from serving.stores.catalog_log import CatalogProgress

WAIT_SHARE = 0.5
"""Share of the time left that a request may spend waiting for a version."""

_FIRST_PAUSE_S = 0.0005
_LONGEST_PAUSE_S = 0.01


class CatalogVersionHydrator:
    """Notes the version of the catalogue that the answer is made from, and marks one older than the caller wants."""

    name = "catalog_version"
    part = "CATALOG_STALE"

    def __init__(self, progress: CatalogProgress) -> None:
        self._progress = progress

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True: the answer names the version it was made from."""
        return True

    def hydrate(self, request: Request, user: UserState) -> Hydrated:
        """Finds `catalog_version`; the service has waited for it, before it looked up the ids of the request."""
        version, wanted = self._progress.version, request.min_catalog_version
        degraded: tuple[Degraded, ...] = ()
        if wanted > version:
            degraded = (Degraded(self.part, f"the catalogue is at version {version} here, not at {wanted}"),)
        return Hydrated(user._replace(catalog_version=version), degraded)


class ProfileReader(Protocol):
    """A place to read profiles from: the store, or what warms a worker up."""

    def read(self, subject: str) -> Profile:
        """Returns the profile of a subject."""
        ...


class ProfileHydrator:
    """Reads the user's profile: one round trip, more only while a version is waited for."""

    name = "profile"
    part = "PROFILE_STORE"

    def __init__(
        self,
        store: ProfileReader,
        catalog: Catalog,
        type_index: Mapping[int, int],
        seen_keys: npt.NDArray[np.uint32],
        limit: ConcurrencyLimit,
        default: Purpose = EVERY_PURPOSE,
        segments: Mapping[int, str] | None = None,
        holdout: Holdout | None = None,
    ) -> None:
        """Takes the store, how a bundle sees events, the segments that it has a table of, and how arms are drawn."""
        self._store, self._catalog, self._limit = store, catalog, limit
        self._type_index, self._seen_keys, self._default = type_index, seen_keys, default
        self._segments, self._holdout = segments or {}, holdout

    def reading(self, store: ProfileReader) -> ProfileHydrator:
        """Returns the same hydrator with another store."""
        twin = copy.copy(self)
        twin._store = store
        return twin

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if a user is named."""
        return bool(request.subject)

    def hydrate(self, request: Request, user: UserState) -> Hydrated:
        """Finds `controls` and `dials`, then `profile`, `history`, `seen` and `segment`.

        The latter shape a personal answer, so they stay empty for users who are held out and for requests that are not
        to be personal. If the user does not allow personal answers, neither is used, and only `withheld` is set.
        """
        try:
            profile, degraded = self._read(request)
        except ProfileCorrupt as error:
            return Hydrated(user, (Degraded("PROFILE_CORRUPT", str(error)),))
        if profile.lost:
            degraded += (Degraded("PROFILE_CORRUPT", PAST_LOST),)
        assignment = self._assignment(user.assignment, profile)
        if not self._allows(profile):
            return Hydrated(user._replace(assignment=assignment, withheld=True), degraded)
        turned = {**dials(profile.controls), **request.dials}
        if assignment.holdout or not request.personalize:
            # Controls hold in any arm: what a user blocks is never shown.
            return Hydrated(user._replace(assignment=assignment, controls=profile.controls, dials=turned), degraded)
        history, seen = history_and_seen(profile, self._catalog, self._type_index, self._seen_keys)
        user = user._replace(
            assignment=assignment,
            controls=profile.controls,
            dials=turned,
            profile=profile,
            history=history,
            seen=seen,
            segment=self._segment(profile, turned),
        )
        return Hydrated(user, degraded)

    def _assignment(self, assigned: Assignment, profile: Profile) -> Assignment:
        """Returns the arm: of an anonymous user who was merged into a user, the arm of that user."""
        seed = arm_seed(profile.controls)
        return self._holdout.drawn(seed) if seed is not None and assigned.arm and self._holdout else assigned

    def _segment(self, profile: Profile, turned: Dials) -> str:
        """Returns the name of the category chosen most or, before the first choice, of the one turned up most."""
        key = profile.decayed_counts.segment()
        if not key:
            raised = {key: value for (dial, key), value in turned.items() if dial is Dial.CATEGORY_WEIGHT and value > 0}
            key = max(raised, key=lambda category: (raised[category], category), default=0)
        return self._segments.get(key, "")

    def _read(self, request: Request) -> tuple[Profile, tuple[Degraded, ...]]:
        """Returns the profile, and a mark if it is older than the request wants.

        A store that does not answer is waited for as an event is, because it may only be busy writing to disk.
        """
        profile = self._try_read(request)
        degraded: tuple[Degraded, ...] = ()
        if not self._is_recent(request, profile):
            with self._limit.released():
                profile, degraded = self._awaited(request, profile)
        if isinstance(profile, ProfileStoreUnavailable):
            raise profile
        return profile, degraded

    def _try_read(self, request: Request) -> Profile | ProfileStoreUnavailable:
        try:
            return self._store.read(request.subject)
        except ProfileStoreUnavailable as error:
            return error

    def _is_recent(self, request: Request, profile: Profile | ProfileStoreUnavailable) -> bool:
        """Returns True if the profile is recent enough; always, if the request sets no min_profile_version."""
        if isinstance(profile, ProfileStoreUnavailable):
            return not request.min_profile_version
        # A profile that may not be used is not worth waiting for.
        return profile.has(request.min_profile_version) or not self._allows(profile)

    def _allows(self, profile: Profile) -> bool:
        return Purpose.PERSONALISE in (self._default if profile.consent is None else profile.consent)

    def _awaited(
        self, request: Request, profile: Profile | ProfileStoreUnavailable
    ) -> tuple[Profile | ProfileStoreUnavailable, tuple[Degraded, ...]]:
        """Returns the profile with the event that is waited for, or when the time is over the last one read, marked."""
        # Half of the time at most: the other stages still have to run.
        end = time.monotonic() + request.seconds_left() * WAIT_SHARE
        pause = _FIRST_PAUSE_S
        while time.monotonic() + pause < end:
            time.sleep(pause)
            profile = self._try_read(request)
            if self._is_recent(request, profile):
                return profile, ()
            # Most events are in the profile within a millisecond; for the others, rarer reads spare the store.
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        if isinstance(profile, ProfileStoreUnavailable):
            return profile, ()
        wanted = request.min_profile_version
        reason = f"the profile is at version {profile.version}, not yet at {wanted}"
        return profile, (Degraded("PROFILE_STALE", reason),)


class UserVectorHydrator:
    """Places the user in the embedding space, and sums the linear part of relevance."""

    name = "user_vector"
    part = "USER_ENCODER"

    def __init__(self, model: Model, catalog: Catalog, linear: LinearTerm, kept: int = 0) -> None:
        """Takes the model, the catalogue, the linear part, and the number of vectors to keep."""
        self._max_length, self._catalog, self._linear = model.max_length, catalog, linear
        self._vectors = UserVectors(model, kept)

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if the user chose an item of this catalogue: exposures and refusals alone tell no taste."""
        return user.history is not None and bool(chosen_rows(user.history).size)

    def hydrate(self, request: Request, user: UserState) -> Hydrated:
        """Finds `vector`, `encoded`, from which it is made, and `linear`."""
        assert user.history is not None
        rows, types = encoder_inputs(rows_read(user.history), user.history.types, self._max_length)
        # Vectors, not ids, so that items put after training count as any others.
        vector = self._vectors.encode(self._catalog.columns.vectors[rows], types)
        return Hydrated(
            user._replace(encoded=(rows, types), vector=vector, linear=self._linear.scores(chosen_rows(user.history)))
        )


class QueryVectorHydrator:
    """Places the words searched for in the embedding space."""

    name = "query_vector"
    part = "SOURCE"

    def __init__(self, model: Model, shapes: ItemInputShapes) -> None:
        self._model, self._shapes = model, shapes

    def enable(self, request: Request, user: UserState) -> bool:
        """Returns True if there are words."""
        return bool(request.text)

    def hydrate(self, request: Request, user: UserState) -> Hydrated:
        """Finds `query_vector`; without it, the words alone still find items."""
        tokens = query_inputs(request.text, self._shapes)["tokens"]
        return Hydrated(user._replace(query_vector=self._model.encode_query(tokens)))
