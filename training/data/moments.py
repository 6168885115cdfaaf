"""The moments at which users are asked about: their time, and the attributes that declared features read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from features.assemble import Moment, moment_at
from features.controls import Controls, attribute_controls, attributes_of_text, no_controls
from features.declared import NONE_DECLARED, Declared
from features.errors import SettingsError


@dataclass(frozen=True)
class UserMoments:
    """Makes the moments of the users of a data set.

    Attributes:
        declared: The declared features.
        controls: By number of the user, their attributes as controls; empty if no feature reads them.
    """

    declared: Declared = NONE_DECLARED
    controls: Sequence[Controls] = ()

    def of(self, user: int, now_ms: int) -> Moment:
        """Returns a moment of a user; without a surface and a context, because no candidate was shown in one."""
        return moment_at(self.declared, now_ms, controls=self.attributes(user))

    def attributes(self, user: int) -> Controls:
        """Returns the attributes of a user as controls."""
        return self.controls[user] if self.controls else no_controls()


NO_ATTRIBUTES = UserMoments()
"""Moments for a model without declared features."""


def declared_of(declarations: Sequence[Any], event_types: Sequence[str]) -> Declared:
    """Returns the declared features of a training.

    Raises:
        SettingsError: One names an event type that the data set does not have.
    """
    try:
        return Declared.of(declarations, event_types)
    except ValueError as error:
        raise SettingsError(f"features: {error}") from error


def user_moments(declared: Declared, users: pa.Table, names: Sequence[str]) -> UserMoments:
    """Returns the moments of users.

    Args:
        declared: The declared features.
        users: A table of users, canonical.
        names: Ids of the users, by number.
    """
    # A list of a million attributes is made only where a feature reads them.
    if not declared.of_part("user"):
        return UserMoments(declared)
    # Users of the table who have no event are in no example.
    attributes = dict(
        zip(users["user_id"].to_pylist(), users["attributes"].to_pylist(maps_as_pydicts="lossy"), strict=True)
    )
    return UserMoments(declared, [attribute_controls(attributes.get(name) or {}) for name in names])


def attributes_of_slates(slates: pa.Table, moments: UserMoments, users: Sequence[int]) -> list[Controls]:
    """Returns the attributes that serving read for each slate, those of the table of users where the log has none.

    Args:
        slates: Impressions.
        moments: The moments of users.
        users: Number of the user of each slate, -1 if unknown.
    """
    # What serving read wins: the table of users may have changed since.
    logged: list[str | None] = slates["user_attributes"].to_pylist()
    return [
        attributes_of_text(text) if text is not None else moments.attributes(user) if user >= 0 else no_controls()
        for text, user in zip(logged, users, strict=True)
    ]
