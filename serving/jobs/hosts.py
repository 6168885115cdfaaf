"""A host's part in erasures: it registers what it holds, catches up on what it missed, and confirms.

A host has a ledger, perhaps a folder of Parquet that is not the log's warehouse, and the address of a profile store. It
goes through every erasure that was made while it did not run before it says that it is ready, and through those that
are made while it runs within seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from features.errors import PenchantError, TablesError
from features.private_files import make_folders
from serving.config import ServeConfig
from serving.errors import ConfigError, InUse, ServingError, Unavailable
from serving.folder_identity import HOST, FolderIdentity, host_name, new_id, read_identity, write_identity
from serving.observability.outages import Outage
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.ledger import Erasure, Ledger
from serving.privacy.replay import forget_in, replay, replay_ledgers
from serving.redis.client import connect, printable
from serving.restart import Report, Trouble, described, keep_running
from serving.stores.event_log import EventLog
from serving.stores.meta import partitions_for
from serving.stores.profiles import ProfileStore
from serving.stores.registry import BEAT_S, Claim, Copy, Heartbeat, Kind, Registry
from serving.warehouse.derived import derive
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.revision import hold_erasures

_TIMEOUT_S = 10.0
_REGISTER_S = 5.0
"""Pause between two looks whether the log still knows what this host has."""
_log = logging.getLogger(__name__)


class HostKeeper:
    """Keeps one host's copies of the log in step with its erasures."""

    def __init__(self, config: ServeConfig, log: EventLog, store: ProfileStore, store_url: str) -> None:
        """Says what the host has; `catch_up` and `run` do the work.

        Args:
            config: Its settings.
            log: The event log.
            store: The profile store that it serves from.
            store_url: Where that is, without a password.
        """
        self._log, self._store, self._store_url = log, store, store_url
        self._due_ms = int(config.purge_hours * 3_600_000)
        self._certificates = Certificates(log, self._due_ms)
        self._registry = self._certificates.registry
        self._ledger, self._home = Ledger(config.ledger_path), config.state_dir / HOST
        self._warehouse = config.warehouse_path.absolute() if config.warehouse else None
        self._folders = sorted({config.warehouse_path.absolute(), (config.state_dir / "warehouse").absolute()})
        self._bundle = config.bundle.resolve()
        self._registered = -_REGISTER_S
        self._heartbeat, self._process = Heartbeat(self._registry), new_id()
        self._claims: dict[Path, Claim] = {}
        self._behind = set[Path]()
        """Folders that this host has taken and that have not been through all erasures yet."""
        self._damaged: dict[Path, str] = {}
        self._outage, self._damage = (
            Outage(_log, "erasures wait on this host"),
            Outage(_log, "erasures wait for Parquet"),
        )
        self._host_id, self._caught_up = "", False

    def catch_up(self) -> int:
        """Registers the host and brings everything it holds through all erasures; returns how many did not hold.

        Raises:
            ConfigError: The ledger is damaged, or is of another log.
            Unavailable: A Redis does not answer; a repeat is safe.
        """
        self._log.open()
        self._store.open()
        self._join()
        noted = self._ledger.erasures()
        self._certificates.remember(_newer(noted, self._certificates.erasures()))
        known = self._certificates.erasures()
        self._note(known)
        again = replay(known, self._log, self._store, self._due_ms) if known else 0
        self._register(now=True)
        self._behind |= {folder for folder in self._folders if folder.exists()}
        self._follow()
        self._caught_up = True
        return again

    def run(self, stop: threading.Event, report: Report = lambda _: None) -> None:
        """Catches up unless that is done, then follows every erasure until `stop` is set.

        Args:
            stop: Ends it.
            report: Told what erasures wait for on this host, and "" while they wait for nothing.
        """
        while not stop.wait(BEAT_S / 2):
            try:
                if not self._caught_up:
                    self.catch_up()
                self._register()
                self._follow()
                self._outage.works()
                report("; ".join(self._damaged.values()))
            except (PenchantError, OSError) as error:
                if not isinstance(error, Unavailable):  # of which each call to Redis speaks
                    self._outage.failed(error)
                report(f"waits: {described(error)}")

    def _follow(self) -> None:
        """Brings what is registered of this host through the erasures that wait for it, or that it has missed."""
        pending = self._certificates.pending()
        if not pending and not self._behind:
            return
        # Read after the copies were registered: a certificate that does not name one of them is among these.
        known = self._certificates.erasures()
        self._note(known)
        self._tend(known, pending)
        self._certificates.retire()

    def close(self) -> None:
        """Says that the host stops."""
        self._heartbeat.end()

    def _join(self) -> None:
        """Finds out which host this is."""
        make_folders(self._home)
        self._host_id = self._taken(self._home, "ledger", str(self._ledger.path.absolute()), wait=True)

    def _taken(self, folder: Path, kind: Kind, place: str, *, wait: bool = False) -> str:
        """Takes a folder and gives signs of life of it, under a new id where it is a copy of one in use; returns it.

        A folder that another process of ours has, as while one instance follows another, is left to that one.
        """
        claim, identity = self._claims.setdefault(folder, Claim()), read_identity(folder)
        if identity and self._heartbeat.has(identity.copy_id):
            return identity.copy_id
        verdict, patience = "busy", time.monotonic() + 2.5 * BEAT_S
        while verdict == "busy":
            known = self._registry.get(identity.copy_id) if identity else None
            verdict = claim.verdict(folder, known, self._registry.now_ms())
            if verdict == "busy" and (not wait or time.monotonic() > patience):
                assert identity is not None
                return identity.copy_id
            if verdict == "busy":
                time.sleep(BEAT_S / 4)
        if verdict == "copied":
            _log.warning("%s is a copy of a folder that is in use on another host; it is registered as its own", folder)
        copy_id = identity.copy_id if identity and verdict == "free" else new_id()
        taken = FolderIdentity(copy_id, f"{self._process}.0")
        write_identity(folder, taken)
        self._registry.register(kind, copy_id, place)
        self._behind |= {folder} if kind == "warehouse" else set()
        self._heartbeat.say(folder, taken, "serving" if kind == "ledger" else "kept, not written")
        return copy_id

    def _register(self, *, now: bool = False) -> None:
        """Registers what the host has, again where the log has lost it, if it is time or `now`."""
        if not now and time.monotonic() - self._registered < _REGISTER_S:
            return
        self._registered = time.monotonic()
        self._host_id = self._taken(self._home, "ledger", str(self._ledger.path.absolute()))
        self._registry.register("ledger", self._host_id, str(self._ledger.path.absolute()))
        known = self._registry.get(self._store.store_id())
        if known is None or known.retired_at:  # hosts may call one store by several names
            self._registry.register("profiles", self._store.store_id(), self._store_url)
        register_made(self._registry, "bundle", self._bundle)
        for folder in self._folders:
            self._keep_folder(folder)
        self._heartbeat.restate(self._host_id, self._state())
        forget_deleted(self._registry)

    def _state(self) -> str:
        """Says what the host does, and what it is refused."""
        own = self._registry.own("warehouse")
        if self._warehouse is None or own is None:
            return "serving"
        identity = read_identity(self._warehouse)
        if identity and identity.copy_id == own.copy_id:
            return "serving"
        return f"serving; its warehouse is refused, for that of the log is {own.named()}"

    def _keep_folder(self, folder: Path) -> None:
        """Registers a folder of Parquet that no warehouse writes, so that erasures wait for it."""
        files = WarehouseFiles(folder)
        identity = read_identity(folder)
        own = self._registry.own("warehouse")
        if not files.holds_rows() or (own and identity and identity.copy_id == own.copy_id):
            return
        if identity and self._heartbeat.has(identity.copy_id):
            return
        if own is None and folder == self._warehouse:
            return  # its process is about to register it
        with contextlib.suppress(InUse):
            files.open(wait_s=0.0)
            try:
                self._taken(folder, "warehouse", str(folder))
            finally:
                files.close()

    def _note(self, known: Sequence[Erasure]) -> None:
        """Brings the ledger up to what the log knows."""
        noted = {one.certificate_id for one in self._ledger.erasures()}
        if missing := [one for one in known if one.certificate_id not in noted]:
            self._ledger.note(*missing)

    def _tend(self, known: Sequence[Erasure], pending: Sequence[Certificate]) -> None:
        """Makes erasures hold in what this host has, and confirms it."""
        store_id = self._store.store_id()
        unmarked = [one for one in pending if _waits(one, store_id, logically=True)]
        if unmarked:
            forget_in(self._store, self._certificates, unmarked)
        for one in unmarked:
            self._certificates.confirm_copy(one, store_id, purged=False)
        for one in pending:
            self._certificates.confirm_copy(one, self._host_id)
        places = {folder: read_identity(folder) for folder in self._folders if folder.exists()}
        ids = {identity.copy_id: folder for folder, identity in places.items() if identity}
        for copy in self._registry.copies("warehouse"):
            folder = ids.get(copy.copy_id) or reachable(copy)
            waiting = [one for one in pending if _waits(one, copy.copy_id)]
            if folder and (waiting or folder in self._behind):
                self._hold(folder, copy, known, waiting)
        # What is not registered holds no rows, or is about to be taken by its warehouse, which sees to it.
        self._behind &= set(self._damaged)

    def _hold(self, folder: Path, copy: Copy, known: Sequence[Erasure], waiting: Sequence[Certificate]) -> None:
        """Makes erasures hold in a folder of Parquet, and confirms those that wait for it."""
        try:
            gone = hold_in(folder, copy, known, self._registry, self._heartbeat)
        except (TablesError, ConfigError, OSError) as error:
            self._damage.failed(f"{folder}: {error}", folder)
            self._damaged[folder] = f"waits for {folder}: {described(error)}"
            return
        self._damage.works(folder)
        self._damaged.pop(folder, None)
        if gone is None:  # a process has it, which makes them hold, and confirms
            return
        for one in waiting:
            self._certificates.confirm_copy(one, copy.copy_id)


@contextlib.contextmanager
def kept(config: ServeConfig, redis_url: str, events_url: str, trouble: Trouble) -> Iterator[None]:
    """Registers this host with the log and keeps up with its erasures while the block runs.

    Args:
        config: The settings.
        redis_url: The profiles Redis.
        events_url: The events Redis.
        trouble: Told what erasures wait for on this host.

    Raises:
        ConfigError: The ledger is damaged, or is of another log.
    """
    stop = threading.Event()
    with connect(redis_url, _TIMEOUT_S) as profiles, connect(events_url, _TIMEOUT_S) as events:
        log = EventLog(events, config.partitions, default=config.default_consent, unsafe=True)
        keeper = HostKeeper(config, log, ProfileStore(profiles, config.partitions), printable(redis_url))
        try:
            if again := keeper.catch_up():
                known = len(Ledger(config.ledger_path).erasures())
                _log.warning(
                    "%d of %d erasures did not hold, as after a backup was put back; they do now", again, known
                )
        except ConfigError:
            raise
        except Unavailable as error:  # of which each call to Redis speaks
            _log.info("the erasures that this host has missed wait: %s", error)
        except (ServingError, OSError) as error:
            _log.warning("the erasures that this host has missed wait: %s", error)
        work = partial(keep_running, "erasures", partial(keeper.run, stop), stop, trouble.reporter("erasures"))
        thread = threading.Thread(target=partial(work, patient=True), name="host", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(_TIMEOUT_S / 2)  # a Redis that hangs keeps no service from stopping
            keeper.close()


def reachable(copy: Copy) -> Path | None:
    """Returns the folder of a registered warehouse if this host reaches it: the very one, not one of the same name."""
    folder = Path(copy.place)
    with contextlib.suppress(ConfigError, OSError):
        identity = read_identity(folder)
        if identity and identity.copy_id == copy.copy_id:
            return folder
    return None


def hold_in(
    folder: Path, copy: Copy, erasures: Sequence[Erasure], registry: Registry, heartbeat: Heartbeat | None = None
) -> int | None:
    """Makes erasures hold in a folder of Parquet that no warehouse writes now.

    Args:
        folder: The folder.
        copy: What is registered of it.
        erasures: The erasures.
        registry: The register.
        heartbeat: That of the process that keeps the folder, if it is this one.

    Returns:
        The number of rows that went; None if a process has the folder, which makes them hold itself.

    Raises:
        TablesError: A file is damaged; what the others hold went.
        EventLogUnavailable: Redis does not answer; a repeat is safe.
    """
    kept_here = heartbeat is not None and heartbeat.has(copy.copy_id)
    if copy.alive(registry.now_ms()) and not kept_here:
        return None
    files = WarehouseFiles(folder)
    try:
        files.open(wait_s=0.0)
    except InUse:
        return None
    try:
        if not kept_here:  # a process that stood still meanwhile may not go on
            files.claim(FolderIdentity(copy.copy_id, f"{new_id()}.0"))
            registry.seen(copy.copy_id, "", "gone through erasures")
        gone = hold_erasures(files, erasures)
        derive(files)
        return gone
    finally:
        files.close()


def register_made(registry: Registry, kind: Kind, place: Path) -> None:
    """Registers something made from users' data that no erasure reaches, so that certificates name it.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    name = hashlib.blake2b(f"{kind} {host_name()} {place}".encode(), digest_size=16).hexdigest()
    registry.register(kind, name, str(place))


def forget_deleted(registry: Registry) -> None:
    """Removes from the register what was made on this host and has been deleted since.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    for copy in registry.copies("batch", "bundle"):
        if copy.host == host_name() and not Path(copy.place).exists():
            registry.forget(copy.copy_id)


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
        gone = [certificates.registry.retire(name).copy_id for name in retired]
        completed = certificates.retire()
        now, pending = log.now_ms(), certificates.pending()
        lines = [
            {
                "copy_id": copy.copy_id,
                "kind": copy.kind,
                "host": copy.host,
                "place": copy.place,
                "own": copy.own,
                "state": "retired" if copy.retired_at else copy.state if copy.alive(now) else "not running",
                "seen_at": copy.seen_at,
                "retired_at": copy.retired_at,
                "waiting": sum(_waits(one, copy.copy_id) for one in pending),
            }
            for copy in certificates.registry.copies()
        ]
        return {"copies": lines, "retired": gone, "completed": completed}


def replay_everywhere(
    ledgers: Sequence[Path], redis_url: str, events_redis_url: str, partitions: int | None = None
) -> dict[str, Any]:
    """`erasure.replay_ledgers`, then the same in every registered folder of Parquet that this host reaches.

    Returns:
        What `replay_ledgers` says, and `places` [{`copy_id`, `host`, `place`, `result`, `rows` (that went)}]; `result`
        is "erased", "in use" (its warehouse makes them hold itself), "not reachable from this host", or "retired".

    Raises:
        ConfigError: A URL is wrong, a ledger is damaged, or it is one of another log.
        Unavailable: A Redis does not answer; a repeat is safe.
        TablesError: A file of the Parquet is damaged.
    """
    erasures = [one for path in ledgers for one in Ledger(path).erasures()]
    said: dict[str, Any] = dict(replay_ledgers(ledgers, redis_url, events_redis_url, partitions))
    with connect(events_redis_url, _TIMEOUT_S) as client:
        log = EventLog(client, partitions_for(client, partitions), unsafe=True)
        certificates = Certificates(log)
        certificates.remember(_newer(erasures, certificates.erasures()))
        known = certificates.erasures()
        places = []
        for copy in certificates.registry.copies("warehouse"):
            result, rows = _replayed(copy, known, certificates)
            places.append(
                {"copy_id": copy.copy_id, "host": copy.host, "place": copy.place, "result": result, "rows": rows}
            )
    return said | {"places": places}


def _replayed(copy: Copy, known: Sequence[Erasure], certificates: Certificates) -> tuple[str, int]:
    """Makes erasures hold in one registered folder; says what came of it, and how many rows went."""
    if copy.retired_at:
        return "retired", 0
    folder = reachable(copy)
    if folder is None:
        return "not reachable from this host", 0
    try:
        rows = hold_in(folder, copy, known, certificates.registry)
    except TablesError as error:
        return f"damaged: {error}", 0
    if rows is None:
        return "in use", 0
    for one in certificates.pending():
        certificates.confirm_copy(one, copy.copy_id)
    return "erased", rows


def _newer(erasures: Sequence[Erasure], known: Sequence[Erasure]) -> list[Erasure]:
    """The erasures that are not known, or are known from further back."""
    there: dict[str, int] = {}
    for one in known:
        there[one.certificate_id] = max(there.get(one.certificate_id, 0), one.log_id)
    return [one for one in erasures if one.log_id > there.get(one.certificate_id, -1)]


def _waits(certificate: Certificate, copy_id: str, *, logically: bool = False) -> bool:
    """Returns True if a certificate waits for a copy; `logically`, if it waits for its first date."""
    return any(one.copy_id == copy_id and one.open and not (logically and one.erased_at) for one in certificate.copies)
