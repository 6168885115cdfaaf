"""`penchant recommend --data`: answers from the histories of a data set, without a Redis or a service.

The engine, its stages and the request are those of the service; only the profiles come from another place.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from features.controls import attribute_controls
from features.profile import Profile, empty
from features.subjects import Subject, known, subject_of, user_id_of
from features.tables.dataset import Dataset
from features.tables.intake import admit
from serving.config import ServeConfig
from serving.engine.engine import open_engine
from serving.engine.pipelines import Dependencies
from serving.errors import ConfigError
from serving.experiments import Holdout
from serving.jobs.feeds import Feed, answer
from serving.observability.telemetry import Telemetry
from serving.projection.histories import LoggedHistory, UserEvents, read_history
from serving.stores.catalog_log import CatalogProgress

ITEMS = 10
"""Items per user."""
_SHOWN = 5
"""Unknown users that a message names."""

_USER = ("user_id", "attributes")


class DataProfiles:
    """The profiles of the users of a data set, each folded when it is read.

    Attributes:
        events: Their events.
    """

    def __init__(self, dataset: Dataset) -> None:
        """Takes what `read_history` returned."""
        self.events = UserEvents(dataset)
        self._users: dict[str, int] = {subject: user for user, subject in enumerate(self.events.subjects)}
        self._names_anonymous = "until" in dataset.info
        # The table of users stands for what a product would have told the service.
        rows = zip(*(dataset.users[name].to_pylist(maps_as_pydicts="lossy") for name in _USER), strict=True)
        self._attributes: dict[str, dict[str, str]] = {user: attributes for user, attributes in rows if attributes}

    def subject(self, user: str) -> Subject:
        """Returns the key of a user by the id of the tables, of which only a warehouse names anonymous users."""
        return subject_of(user) if self._names_anonymous else known(user)

    def has(self, subject: str) -> bool:
        """Returns True if the data set has an event of a user."""
        return subject in self._users

    def read(self, subject: str) -> Profile:
        """Returns a user's profile, an empty one of a user whom the data set does not have."""
        controls = attribute_controls(self._attributes.get(user_id_of(subject), {}))
        user = self._users.get(subject)
        if user is None:
            return dataclasses.replace(empty(), controls=controls)
        start, end = self.events.span(user)
        history = LoggedHistory(self.events.records[start:end], self.events.log_ids[start:end])
        return dataclasses.replace(history.replayed(int(history.log_ids[-1])), controls=controls)


def recommend_from_data(
    config: ServeConfig,
    data: str | Path,
    users: Sequence[str],
    items: int = ITEMS,
    *,
    surface: str = "",
    fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Answers users as a service would whose profiles were rebuilt from a data set; writes and logs nothing.

    Args:
        config: The settings of a service; `ServeConfig.load(bundle=BUNDLE)` has the defaults.
        data: Directory of the canonical tables.
        users: Ids as in the tables; of a warehouse also `a:` and the id of an anonymous user.
        items: Items per user.
        surface: Surface that is asked for.
        fields: Fields of the items to return too.

    Returns:
        `answers`, a row for each user as in `batch.SCHEMA`, with `items` if there are fields; `unknown` users, who get
        what a new user gets; `bundle_id`; and `intake.summary`'s.

    Raises:
        TablesError: The data set cannot be read.
        BundleError: The bundle is refused.
        ConfigError: No user is named, or known; or no item has such a field.
    """
    feed, wanted = Feed.of(items, "", surface, fields), list(dict.fromkeys(users))
    if not wanted:
        raise ConfigError("no user is named: give --user ID, or a file as --users")
    dataset = read_history(Path(data))
    # Told and never refused: nothing is kept of what is only looked at.
    left_out = admit(dataset.intake, 1.0, "", dataset.info.get("time_units"))
    profiles = DataProfiles(dataset)
    subjects = {user: profiles.subject(user) for user in wanted}
    unknown = _unknown(profiles, subjects, data)
    dependencies = Dependencies(config, profiles, CatalogProgress(), Telemetry())
    engine, holdout = open_engine(config.bundle, dependencies), Holdout(config.holdout_share, config.holdout_salt)
    answers = [answer(engine, holdout, subject, user, feed)[1] for user, subject in subjects.items()]
    return {"answers": answers, "unknown": unknown, "bundle_id": engine.bundle_id, "data": str(data), **left_out}


def _unknown(profiles: DataProfiles, subjects: Mapping[str, Subject], data: str | Path) -> list[str]:
    """Returns and tells the users of whom a data set has no event.

    Raises:
        ConfigError: It has none of any.
    """
    unknown = [user for user, subject in subjects.items() if not profiles.has(subject)]
    if len(unknown) == len(subjects):
        # Every answer would be the same popular one, which a reader would take for the model's.
        example = profiles.events.subjects[0] if profiles.events.subjects else ""
        raise ConfigError(
            f"{data} has no event of {_listed(unknown)}, so there is no history to answer from: give ids as its "
            f"user_id has them" + (f", such as {example.removeprefix('u:')!r}" if example else "")
        )
    if unknown:
        print(f"users: {data} has no event of {_listed(unknown)}: answered like new users", file=sys.stderr)
    return unknown


def _listed(users: Sequence[str]) -> str:
    shown = ", ".join(map(repr, users[:_SHOWN]))
    return shown if len(users) <= _SHOWN else f"{shown} and {len(users) - _SHOWN} more"
