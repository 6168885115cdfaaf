"""Commands about the hosts of a log: lists and retires their copies, and replays erasures into those in reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from features.errors import TablesError
from serving.errors import ConfigError
from serving.jobs.copies import hold_in, reachable, unknown_erasures, waits
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.ledger import Erasure, Ledger
from serving.privacy.replay import replay_ledgers
from serving.redis.client import connect
from serving.stores.event_log import EventLog
from serving.stores.meta import partitions_for
from serving.stores.registry import Copy

_TIMEOUT_S = 10.0


def hosts(events_redis_url: str, retired: Sequence[str] = (), partitions: int | None = None) -> dict[str, Any]:
    """Lists the copies of a log; some are declared gone for good first.

    Args:
        events_redis_url: The events Redis.
        retired: Ids, or the beginnings of ids, of copies that are gone for good.
        partitions: Partitions of the event log; None: as the log says.

    Returns:
        `copies` [{`copy_id`, `kind`, `host`, `place`, `own`, `state`, `seen_at`, `retired_at`, `waiting` (erasures that
        it has still to confirm)}], `retired` (ids), `completed` (receipts that needed no more than that).

    Raises:
        NotFound: No copy has such an id, or several.
        ConfigError: A copy that is to be retired is in use, or the URL is wrong.
        EventLogUnavailable: The events Redis does not answer.
    """
    with connect(events_redis_url, _TIMEOUT_S) as client:
        log = EventLog(client, partitions_for(client, partitions), unsafe=True)
        certificates = Certificates(log)
        copy_ids = [certificates.registry.retire(name).copy_id for name in retired]
        completed = certificates.retire()
        now, pending = log.now_ms(), certificates.pending()
        copies = [_row(copy, pending, now) for copy in certificates.registry.copies()]
        return {"copies": copies, "retired": copy_ids, "completed": completed}


def replay_everywhere(
    ledgers: Sequence[Path], redis_url: str, events_redis_url: str, partitions: int | None = None
) -> dict[str, Any]:
    """Replays ledgers into the stores, then into every registered folder of Parquet that this host reaches.

    Returns:
        The result of `replay_ledgers`, and `places` [{`copy_id`, `host`, `place`, `result`, `rows` (that went)}];
        `result` is "erased", "in use" (its warehouse makes them hold itself), "not reachable from this host",
        "retired", "damaged: ..." or "failed: ...".

    Raises:
        ConfigError: A URL is wrong, a ledger is damaged, or it is one of another log.
        Unavailable: A Redis does not answer; a repeat is safe.
    """
    erasures = [erasure for path in ledgers for erasure in Ledger(path).erasures()]
    replayed: dict[str, Any] = dict(replay_ledgers(ledgers, redis_url, events_redis_url, partitions))
    with connect(events_redis_url, _TIMEOUT_S) as client:
        log = EventLog(client, partitions_for(client, partitions), unsafe=True)
        certificates = Certificates(log)
        certificates.remember(unknown_erasures(erasures, certificates.erasures()))
        # Read before the erasures: of one that comes after them, no folder here can be confirmed.
        pending = certificates.pending()
        # The log's, not the ledgers' alone: it may have others that these folders have missed.
        noted = certificates.erasures()
        places = []
        for copy in certificates.registry.copies("warehouse"):
            result, rows = _replay_into(copy, noted, certificates, pending)
            place = {"copy_id": copy.copy_id, "host": copy.host, "place": copy.place, "result": result, "rows": rows}
            places.append(place)
    return replayed | {"places": places}


def _row(copy: Copy, pending: Sequence[Certificate], now_ms: int) -> dict[str, Any]:
    state = copy.state if copy.alive(now_ms) else "not running"
    return {
        "copy_id": copy.copy_id,
        "kind": copy.kind,
        "host": copy.host,
        "place": copy.place,
        "own": copy.own,
        "state": "retired" if copy.retired_at else state,
        "seen_at": copy.seen_at,
        "retired_at": copy.retired_at,
        "waiting": sum(waits(certificate, copy.copy_id) for certificate in pending),
    }


def _replay_into(
    copy: Copy, erasures: Sequence[Erasure], certificates: Certificates, pending: Sequence[Certificate]
) -> tuple[str, int]:
    """Makes erasures hold in one registered folder; returns the result, and the number of rows that went."""
    if copy.retired_at:
        return "retired", 0
    folder = reachable(copy)
    if folder is None:
        return "not reachable from this host", 0
    try:
        rows = hold_in(folder, copy, erasures, certificates.registry)
    except TablesError as error:
        return f"damaged: {error}", 0
    except (ConfigError, OSError) as error:  # the other folders need not wait for it
        return f"failed: {error}", 0
    if rows is None:
        return "in use", 0
    for certificate in pending:
        certificates.confirm_copy(certificate, copy.copy_id)
    return "erased", rows
