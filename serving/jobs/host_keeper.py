"""A host's part in erasures: it registers its copies of the log, catches up on what it missed, and confirms.

A host has a ledger, perhaps a folder of Parquet that is not the log's warehouse, and the address of a profile store. It
goes through every erasure that was made while it did not run before it is ready, and through those that are made while
it runs within seconds.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from features.errors import PenchantError, TablesError
from features.private_files import make_folders
from serving.config import ServeConfig
from serving.errors import ConfigError, InUse, ServingError, Unavailable
from serving.folder_identity import HOST, FolderIdentity, new_id, read_identity, write_identity
from serving.jobs.copies import forget_deleted, hold_in, reachable, register_made, unknown_erasures, waits
from serving.observability.outages import Outage
from serving.privacy.certificates import Certificate, Certificates
from serving.privacy.ledger import Erasure, Ledger
from serving.privacy.replay import forget_in, replay
from serving.redis.client import connect, printable
from serving.restart import Report, Trouble, described, keep_running
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from serving.stores.registry import BEAT_S, Claim, Copy, Heartbeat, Kind
from serving.warehouse.files import WarehouseFiles

_TIMEOUT_S = 10.0
_REGISTER_S = 5.0
"""Pause between two rounds of registering, in case the log has lost its register."""
_log = logging.getLogger(__name__)


class HostKeeper:
    """Keeps one host's copies of the log in step with its erasures."""

    def __init__(self, config: ServeConfig, log: EventLog, store: ProfileStore, store_url: str) -> None:
        """Takes what the host has; `catch_up` and `run` do the work.

        Args:
            config: Its settings.
            log: The event log.
            store: The profile store that it serves from.
            store_url: Address of the store, without a password.
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
        self._outage = Outage(_log, "erasures wait on this host")
        self._damage = Outage(_log, "erasures wait for Parquet")
        self._host_id, self._caught_up = "", False

    def catch_up(self) -> int:
        """Registers the host and brings all its copies through all erasures; returns how many did not hold.

        Raises:
            ConfigError: The ledger is damaged, or is of another log.
            Unavailable: A Redis does not answer; a repeat is safe.
        """
        self._log.open()
        self._store.open()
        self._join()
        # The ledger and the log complete each other: either may have been put back from a backup.
        self._certificates.remember(unknown_erasures(self._ledger.erasures(), self._certificates.erasures()))
        erasures = self._certificates.erasures()
        self._note(erasures)
        repeated = replay(erasures, self._log, self._store, self._due_ms) if erasures else 0
        self._register(now=True)
        self._behind |= {folder for folder in self._folders if folder.exists()}
        self._follow()
        self._caught_up = True
        return repeated

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
                if not isinstance(error, Unavailable):  # each call to Redis logs its own outage
                    self._outage.failed(error)
                report(f"waits: {described(error)}")

    def close(self) -> None:
        """Tells the register that the host stops."""
        self._heartbeat.end()

    def _follow(self) -> None:
        """Brings the copies of this host through the erasures that wait for them, or that they have missed."""
        pending = self._certificates.pending()
        if not pending and not self._behind:
            return
        # Read after the copies were registered: a certificate that does not name one of them is among these.
        erasures = self._certificates.erasures()
        self._note(erasures)
        self._hold_everywhere(erasures, pending)
        self._certificates.retire()

    def _join(self) -> None:
        """Finds out which host this is."""
        make_folders(self._home)
        self._host_id = self._take(self._home, "ledger", str(self._ledger.path.absolute()), wait=True)

    def _take(self, folder: Path, kind: Kind, place: str, *, wait: bool = False) -> str:
        """Takes a folder and gives signs of life of it; returns its id, a new one if it is a copy of one in use.

        A folder that another process of this host has, as while one instance follows another, is left to that one.
        """
        claim, identity = self._claims.setdefault(folder, Claim()), read_identity(folder)
        if identity and self._heartbeat.has(identity.copy_id):
            return identity.copy_id
        verdict, patience = "busy", time.monotonic() + 2.5 * BEAT_S
        while verdict == "busy":
            registered = self._registry.get(identity.copy_id) if identity else None
            verdict = claim.verdict(folder, registered, self._registry.now_ms())
            if verdict == "busy" and (not wait or time.monotonic() > patience):
                assert identity is not None
                return identity.copy_id
            if verdict == "busy":
                time.sleep(BEAT_S / 4)
        if verdict == "copied":
            _log.warning("%s is a copy of a folder that is in use on another host; it is registered as its own", folder)
        copy_id = identity.copy_id if identity and verdict == "free" else new_id()
        claimed = FolderIdentity(copy_id, f"{self._process}.0")
        write_identity(folder, claimed)
        self._registry.register(kind, copy_id, place)
        self._behind |= {folder} if kind == "warehouse" else set()
        self._heartbeat.say(folder, claimed, "serving" if kind == "ledger" else "kept, not written")
        return copy_id

    def _register(self, *, now: bool = False) -> None:
        """Registers what the host has, again if the log has lost it, when it is time or `now`."""
        if not now and time.monotonic() - self._registered < _REGISTER_S:
            return
        self._registered = time.monotonic()
        self._host_id = self._take(self._home, "ledger", str(self._ledger.path.absolute()))
        self._registry.register("ledger", self._host_id, str(self._ledger.path.absolute()))
        registered = self._registry.get(self._store.store_id())
        # Only if it is not: hosts may call one store by several names, and the first one stays.
        if registered is None or registered.retired_at:
            self._registry.register("profiles", self._store.store_id(), self._store_url)
        register_made(self._registry, "bundle", self._bundle)
        for folder in self._folders:
            self._keep_folder(folder)
        self._heartbeat.restate(self._host_id, self._state())
        forget_deleted(self._registry)

    def _state(self) -> str:
        """Returns what the host does, and what it is refused."""
        owner = self._registry.own("warehouse")
        if self._warehouse is None or owner is None:
            return "serving"
        identity = read_identity(self._warehouse)
        if identity and identity.copy_id == owner.copy_id:
            return "serving"
        return f"serving; its warehouse is refused, for that of the log is {owner.named()}"

    def _keep_folder(self, folder: Path) -> None:
        """Registers a folder of Parquet that no warehouse writes, so that erasures wait for it."""
        files = WarehouseFiles(folder)
        identity = read_identity(folder)
        owner = self._registry.own("warehouse")
        if not files.holds_rows() or (owner and identity and identity.copy_id == owner.copy_id):
            return
        if identity and self._heartbeat.has(identity.copy_id):
            return
        if owner is None and folder == self._warehouse:
            return  # its process is about to register it
        with contextlib.suppress(InUse):
            files.open(wait_s=0.0)
            try:
                self._take(folder, "warehouse", str(folder))
            finally:
                files.close()

    def _note(self, erasures: Sequence[Erasure]) -> None:
        """Adds to the ledger what the log has and the ledger has not."""
        noted = {erasure.certificate_id for erasure in self._ledger.erasures()}
        if missing := [erasure for erasure in erasures if erasure.certificate_id not in noted]:
            self._ledger.note(*missing)

    def _hold_everywhere(self, erasures: Sequence[Erasure], pending: Sequence[Certificate]) -> None:
        """Makes erasures hold in the copies of this host, and confirms it."""
        store_id = self._store.store_id()
        unmarked = [certificate for certificate in pending if waits(certificate, store_id, logically=True)]
        if unmarked:
            forget_in(self._store, self._certificates, unmarked)
        # The first date only: the bytes leave the disk when the purge rewrites the files, which dates that.
        for certificate in unmarked:
            self._certificates.confirm_copy(certificate, store_id, purged=False)
        # `_note` has synced the ledger to disk.
        for certificate in pending:
            self._certificates.confirm_copy(certificate, self._host_id)
        identities = {folder: read_identity(folder) for folder in self._folders if folder.exists()}
        folders = {identity.copy_id: folder for folder, identity in identities.items() if identity}
        for copy in self._registry.copies("warehouse"):
            folder = folders.get(copy.copy_id) or reachable(copy)
            waiting = [certificate for certificate in pending if waits(certificate, copy.copy_id)]
            if folder and (waiting or folder in self._behind):
                self._hold_folder(folder, copy, erasures, waiting)
        # What is not registered holds no rows, or is about to be taken by its warehouse, which sees to it.
        self._behind &= set(self._damaged)

    def _hold_folder(
        self, folder: Path, copy: Copy, erasures: Sequence[Erasure], waiting: Sequence[Certificate]
    ) -> None:
        """Makes erasures hold in a folder of Parquet, and confirms those that wait for it."""
        try:
            removed = hold_in(folder, copy, erasures, self._registry, self._heartbeat)
        except (TablesError, ConfigError, OSError) as error:
            self._damage.failed(f"{folder}: {error}", folder)
            self._damaged[folder] = f"waits for {folder}: {described(error)}"
            return
        self._damage.works(folder)
        self._damaged.pop(folder, None)
        if removed is None:  # a process has it, which makes them hold, and confirms
            return
        for certificate in waiting:
            self._certificates.confirm_copy(certificate, copy.copy_id)


@contextlib.contextmanager
def host_kept(config: ServeConfig, redis_url: str, events_url: str, trouble: Trouble) -> Iterator[None]:
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
            if repeated := keeper.catch_up():
                total = len(Ledger(config.ledger_path).erasures())
                _log.warning(
                    "%d of %d erasures did not hold, as after a backup was put back; they do now", repeated, total
                )
        except ConfigError:
            raise
        except Unavailable as error:  # each call to Redis logs its own outage
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
