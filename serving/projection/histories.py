"""The histories of the users of a data set, event by event in log order, as profiles fold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.arrays import pc
from features.catalog_columns import columns_of
from features.errors import TablesError
from features.profile import Profile, empty, fold
from features.records import Records
from features.subjects import Subject, known, subject_of
from features.tables.dataset import Dataset, open_dataset, read_table
from features.tables.event_reader import Events
from features.tables.files import table_path
from features.tables.order import codes, is_present, order_events
from features.tables.records import table_records
from features.tables.schema import EVENTS
from features.vocabulary import Vocabulary

LAST_LOG_ID = 2**64 - 1
"""Log id behind every event."""

_SEARCHES = pa.schema([EVENTS.field(name) for name in EVENTS.names if name != "item_id"])


@dataclass(frozen=True, slots=True)
class LoggedHistory:
    """One user's events in log order.

    Attributes:
        records: The events; RECORD [n].
        log_ids: Their log ids, ascending; uint64 [n].
    """

    records: Records
    log_ids: npt.NDArray[np.uint64]

    def between(self, after: int, until: int = LAST_LOG_ID) -> LoggedHistory:
        """Returns the events behind one log id and up to another."""
        # As uint64: numpy would compare a Python integer as float64, which cannot tell neighbouring log ids apart.
        start, end = (int(np.searchsorted(self.log_ids, np.uint64(place), side="right")) for place in (after, until))
        return LoggedHistory(self.records[start:end], self.log_ids[start:end])

    def replayed(self, version: int, after: int = 0) -> Profile:
        """Returns the profile as it was at a version, folded from the events behind a log id."""
        return fold(empty(), self.between(after, version).records, version)


class UserEvents:
    """The events of a data set as records, those of each user together.

    Attributes:
        subjects: Keys of the users [n], in the order of their first event.
        ends: End of each user's events in `records`; int64 [n].
        records: The events; RECORD [m].
        log_ids: Their log ids, ascending for each user; uint64 [m].
    """

    def __init__(self, dataset: Dataset) -> None:
        """Takes a data set whose events are ordered by user and log id, as `read_history` orders them."""
        # A warehouse, which goes up to a log id, names anonymous users too.
        subject: Callable[[str], Subject] = subject_of if "until" in dataset.info else known
        names, users = codes(dataset.events["user_id"])
        self.subjects = [subject(name) for name in names]
        # `codes` numbers users in the order of their first event.
        self.ends = np.cumsum(np.bincount(users, minlength=len(names)))
        self.records, self.log_ids = _records(dataset), _log_ids(dataset.events)

    def span(self, user: int) -> tuple[int, int]:
        """Returns the start and the end of a user's events."""
        return int(self.ends[user - 1]) if user else 0, int(self.ends[user])


class LoggedHistories:
    """The histories of all users of a data set.

    Attributes:
        subjects: Keys of the users, in the order of their first event.
        events: Number of events.
        rejected: Number of rows that were left out.
    """

    def __init__(self, data: Path) -> None:
        """Reads a data set.

        Raises:
            TablesError: It cannot be read.
        """
        dataset = read_history(data)
        self._events = UserEvents(dataset)
        self.subjects = self._events.subjects
        self.events, self.rejected = dataset.events.num_rows, len(dataset.rejected)
        self._users: dict[str, int] = {subject: user for user, subject in enumerate(self.subjects)}

    def of(self, subject: str) -> LoggedHistory:
        """Returns the events of a user; none for a user whom the data set does not have."""
        user = self._users.get(subject)
        start, end = (0, 0) if user is None else self._events.span(user)
        return LoggedHistory(self._events.records[start:end], self._events.log_ids[start:end])


def read_history(data: Path) -> Dataset:
    """Reads a data set with all that profiles fold: of a warehouse also searches, and what is newer than `until`.

    Raises:
        TablesError: It cannot be read.
    """
    dataset = open_dataset(data, until=LAST_LOG_ID, include_withheld=True)
    if dataset.intake["events"].unordered:
        raise TablesError(
            f"{data}: its events have neither timestamp nor sequence, so no profile can be made of them: a profile is "
            "an order of events; add one of these columns"
        )
    if "until" not in dataset.info:
        return dataset
    events, intake, searches = dataset.events, dataset.intake, table_path(data, "searches")
    if searches is not None:
        loaded = read_table(searches, _SEARCHES, ("user_id", "event_type", "log_id"))
        events = pa.concat_tables([events, without_item(loaded.table).select(EVENTS.names).cast(EVENTS)])
        intake = {**intake, "searches": loaded.intake}
    return dataclasses.replace(dataset, stream=Events.of(personal_events(events)), intake=intake)


def without_item(searches: pa.Table) -> pa.Table:
    """Returns searches as events about no item."""
    return searches.append_column(EVENTS.field("item_id"), pa.array([""] * searches.num_rows, pa.string()))


def personal_events(events: pa.Table) -> pa.Table:
    """Returns the events that may enter a profile, ordered by user and log id."""
    return order_events(events.filter(pc.fill_null(events["personal"], True)))


def _records(dataset: Dataset) -> Records:
    """Returns the records that ingest would have written, with the items as they are in the data set."""
    items = dataset.items
    vocabulary = Vocabulary.build([str(name) for name in items["item_id"].to_pylist()])
    records, _ = table_records(dataset.events, vocabulary, columns_of(items, np.empty((items.num_rows, 0), np.float32)))
    return records


def _log_ids(events: pa.Table) -> npt.NDArray[np.uint64]:
    """Returns the log id of each event; an event that was never in a log gets its place in the table.

    Places are smaller than any log id of a live event, so a live event always comes after imported ones.
    """
    places = np.arange(1, events.num_rows + 1, dtype=np.uint64)
    if not is_present(events["log_id"]):
        return places
    log_ids = pc.fill_null(events["log_id"], 0).to_numpy().astype(np.uint64)
    return np.where(log_ids > 0, log_ids, places)
