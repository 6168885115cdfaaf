"""Impressions as lines to learn from and to measure on: who was shown what, when and where, and what they did then.

An action belongs to the impression whose `request_id` it names, or, where events name none, to what was shown of the
item to the person before; in either case within the action's window.
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
from features.keys import item_keys
from features.tables.dataset import Dataset, Loaded, read_table
from features.tables.files import table_path
from features.tables.order import codes, is_present
from features.tables.schema import IMPRESSIONS, IMPRESSIONS_REQUIRED
from features.vocabulary import Vocabulary
from training.config import Action
from training.data.interactions import Interactions

HOUR_MS = 3_600_000
NEVER = 1 << 62
_I64 = npt.NDArray[np.int64]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """One line per item of a slate, by time; arrays of one length n.

    Attributes:
        people: Number of the person; int64.
        positions: Number of the person's events before the impression; int64.
        rows: Row of the item; int32.
        places: Place in the slate, the first is 0; int32.
        times: Time of the impression, ms; int64.
        where: Position of the surface in `surfaces`; int64.
        surfaces: Names of the surfaces, "" where nobody wrote it down.
        done: When each action followed, ms; `NEVER` where it did not; int64 [n, A].
        weights: How many lines each stands for, where slates were logged of a share of users alone, else 1; float64.
    """

    people: _I64
    positions: _I64
    rows: npt.NDArray[np.int32]
    places: npt.NDArray[np.int32]
    times: _I64
    where: _I64
    surfaces: list[str]
    done: _I64
    weights: npt.NDArray[np.float64]

    def __len__(self) -> int:
        """The number of lines."""
        return self.rows.size

    def labels(self, known_until: int = NEVER - 1) -> npt.NDArray[np.bool_]:
        """Whether each action followed, as one knew at a moment; bool [n, A]."""
        return self.done <= known_until

    def take(self, at: npt.NDArray[Any]) -> Examples:
        """Some of the lines."""
        arrays = {
            field.name: getattr(self, field.name)[at] for field in dataclasses.fields(self) if field.name != "surfaces"
        }
        return Examples(surfaces=self.surfaces, **arrays)

    @property
    def unequal(self) -> npt.NDArray[np.float64] | None:
        """The weights, None where all are the same, so that measures are what they are without."""
        return None if (self.weights == self.weights[:1]).all() else self.weights

    def between(self, after: int, until: int) -> Examples:
        """The lines later than `after` and not later than `until`, ms."""
        return self.take(np.flatnonzero((self.times > after) & (self.times <= until)))


def read_examples(
    path: Path,
    dataset: Dataset,
    vocabulary: Vocabulary,
    data: Interactions,
    actions: Sequence[Action],
    methods: Sequence[str] = ("recommend", "rank"),
) -> Examples | None:
    """What was shown to people who have events, and what followed; None without a table of impressions.

    Slates of people who do not allow training are left out, and those of other methods. Dials and upstream scores
    change which items are shown and in which order, as every policy does, and not what an item is worth to a user:
    these slates stay.

    Args:
        path: Directory of the data set.
        dataset: The same, read: where the events say which request they follow from.
        vocabulary: Item id <-> row.
        data: The events as arrays, in the order of `dataset.events`.
        actions: What to look for.
        methods: The methods whose slates to read; a slate that names no method is read in any case.
    """
    slates = _slates(path, methods)
    if slates is None:
        return None
    lines, requests = _lines(slates, vocabulary, data, len(actions), data.aligned(dataset.events["log_id"]))
    _follow(lines, requests, data.aligned(dataset.events["request_id"]), data, actions)
    return lines


def read_slates(path: Path) -> Loaded | None:
    """Reads the table of impressions of a data set; None where there is none.

    Raises:
        TablesError: It cannot be read.
    """
    where = table_path(path, "impressions")
    return None if where is None else read_table(where, IMPRESSIONS, IMPRESSIONS_REQUIRED)


def _slates(path: Path, methods: Sequence[str]) -> pa.Table | None:
    """The impressions of a data set that models may be trained on, of some methods."""
    loaded = read_slates(path)
    if loaded is None:
        return None
    slates = loaded.table
    slates = slates.filter(pc.fill_null(slates["allow_train"], True))
    kept = slates.filter(_made_by(slates, methods))
    if kept.num_rows < slates.num_rows:
        _log.warning(
            "%d of %d slates do not train the ranker: they answer a query, or no method of %s made them (`methods`)",
            slates.num_rows - kept.num_rows,
            slates.num_rows,
            ", ".join(methods),
        )
    return kept


def _made_by(slates: pa.Table, methods: Sequence[str]) -> Any:
    """Which slates one of the methods made; of `rank`, only those whose order does not come from a query; bool [n]."""
    named = pc.is_in(slates["method"], pa.array(list(methods), pa.string()))
    asked = pc.greater(pc.utf8_length(pc.fill_null(slates["query"], "")), 0)
    worded = pc.and_(asked, pc.equal(pc.fill_null(slates["method"], ""), "rank"))
    return pc.or_(pc.is_null(slates["method"]), pc.and_not(named, worded))


def _lines(
    slates: pa.Table, vocabulary: Vocabulary, data: Interactions, actions: int, log_ids: pa.ChunkedArray[Any]
) -> tuple[Examples, list[str]]:
    """What was shown, nothing done yet, and the request of each line."""
    listed: Any = slates["item_ids"].combine_chunks()
    sizes = np.diff(listed.offsets.to_numpy())
    slate = np.repeat(np.arange(slates.num_rows), sizes)
    names, which = codes(pa.chunked_array([listed.flatten()]))
    rows = vocabulary.rows_of_keys(item_keys(names))[which]
    numbers = {name: number for number, name in enumerate(data.users)}
    users, who = codes(slates["user_id"])
    people = np.array([numbers.get(name, -1) for name in users], np.int64)[who][slate]
    surfaces, where = codes(slates["surface"].fill_null(""))  # type: ignore[arg-type]
    times = slates["timestamp"].to_numpy()[slate]
    kept = np.flatnonzero((people >= 0) & (rows >= 0))
    kept = kept[np.argsort(times[kept], kind="stable")]
    first = np.cumsum(sizes) - sizes
    people, times = people[kept], times[kept]
    positions = _positions(data, people, times)
    if is_present(log_ids) and is_present(slates["profile_version"]):
        versions = pc.fill_null(slates["profile_version"], 0).to_numpy()[slate][kept]
        logged = pc.fill_null(log_ids, 0).to_numpy()
        positions = np.where(versions > 0, _folded(data, people, versions, logged), positions)
    lines = Examples(
        people=people,
        positions=positions,
        rows=rows[kept],
        places=(kept - first[slate[kept]]).astype(np.int32),
        times=times,
        where=where[slate[kept]],
        surfaces=surfaces,
        done=np.full((kept.size, actions), NEVER),
        weights=pc.fill_null(slates["weight"], 1.0).to_numpy().astype(np.float64)[slate[kept]],
    )
    requests = slates["request_id"].to_pylist()
    return lines, [requests[at] for at in slate[kept].tolist()]


def _positions(data: Interactions, people: _I64, times: _I64) -> _I64:
    """How many events each person had before each time."""
    out = np.empty(people.size, np.int64)
    for some, own in _by_person(data, people):
        out[some] = np.searchsorted(data.timestamps[own], times[some], side="left")
    return out


def _folded(
    data: Interactions, people: _I64, versions: npt.NDArray[np.uint64], log_ids: npt.NDArray[np.uint64]
) -> _I64:
    """How many events were in each person's profile at each version: what serving read, whenever they happened."""
    out = np.empty(people.size, np.int64)
    for some, own in _by_person(data, people):
        out[some] = np.searchsorted(log_ids[own], versions[some], side="right")
    return out


def _by_person(data: Interactions, people: _I64) -> Iterator[tuple[_I64, slice]]:
    """The lines of each person, and their events."""
    order = np.argsort(people, kind="stable")
    borders = np.flatnonzero(np.diff(people[order])) + 1
    for some in np.split(order, borders) if people.size else ():
        person = int(people[some[0]])
        yield some, slice(int(data.offsets[person]), int(data.offsets[person + 1]))


def _follow(
    lines: Examples,
    requests: Sequence[str],
    column: pa.ChunkedArray[Any],
    data: Interactions,
    actions: Sequence[Action],
) -> None:
    """Fills `done` in place; `column` says which request each event of `data` follows from."""
    if is_present(column):
        known, whose = codes(column.fill_null(""))  # type: ignore[arg-type]
        numbers = {name: number for number, name in enumerate(known)}
        asked = np.array([numbers.get(name, -1) for name in requests], np.int64)
    else:
        whose, asked = data.owner(), lines.users
    action_rates = ActionRates.of({"event_types": data.event_types, "actions": [action.model_dump() for action in actions]})
    _, acted = action_rates.marks(data.types, data.values)
    wanted = asked * data.items + lines.rows
    for number, action in enumerate(actions):
        done = np.flatnonzero(acted[number])
        then = _first_after(wanted, lines.times, whose[done] * data.items + data.rows[done], data.timestamps[done])
        window = round(action.window_hours * HOUR_MS)
        lines.done[:, number] = np.where((then - lines.times <= window) & (asked >= 0), then, NEVER)


def _first_after(keys: _I64, times: _I64, event_keys: _I64, event_times: _I64) -> _I64:
    """The time of the first event of each key at or after each time; far in the future where there is none."""
    every = np.concatenate([keys, event_keys])
    moments = np.concatenate([times, event_times])
    is_event = np.arange(every.size) >= keys.size
    order = np.lexsort((is_event, moments, every))
    place = np.where(is_event[order], np.arange(every.size), every.size)
    after = np.minimum.accumulate(place[::-1])[::-1]
    there = np.minimum(after, every.size - 1)
    same = (after < every.size) & (every[order][there] == every[order])
    found = np.empty(every.size, np.int64)
    found[order] = np.where(same, moments[order][there], NEVER)
    return found[: keys.size]
