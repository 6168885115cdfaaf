"""Makes profiles anew from a data set, of now or of any earlier version, and shows one as a person would read it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.arrays import pc
from features.assemble import HALF_LIFE
from features.bundle import open_bundle
from features.bundle_tables import read_items
from features.catalog import columns_of
from features.clock import now_ms
from features.errors import ProfileCorrupt, TablesError
from features.event_types import EVENT_TYPES
from features.histories import Logged, history_keys
from features.keys import event_type_key, event_type_keys, item_key, item_keys
from features.profile import PAST_LOST, RECORD, Profile, Records, Retention, empty, fold, make_records
from features.subjects import Subject, known, partition_of, subject_of, user_id_of
from features.tables.dataset import Dataset, open_dataset, read_info, read_table
from features.tables.event_reader import Events, complete
from features.tables.files import table_path
from features.tables.intake import REJECTED_SHARE, admit
from features.tables.order import codes, is_present, order_events
from features.tables.schema import EVENTS, ITEMS, USERS
from features.vocabulary import Vocabulary
from serving.privacy.marks import marks_of_log
from serving.redis.client import connect
from serving.stores.event_log import EventLog
from serving.stores.keys import LIVE, SEQUENCE_BITS, address_of
from serving.stores.log_entries import Entry, Mark, sound
from serving.stores.meta import partitions_for, partitions_of, profile_partitions
from serving.stores.profiles import Applied, ProfileStore, TailFull

SHOWN = 50
"""Events that are shown at most."""

_TIMEOUT_S = 10.0
_PEOPLE = 1000
_EVER = 2**64 - 1
_SEARCHES = pa.schema([EVENTS.field(name) for name in EVENTS.names if name != "item_id"])


@dataclass(frozen=True, slots=True)
class History:
    """One person's events in log order: RECORD [n] and their log ids, uint64 [n]."""

    records: Records
    log_ids: npt.NDArray[np.uint64]

    def between(self, after: int, until: int = _EVER) -> History:
        """The events behind one log id and up to another."""
        # As uint64: numpy would compare a Python integer as float64, which cannot tell neighbouring log ids apart.
        start, end = (int(np.searchsorted(self.log_ids, np.uint64(at), side="right")) for at in (after, until))
        return History(self.records[start:end], self.log_ids[start:end])

    def replayed(self, version: int, after: int = 0) -> Profile:
        """The profile as it was at a version, made of the events behind a log id; what it says is of that version."""
        return fold(empty(), self.between(after, version).records, version)


class Histories:
    """The events of everybody in a data set.

    Attributes:
        subjects: Keys of the people, in the order of their first row.
        events: Number of events.
        rejected: Number of rows that were left out.
    """

    def __init__(self, data: Path) -> None:
        """Reads a data set.

        Raises:
            TablesError: It cannot be read.
        """
        dataset = _history(data)
        people, who = codes(dataset.events["user_id"])
        self.events, self.rejected = dataset.events.num_rows, len(dataset.rejected)
        self.subjects = [_namer(dataset)(name) for name in people]
        self._records, self._log_ids = _records(dataset), _log_ids(dataset.events)
        # Each person's events stand together; `codes` numbers people in the order of their first one.
        ends = np.cumsum(np.bincount(who, minlength=len(people)))
        self._spans = dict(zip(self.subjects, zip([0, *ends.tolist()], ends.tolist(), strict=False), strict=True))

    def of(self, subject: str) -> History:
        """The events of a person, none where nobody knows them."""
        start, end = self._spans.get(subject, (0, 0))
        return History(self._records[start:end], self._log_ids[start:end])


def rebuild(
    data: Path,
    redis_url: str,
    events_redis_url: str | None = None,
    *,
    partitions: int | None = None,
    retention: Retention | None = None,
    max_rejected_share: float = REJECTED_SHARE,
) -> dict[str, Any]:
    """Folds the events of a data set, the warehouse among them, into profiles and stores those.

    Events that came in live since stay: a profile that goes further than the data set is left as it is, one that
    stores newer events beside its state keeps them. What the log says of people holds, also where the profiles were
    lost: what was erased, undone, or forgotten by a reset, is not brought back from any data set, and who allows no
    personal answers gets no profile. What the log has got since the data set was written is applied as well.

    Args:
        data: Directory of the data set.
        redis_url: The profiles Redis.
        events_redis_url: The Redis of the event log, where it is another; there must be a log, as `serve` makes it.
        partitions: Partitions of the event log; None: as the log says.
        retention: How long events stay in profiles.
        max_rejected_share: Share of a table's rows that may be malformed.

    Returns:
        `profiles` written, `kept` as they were, `events` folded, `applied` from the log, `seconds`, and what was left
        out of the data set, as `features.tables.intake.summary` says.

    Raises:
        TablesError: The data set cannot be read, or too many of its rows are malformed; nothing is stored.
        ConfigError: The URL is wrong, no event log is there, or it has another number of partitions.
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    begun = time.monotonic()
    since = int(read_info(data).get("until", 0))
    dataset, kept = _history(data), retention or Retention({})
    left_out = admit(dataset.intake, max_rejected_share, "--max-rejected-share ", dataset.info.get("time_units"))
    with connect(redis_url, _TIMEOUT_S) as client, connect(events_redis_url or redis_url, _TIMEOUT_S) as events:
        # Without the log, whoever was erased or withdrew their consent would have a profile again.
        partitions_of(events)
        partitions = partitions_for(events, partitions)
        store, log = ProfileStore(client, partitions), EventLog(events, partitions)
        store.open()
        log.open()
        # First what may not be there: from then on the store itself refuses it.
        said = list(marks_of_log(log))
        store.mark_many(said)
        undone = frozenset(entry.undone for entries in _logged(log, since) for entry in entries)
        loaded = store.put_states(_states(dataset, store, log, kept, undone))
        # Who takes the place of a damaged profile knows nothing of it yet.
        store.mark_many(said)
        applied = sum(_apply(entries, store, kept, said) for entries in _logged(log, since))
    return {
        "profiles": loaded.written,
        "kept": loaded.kept,
        "events": dataset.events.num_rows,
        "applied": applied,
        **left_out,
        "seconds": round(time.monotonic() - begun, 3),
    }


def rehydrate(
    warehouse: Path, retention: Retention, subjects: Sequence[str], store: ProfileStore, log: EventLog
) -> int:
    """Makes the states of people anew whose own were dropped because they stayed away; what came since stays.

    Args:
        warehouse: Directory of the warehouse.
        retention: How long events stay in profiles.
        subjects: The people; those who still have their state keep it.
        store: The profiles.
        log: The event log: what was erased, and what is not allowed, does not come back.

    Returns:
        The number of profiles made.

    Raises:
        TablesError: The warehouse is no data set, or a file of it is damaged.
        OSError: A file of it cannot be read; a repeat is safe.
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    if table_path(warehouse, "events") is None:
        raise TablesError(f"{warehouse} is not a warehouse: it has no events")
    until = int(read_info(warehouse).get("until", 0))
    # Whoever the warehouse has not caught up with waits for their next event.
    folded = {subject: version for subject, version in store.dropped(subjects).items() if version <= until}
    states = {subject: dataclasses.replace(empty(), version=version) for subject, version in folded.items()}
    for partition, own in _by_partition(folded, log.partitions).items():
        events = _events_of(warehouse, partition, own)
        dataset = Dataset(Events.of(events), ITEMS.empty_table(), USERS.empty_table(), {"until": _EVER})
        for subject, state in _states(dataset, store, log, retention) if events.num_rows else ():
            # The state that was dropped had everything up to its version, whatever of it has gone since.
            states[subject] = dataclasses.replace(state, version=max(state.version, folded[subject]))
    return store.put_states(states.items()).written


def show(user: str, redis_url: str, bundle: Path | None = None, *, partitions: int | None = None) -> dict[str, Any]:
    """One profile as a person would read it.

    Args:
        user: The person, as the warehouse names them: `a:` and the anonymous id of a visitor.
        redis_url: The profiles Redis.
        bundle: Names items, categories and event types; without it items are shown by their key.
        partitions: Partitions of the event log; None: as the profiles say.

    Returns:
        `user`, `found`, `damage` (what is wrong with the stored profile and how it is repaired; "" where it is whole),
        `profile_version`, `event_count`, `seen_only` (items remembered only as seen), `categories` {name: share} and
        the newest `events`, newest first. Of a profile that cannot be read, the first three.

    Raises:
        BundleError: The bundle is damaged.
        ConfigError: The URL is wrong.
        ProfileStoreUnavailable: Redis does not answer.
    """
    with connect(redis_url, _TIMEOUT_S) as client:
        store = ProfileStore(client, profile_partitions(client, partitions))
        store.open()
        try:
            profile = store.read(subject_of(user))
        except ProfileCorrupt as error:
            return {"user": user, "found": True, "damage": str(error)}
    items, types = _names(profile, bundle)
    return {
        "user": user,
        "found": profile.count > 0 or profile.lost,
        "damage": PAST_LOST if profile.lost else "",
        "profile_version": profile.version,
        "event_count": profile.count,
        "seen_only": int(profile.older_items.size),
        "categories": _shares(profile, items),
        "events": [_event(record, items, types) for record in profile.records[::-1][:SHOWN]],
    }


def _logged(log: EventLog, after: int) -> Iterator[list[Entry]]:
    """The events of the log behind a log id, one partition after the other, each in log order and in pieces."""
    for partition in range(log.partitions):
        place = after
        while entries := log.read(partition, place):
            yield entries
            place = entries[-1].log_id


def _apply(
    entries: Sequence[Entry], store: ProfileStore, retention: Retention, said: Sequence[tuple[int, Mark]]
) -> int:
    """Applies events of one partition to the profiles that lack them; returns the number of those.

    What is damaged still, a tail or the profile of a user whom the data set does not have, the log has all of; `said`
    is what it knows these users to have said.
    """
    own: dict[str, list[tuple[int, bytes]]] = {}
    events, _ = sound(entries)
    records = np.frombuffer(b"".join(entry.record for entry in events), RECORD)
    expired = retention.expired(records, now_ms())
    for entry, gone in zip(events, expired.tolist(), strict=True):
        if not gone:
            own.setdefault(entry.subject, []).append((entry.log_id, entry.record))
    for subject in store.damaged(list(own)):
        store.start_over(subject)
        store.mark_many([one for one in said if one[1].address == address_of(subject)])
    applied = 0
    for (subject, news), reply in zip(own.items(), store.apply_many(list(own.items())), strict=True):
        if isinstance(reply, TailFull):
            # All before this is in the profile, from the data set or from here: it may be folded.
            store.compact(subject, news[0][0] - 1)
            reply = store.apply(subject, news)
        if isinstance(reply, Applied):
            applied += reply.inserted
        else:
            raise reply
    return applied


def _namer(dataset: Dataset) -> Callable[[str], Subject]:
    """Returns the reading of a user id: a warehouse, which goes up to a log id, names anonymous users too."""
    return subject_of if "until" in dataset.info else known


def _states(
    dataset: Dataset, store: ProfileStore, log: EventLog, retention: Retention, undone: Collection[int] = ()
) -> Iterator[tuple[str, Profile]]:
    """The profile of each person of a data set, less what they erased or undid and what is past its retention."""
    key = _namer(dataset)
    people, who = codes(dataset.events["user_id"])
    records, log_ids = _records(dataset), _log_ids(dataset.events)
    # Each person's events stand together; `codes` numbers people in the order of their first one.
    ends = np.cumsum(np.bincount(who, minlength=len(people)))
    gone = retention.expired(records, now_ms())
    gone |= np.isin(log_ids, np.array(sorted(undone), np.uint64))
    for chunk in _chunked(len(people), _PEOPLE):
        subjects = [key(people[person]) for person in chunk]
        refused = zip(store.erased_before(subjects), log.erased(subjects), strict=True)
        for person, subject, (erased, past) in zip(chunk, subjects, refused, strict=True):
            start, end = int(ends[person - 1]) if person else 0, int(ends[person])
            # As uint64: numpy would compare a Python integer as float64, which cannot tell neighbouring log ids apart.
            start += int(np.searchsorted(log_ids[start:end], np.uint64(erased), side="right"))
            own = np.arange(start, end)
            own = own[~gone[own] & ~_past(log_ids[own], records["timestamp"][own], past)]
            if own.size:
                yield subject, fold(empty(), records[own], int(log_ids[end - 1]))


def _by_partition(subjects: Iterable[str], partitions: int) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for subject in subjects:
        found.setdefault(partition_of(subject, partitions), []).append(subject)
    return found


def _events_of(warehouse: Path, partition: int, subjects: Sequence[str]) -> pa.Table:
    """What a warehouse holds of some people of a partition that belongs into profiles, in order, searches too."""
    names = [user_id_of(subject) for subject in subjects]
    tables = [EVENTS.empty_table()]
    for name in ("events", "searches"):
        for file in sorted(warehouse.glob(f"{name}/date=*/p{partition:02d}-*.parquet")):
            try:
                found = pq.read_table(file, filters=[("user_id", "in", names)], partitioning=None)
                blank = pa.array([""] * found.num_rows, pa.string())
                found = found if "item_id" in found.column_names else found.append_column("item_id", blank)
                tables.append(complete(found, EVENTS.names).cast(EVENTS))
            except pa.ArrowException as error:
                raise TablesError(f"{file} cannot be read as Parquet: {error}") from error
    events = pa.concat_tables(tables)
    return order_events(events.filter(pc.fill_null(events["personal"], True)))


def _past(log_ids: npt.NDArray[np.uint64], timestamps: npt.NDArray[np.int64], erased: int) -> npt.NDArray[np.bool_]:
    """Which events are from before an erasure at a time in ms: by when they were logged, else by when they happened."""
    if not erased:
        return np.zeros(log_ids.size, np.bool_)
    logged = (log_ids >> np.uint64(SEQUENCE_BITS)).astype(np.int64)
    return np.where(log_ids >= np.uint64(LIVE), logged, timestamps) <= erased


def _history(data: Path) -> Dataset:
    """A data set with all that profiles fold: of a warehouse also what is newer than complete, and searches."""
    dataset = open_dataset(data, until=_EVER, everybody=True)
    if "until" not in dataset.info:
        return dataset
    events, intake, searches = dataset.events, dataset.intake, table_path(data, "searches")
    if searches is not None:
        found = read_table(searches, _SEARCHES, ("user_id", "event_type", "log_id"))
        blank = pa.array([""] * found.table.num_rows, pa.string())
        about_none = found.table.append_column(EVENTS.field("item_id"), blank).select(EVENTS.names).cast(EVENTS)
        events, intake = pa.concat_tables([events, about_none]), {**intake, "searches": found.intake}
    events = order_events(events.filter(pc.fill_null(events["personal"], True)))
    return dataclasses.replace(dataset, stream=Events.of(events), intake=intake)


def _chunked(length: int, size: int) -> Iterator[range]:
    return (range(start, min(start + size, length)) for start in range(0, length, size))


def _records(dataset: Dataset) -> Records:
    """The records that ingest would have written for the events, with the items as they are in the data set."""
    events, items = dataset.events, dataset.items
    columns = columns_of(items, np.empty((items.num_rows, 0), np.float32))
    named, what = codes(events["item_id"])
    type_names, kind = codes(events["event_type"])
    keys = item_keys(named)
    rows = Vocabulary.build([str(name) for name in items["item_id"].to_pylist()]).rows_of_keys(keys)
    timed = is_present(events["timestamp"])
    return make_records(
        keys[what],
        *history_keys(rows[what], columns, Logged.of(events)),
        pc.fill_null(events["timestamp"], 0).to_numpy() if timed else 0,
        events["value"].to_numpy(),
        event_type_keys(type_names)[kind],
    )


def _log_ids(events: pa.Table) -> npt.NDArray[np.uint64]:
    """The log id of each event; what was never in a log gets its place in the table, below every live one."""
    places = np.arange(1, events.num_rows + 1, dtype=np.uint64)
    if not is_present(events["log_id"]):
        return places
    log_ids = pc.fill_null(events["log_id"], 0).to_numpy().astype(np.uint64)
    return np.where(log_ids > 0, log_ids, places)


def _names(profile: Profile, bundle: Path | None) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
    """What the keys of a profile stand for: items by key, event types by key."""
    if bundle is None:
        return {}, {event_type_key(name): name for name in EVENT_TYPES}
    opened = open_bundle(bundle)
    table = read_items(opened)
    keys = item_keys(table["item_id"].to_pylist())
    rows = np.flatnonzero(np.isin(keys, profile.records["item"]))
    found = table.select(["item_id", "title", "categories"]).take(rows).to_pylist()
    names = {*EVENT_TYPES, *opened.model.event_types}
    return dict(zip(keys[rows].tolist(), found, strict=True)), {event_type_key(name): name for name in names}


def _event(record: Any, items: dict[int, dict[str, Any]], types: dict[int, str]) -> dict[str, Any]:
    key, kind, value = int(record["item"]), int(record["event_type"]), float(record["value"])
    item = items.get(key, {})
    return {
        "item": item.get("item_id", f"key {key:016x}"),
        "title": item.get("title"),
        "event_type": types.get(kind, f"key {kind:08x}"),
        "time": datetime.fromtimestamp(int(record["timestamp"]) / 1000, UTC).isoformat(timespec="seconds"),
        "value": None if np.isnan(value) else value,
    }


def _shares(profile: Profile, items: dict[int, dict[str, Any]]) -> dict[str, float]:
    """The decayed share of each category whose name is known, strongest first."""
    names = {item_key(item["categories"][0]): item["categories"][0] for item in items.values() if item["categories"]}
    weights = 0.5 ** (np.arange(profile.records.size)[::-1] / HALF_LIFE)
    shares: dict[str, float] = {}
    for key, weight in zip(profile.records["category"].tolist(), weights.tolist(), strict=True):
        if key in names:
            shares[names[key]] = shares.get(names[key], 0.0) + weight / weights.sum()
    return {name: round(share, 4) for name, share in sorted(shares.items(), key=lambda pair: (-pair[1], pair[0]))}
