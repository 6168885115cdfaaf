"""Reads impressions as examples to learn from and to measure on: an item shown to a user, and what followed.

An action belongs to the impression whose `request_id` it names, or, if events name no request, to every impression of
the item to the user before it; in either case within the action's window.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.action_rates import ActionRates
from features.arrays import pc
from features.assemble import Moment, moment_at
from features.declarations import zone_of
from features.declared import Declared
from features.keys import item_keys
from features.tables.dataset import Dataset, LoadedTable, read_table
from features.tables.files import table_path
from features.tables.order import codes, is_present
from features.tables.schema import IMPRESSIONS, IMPRESSIONS_REQUIRED
from features.vocabulary import Vocabulary
from training.config import Action
from training.data.interactions import Interactions
from training.data.moments import NO_ATTRIBUTES, UserMoments, attributes_of_slates

HOUR_MS = 3_600_000
_SHARED = frozenset({"surfaces", "request_values", "declared"})
NEVER = 1 << 62
_I64 = npt.NDArray[np.int64]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """The lines of slates, one per item shown, by time; arrays of one length n.

    Attributes:
        users: Number of the user; int64.
        positions: Number of the user's events before the impression; int64.
        rows: Row of the item; int32.
        places: Place in the slate, the first is 0; int32.
        times: Time of the impression, ms; int64.
        surface_indices: Position of the surface in `surfaces`; int64.
        surfaces: Names of the surfaces, "" if the log names none.
        action_times: When each action followed, ms; `NEVER` where it did not; int64 [n, A].
        weights: Number of examples that each stands for: above 1 if only a share of users is logged; float64.
        slates: Number of the slate; int64.
        request_values: The declared features of each slate's request; float32 [slates, K].
        declared: The declared features.
    """

    users: _I64
    positions: _I64
    rows: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    times: _I64
    surface_indices: _I64
    surfaces: list[str]
    action_times: _I64
    weights: npt.NDArray[np.float64]
    slates: _I64
    request_values: npt.NDArray[np.float32]
    declared: Declared

    def __len__(self) -> int:
        """The number of examples."""
        return self.rows.size

    def labels(self, until: int = NEVER - 1) -> npt.NDArray[np.bool_]:
        """Returns True where an action had followed by the moment `until`; bool [n, A]."""
        return self.action_times <= until

    def take(self, at: npt.NDArray[Any]) -> Examples:
        """Returns some of the examples."""
        arrays = {
            field.name: getattr(self, field.name)[at] for field in dataclasses.fields(self) if field.name not in _SHARED
        }
        return dataclasses.replace(self, **arrays)

    def moment(self, at: int) -> Moment:
        """Returns the moment of an example, as serving had it."""
        return Moment(
            int(self.times[at]),
            self.surfaces[self.surface_indices[at]],
            self.places[at : at + 1],
            self.request_values[self.slates[at]],
            self.declared.past,
        )

    @property
    def unequal_weights(self) -> npt.NDArray[np.float64] | None:
        """The weights, or None if all are the same: the metrics then take their plain, exact path."""
        return None if (self.weights == self.weights[:1]).all() else self.weights

    def between(self, after: int, until: int) -> Examples:
        """Returns the examples later than `after` and not later than `until`, ms."""
        return self.take(np.flatnonzero((self.times > after) & (self.times <= until)))


def read_examples(
    path: Path,
    dataset: Dataset,
    vocabulary: Vocabulary,
    data: Interactions,
    actions: Sequence[Action],
    methods: Sequence[str] = ("recommend", "rank"),
    moments: UserMoments = NO_ATTRIBUTES,
) -> Examples | None:
    """Reads the items shown to users who have events, with the actions that followed; None without impressions.

    Slates of users who do not allow training are left out, and those of other methods. Dials and upstream scores
    change which items are shown and in which order, as every policy does, and not what an item is worth to a user:
    these slates stay.

    Args:
        path: Directory of the data set.
        dataset: The same, read: its events name the requests that they follow from.
        vocabulary: Item id <-> row.
        data: The events as arrays, in the order of `dataset.events`.
        actions: The actions to look for.
        methods: The methods whose slates to read; a slate that names no method is read in any case.
        moments: The declared features, and the attributes of users that they read.
    """
    slates = _read_training_slates(path, methods)
    if slates is None:
        return None
    log_ids = data.aligned(dataset.events["log_id"])
    examples, requests = _examples(slates, vocabulary, data, len(actions), log_ids, moments)
    _find_actions(examples, requests, data.aligned(dataset.events["request_id"]), data, actions)
    return examples


def read_slates(path: Path) -> LoadedTable | None:
    """Reads the table of impressions of a data set; None if it has none.

    Raises:
        TablesError: It cannot be read.
    """
    file = table_path(path, "impressions")
    return None if file is None else read_table(file, IMPRESSIONS, IMPRESSIONS_REQUIRED)


def _read_training_slates(path: Path, methods: Sequence[str]) -> pa.Table | None:
    """Reads the impressions of a data set that models may be trained on, those of some methods."""
    loaded = read_slates(path)
    if loaded is None:
        return None
    slates = loaded.table
    # A missing consent is that of a log that asks for none.
    slates = slates.filter(pc.fill_null(slates["allow_train"], True))
    kept = slates.filter(_is_of_methods(slates, methods))
    if kept.num_rows < slates.num_rows:
        _log.warning(
            "%d of %d slates do not train the ranker: they answer a query, or no method of %s made them (`methods`)",
            slates.num_rows - kept.num_rows,
            slates.num_rows,
            ", ".join(methods),
        )
    return kept


def _is_of_methods(slates: pa.Table, methods: Sequence[str]) -> Any:
    """Returns True for the slates of one of the methods; bool [n].

    A slate of `rank` with a query is not one: its actions say how well items fit the query, and the ranker reads none.
    """
    is_named = pc.is_in(slates["method"], pa.array(list(methods), pa.string()))
    has_query = pc.greater(pc.utf8_length(pc.fill_null(slates["query"], "")), 0)
    ranked_by_query = pc.and_(has_query, pc.equal(pc.fill_null(slates["method"], ""), "rank"))
    return pc.or_(pc.is_null(slates["method"]), pc.and_not(is_named, ranked_by_query))


def _examples(
    slates: pa.Table,
    vocabulary: Vocabulary,
    data: Interactions,
    actions: int,
    log_ids: pa.ChunkedArray[Any],
    moments: UserMoments,
) -> tuple[Examples, list[str]]:
    """Returns one example per item shown, without actions yet, and the request of each."""
    item_lists: Any = slates["item_ids"].combine_chunks()
    sizes = np.diff(item_lists.offsets.to_numpy())
    slate = np.repeat(np.arange(slates.num_rows), sizes)
    item_ids, item_indices = codes(pa.chunked_array([item_lists.flatten()]))
    rows = vocabulary.rows_of_keys(item_keys(item_ids))[item_indices]
    numbers = {name: number for number, name in enumerate(data.users)}
    user_ids, user_indices = codes(slates["user_id"])
    of_slate = np.array([numbers.get(name, -1) for name in user_ids], np.int64)[user_indices]
    users = of_slate[slate]
    surfaces, surface_indices = codes(slates["surface"].fill_null(""))  # type: ignore[arg-type]
    times = slates["timestamp"].to_numpy()[slate]
    kept = np.flatnonzero((users >= 0) & (rows >= 0))
    # By time, so that statistics are replayed in one pass; examples of one slate keep their places.
    kept = kept[np.argsort(times[kept], kind="stable")]
    first = np.cumsum(sizes) - sizes
    users, times = users[kept], times[kept]
    positions = _positions_by_time(data, users, times)
    if is_present(log_ids) and is_present(slates["profile_version"]):
        versions = pc.fill_null(slates["profile_version"], 0).to_numpy()[slate][kept]
        event_log_ids = pc.fill_null(log_ids, 0).to_numpy()
        positions = np.where(versions > 0, _positions_by_version(data, users, versions, event_log_ids), positions)
    examples = Examples(
        users=users,
        positions=positions,
        rows=rows[kept],
        places=(kept - first[slate[kept]]).astype(np.int32),
        times=times,
        surface_indices=surface_indices[slate[kept]],
        surfaces=surfaces,
        action_times=np.full((kept.size, actions), NEVER),
        weights=pc.fill_null(slates["weight"], 1.0).to_numpy().astype(np.float64)[slate[kept]],
        slates=slate[kept],
        request_values=_request_values(slates, moments, of_slate.tolist()),
        declared=moments.declared,
    )
    requests = slates["request_id"].to_pylist()
    return examples, [requests[at] for at in slate[kept].tolist()]


def _request_values(slates: pa.Table, moments: UserMoments, users: Sequence[int]) -> npt.NDArray[np.float32]:
    """Returns the declared features of the request and of the user of each slate; float32 [slates, K]."""
    declared = moments.declared
    if not declared.of_part("request") and not declared.of_part("user"):
        return np.zeros((slates.num_rows, 0), np.float32)
    attributes = attributes_of_slates(slates, moments, users)
    names = ["timestamp", "surface", "device", "channel", "locale", "time_zone", "attributes"]
    # One slate after the other, by the function that serving calls: seconds for a million.
    requests = slates.select(names).to_pylist(maps_as_pydicts="lossy")
    zones = {zone for request in requests if (zone := request["time_zone"])}
    if unknown := sorted(zone for zone in zones if zone_of(zone) is None):
        _log.warning(
            "no time zone is called %s: such slates are read in the zone of the feature", ", ".join(unknown[:5])
        )
    values = [
        moment_at(declared, r["timestamp"], r["surface"] or "", r, controls).request_values
        for r, controls in zip(requests, attributes, strict=True)
    ]
    return np.array(values, np.float32).reshape(len(requests), -1)


def _positions_by_time(data: Interactions, users: _I64, times: _I64) -> _I64:
    """Counts each user's leading events before each time."""
    out = np.empty(users.size, np.int64)
    for at, events in _by_user(data, users):
        # A log's order comes before times: none of the leading events may be later, whatever follows it in the log.
        own = data.timestamps[events]
        is_trusted = own <= data.trusted_until
        reached = np.where(is_trusted, np.maximum.accumulate(np.where(is_trusted, own, 0)), NEVER)
        # An event of a wrong clock counts once the next one that can be believed does.
        reached = np.minimum.accumulate(reached[::-1])[::-1]
        out[at] = np.searchsorted(reached, times[at], side="left")
    return out


def _positions_by_version(
    data: Interactions, users: _I64, versions: npt.NDArray[np.uint64], log_ids: npt.NDArray[np.uint64]
) -> _I64:
    """Counts the events in each user's profile at each version: what serving read, whenever the events happened.

    A profile trails the log, and an event may be logged long after its time. An impression that names the version it
    was computed from is replayed from exactly those events; to count by time would show the ranker events that
    serving did not have.
    """
    out = np.empty(users.size, np.int64)
    for at, events in _by_user(data, users):
        out[at] = np.searchsorted(log_ids[events], versions[at], side="right")
    return out


def _by_user(data: Interactions, users: _I64) -> Iterator[tuple[_I64, slice]]:
    """Yields the examples of each user, and their events."""
    order = np.argsort(users, kind="stable")
    borders = np.flatnonzero(np.diff(users[order])) + 1
    for at in np.split(order, borders) if users.size else ():
        user = int(users[at[0]])
        yield at, slice(int(data.offsets[user]), int(data.offsets[user + 1]))


def _find_actions(
    examples: Examples,
    requests: Sequence[str],
    column: pa.ChunkedArray[Any],
    data: Interactions,
    actions: Sequence[Action],
) -> None:
    """Fills `action_times` in place; `column` names the request that each event of `data` follows from."""
    # An action belongs to an impression of the same item by request, or, if events name no request, by user.
    if is_present(column):
        request_ids, event_groups = codes(column.fill_null(""))  # type: ignore[arg-type]
        numbers = {name: number for number, name in enumerate(request_ids)}
        groups = np.array([numbers.get(name, -1) for name in requests], np.int64)
    else:
        event_groups, groups = data.owner(), examples.users
    facts = {"event_types": data.event_types, "actions": [action.model_dump() for action in actions]}
    _, acted = ActionRates.of(facts).marks(data.types, data.values)
    keys = groups * data.items + examples.rows
    for number, action in enumerate(actions):
        events = np.flatnonzero(acted[number])
        event_keys = event_groups[events] * data.items + data.rows[events]
        times = _first_after(keys, examples.times, event_keys, data.timestamps[events])
        window = round(action.window_hours * HOUR_MS)
        is_in_window = (times - examples.times <= window) & (groups >= 0)
        examples.action_times[:, number] = np.where(is_in_window, times, NEVER)


def _first_after(keys: _I64, times: _I64, event_keys: _I64, event_times: _I64) -> _I64:
    """Returns the time of the first event of each key at or after each time; `NEVER` where there is none."""
    all_keys = np.concatenate([keys, event_keys])
    all_times = np.concatenate([times, event_times])
    is_event = np.arange(all_keys.size) >= keys.size
    # At the same time an event sorts after the examples, so that it counts for them.
    order = np.lexsort((is_event, all_times, all_keys))
    place = np.where(is_event[order], np.arange(all_keys.size), all_keys.size)
    next_event = np.minimum.accumulate(place[::-1])[::-1]
    clipped = np.minimum(next_event, all_keys.size - 1)
    has_same_key = (next_event < all_keys.size) & (all_keys[order][clipped] == all_keys[order])
    first = np.empty(all_keys.size, np.int64)
    first[order] = np.where(has_same_key, all_times[order][clipped], NEVER)
    return first[: keys.size]
