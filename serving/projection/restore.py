"""Restores evicted profiles from the warehouse."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import TablesError
from features.profile import Profile, Retention, empty
from features.subjects import partition_of, user_id_of
from features.tables.dataset import Dataset, read_info
from features.tables.event_reader import Events, complete
from features.tables.files import table_path
from features.tables.schema import EVENTS, ITEMS, USERS
from serving.projection.histories import LAST_LOG_ID, personal_events, without_item
from serving.projection.states import fold_states
from serving.stores.event_log import EventLog
from serving.stores.profile_eviction import Evictions
from serving.stores.profiles import ProfileStore


def restore_profiles(
    warehouse: Path, retention: Retention, subjects: Sequence[str], store: ProfileStore, log: EventLog
) -> int:
    """Restores the evicted profiles of users who have returned; what they did since stays in them.

    Args:
        warehouse: Directory of the warehouse.
        retention: How long events stay in profiles.
        subjects: The users; a profile that is not evicted stays as it is.
        store: The profiles.
        log: The event log: what was erased, and what is not allowed, does not come back.

    Returns:
        The number of profiles restored.

    Raises:
        TablesError: The warehouse is no data set, or a file of it is damaged; users of other partitions are restored.
        OSError: A file of it cannot be read; a repeat is safe.
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    if table_path(warehouse, "events") is None:
        raise TablesError(f"{warehouse} is not a warehouse: it has no events; give the warehouse_dir of this log")
    until = int(read_info(warehouse).get("until", 0))
    # Of the others the warehouse lacks events; they are restored at their next event, when it has caught up.
    versions = {subject: version for subject, version in Evictions(store).evicted(subjects).items() if version <= until}
    restored, damaged = 0, None
    for partition, members in _by_partition(versions, log.partitions).items():
        try:
            events = _events_of(warehouse, partition, members)
        except TablesError as error:  # the users of other partitions need not wait for it
            damaged = error
            continue
        states = _states(events, {subject: versions[subject] for subject in members}, retention, store, log)
        restored += store.put_states(states.items()).written
    if damaged:
        raise damaged
    return restored


def _states(
    events: pa.Table, versions: Mapping[str, int], retention: Retention, store: ProfileStore, log: EventLog
) -> dict[str, Profile]:
    """Folds the events of evicted users, whose states went up to these versions; of one without events an empty one."""
    states = {subject: dataclasses.replace(empty(), version=version) for subject, version in versions.items()}
    # No items: the events of a warehouse carry the keys of category and creator. `until` marks one, which names
    # anonymous users too.
    dataset = Dataset(Events.of(events), ITEMS.empty_table(), USERS.empty_table(), {"until": LAST_LOG_ID})
    for subject, state in fold_states(dataset, store, log, retention) if events.num_rows else ():
        # The evicted state had everything up to its version, whatever of it has gone since: a lower version would let
        # those events in again.
        states[subject] = dataclasses.replace(state, version=max(state.version, versions[subject]))
    return states


def _by_partition(subjects: Iterable[str], partitions: int) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for subject in subjects:
        groups.setdefault(partition_of(subject, partitions), []).append(subject)
    return groups


def _events_of(warehouse: Path, partition: int, subjects: Sequence[str]) -> pa.Table:
    """Reads what a warehouse holds of some users of a partition that belongs into profiles, searches too."""
    names = [user_id_of(subject) for subject in subjects]
    tables = [EVENTS.empty_table()]
    for name in ("events", "searches"):
        for file in sorted(warehouse.glob(f"{name}/date=*/p{partition:02d}-*.parquet")):
            try:
                rows = pq.read_table(file, filters=[("user_id", "in", names)], partitioning=None)
                rows = rows if "item_id" in rows.column_names else without_item(rows)
                tables.append(complete(rows, EVENTS.names).cast(EVENTS))
            except pa.ArrowException as error:
                raise TablesError(f"{file} cannot be read as Parquet ({error}): put it back from a copy") from error
    return personal_events(pa.concat_tables(tables))
