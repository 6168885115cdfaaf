"""Training's own reading of a warehouse: data set, arrays, histories and inputs, as `penchant train` makes them.

Only the catalogue is handed in, as it was when a slate was served: what items were like then is in no warehouse.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from features.action_rates import ActionRates
from features.arrays import pc
from features.assemble import History, history, type_index
from features.catalog import Catalog
from features.catalog_columns import CatalogColumns
from features.keys import event_type_key
from features.linear import NO_TERM
from features.model_inputs import ranker_names
from features.profile import Profile
from features.subjects import user_id_of
from features.tables.dataset import open_dataset
from features.tables.event_reader import Events
from features.tables.order import order_events
from features.vocabulary import Vocabulary
from tests.world import DECLARED
from training.config import Action, TrainConfig
from training.data.histories import UserHistories
from training.data.impressions import _positions_by_version, read_examples
from training.data.interactions import Interactions, read_interactions
from training.data.moments import UserMoments
from training.data.point_in_time import features_of_example
from training.export.golden import history_differences

NOT_COMPARED = ("relevance", "position")
"""The one comes out of a model; of the other serving knows nothing, and says that every item comes first."""

_EVER = 2**64 - 1


class Trained:
    """The data that training reads of a warehouse."""

    def __init__(self, out: Path, forgotten: Mapping[str, int], types: Sequence[str], catalog: Catalog) -> None:
        """Reads it.

        Args:
            out: The warehouse.
            forgotten: By subject, up to which log id the profile was made to forget; what came while personal answers
                were not allowed is left out as well.
            types: Names of all event types that may be predicted.
            catalog: The catalogue of now.
        """
        self._out, self._catalog = out, catalog
        dataset = open_dataset(out, until=_EVER)
        marks = {user_id_of(subject): log_id for subject, log_id in forgotten.items()}
        events = dataset.events
        after = pa.array([marks.get(name, 0) for name in events["user_id"].to_pylist()], pa.uint64())
        kept = pc.and_(pc.greater(events["log_id"], after), pc.fill_null(events["personal"], True))
        self._dataset = dataclasses.replace(dataset, stream=Events.of(order_events(events.filter(kept))))
        self._vocabulary = Vocabulary.build(catalog.ids(range(catalog.size)))
        self.numbers: dict[str, int] = {}
        if self._dataset.events.num_rows:
            config = TrainConfig(target_types=list(types))
            self._data = read_interactions(self._dataset, self._vocabulary, config)
            self._pasts = UserHistories(self._data, catalog.columns)
            self.numbers = {name: number for number, name in enumerate(self._data.users)}
            self._log_ids = self._dataset.events["log_id"].to_numpy()

    def differing(self, subject: str, profile: Profile) -> list[str]:
        """Returns the differences of training's history at the version of a profile from that of serving."""
        person = self.numbers.get(user_id_of(subject))
        if person is None:
            return ["rows"] * int((profile.records["item"] != 0).any())
        versions = np.array([profile.version], np.uint64)
        [position] = _positions_by_version(self._data, np.array([person]), versions, self._log_ids)
        served = history(profile, self._catalog, type_index(self._data.event_types))
        return list(history_differences(self._pasts.before(person, int(position)), served))

    def differing_slates(
        self,
        slates: Sequence[Mapping[str, Any]],
        then: Sequence[tuple[CatalogColumns, int]],
        actions: Sequence[Action],
        types: Sequence[str],
    ) -> Iterator[str]:
        """The ranker's inputs that training makes otherwise than they were served.

        Args:
            slates: Rows of the impressions, with their features.
            then: The catalogue's columns and its number of items when each was served.
            actions: The actions of the bundle.
            types: The event types of the bundle, which knows fewer of them than the events have.
        """
        shown = read_examples(
            self._out, self._dataset, self._vocabulary, self._data, actions, moments=UserMoments(DECLARED)
        )
        assert shown is not None
        names = ranker_names([action.name for action in actions], DECLARED.names)
        facts = {"event_types": list(types), "actions": [action.model_dump() for action in actions]}
        action_rates = ActionRates.of(facts)
        for slate, (columns, size) in zip(slates, then, strict=True):
            # What was put later was unknown then: the catalogue's doing, not the history's.
            rows = np.where(self._data.rows < size, self._data.rows, -1).astype(np.int32)
            histories = _AsRead(dataclasses.replace(self._data, rows=rows), columns, types)
            own = (shown.users == self.numbers[slate["user_id"]]) & (shown.times == slate["timestamp"])
            lines = shown.take(np.flatnonzero(own))
            assert len(lines) == len(slate["item_ids"])
            for at in range(len(lines)):
                user = np.zeros(columns.vectors.shape[1], np.float32)
                found = features_of_example(histories, lines, at, user, NO_TERM, columns, action_rates)
                served = np.array(slate["features"][lines.places[at]], np.float32)
                differs = found.view(np.uint32) != served.view(np.uint32)
                yield from (
                    name
                    for name, other in zip(names, differs.tolist(), strict=True)
                    if other and name not in NOT_COMPARED and not np.isnan(served).all()
                )


class _AsRead(UserHistories):
    """Training's histories as the models of a bundle read them that knows only some of the event types."""

    def __init__(self, data: Interactions, columns: CatalogColumns, types: Sequence[str]) -> None:
        super().__init__(data, columns)
        numbers = type_index(types)
        known = [numbers.get(event_type_key(name), 0) for name in data.event_types]
        self._as_read = np.array([0, *known], np.int32)

    def before(self, person: int, position: int) -> History:
        past = super().before(person, position)
        return dataclasses.replace(past, types=self._as_read[past.types], kinds=self._as_read[past.kinds])
