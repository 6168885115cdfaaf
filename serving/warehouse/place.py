"""Which folder is the warehouse of a log, and whether this process may write it.

The log's consumer group fills one folder. The first warehouse of a log registers its folder; a process with the same
folder, by whatever name and from whatever host, stands by and takes over; one with another folder is refused.
"""

from __future__ import annotations

import logging

from serving.errors import ConfigError, InUse
from serving.folder_identity import FolderIdentity, new_id, read_identity, write_identity
from serving.stores.consumer_group import has_acknowledged
from serving.stores.event_log import EventLog
from serving.stores.registry import Claim, Copy, Heartbeat, Registry
from serving.warehouse.files import WarehouseFiles

GROUP = "warehouse"
_log = logging.getLogger(__name__)


class OtherPlace(ConfigError):
    """The warehouse of this log is another folder."""


class WarehousePlace:
    """The claim of a folder to be the warehouse of a log."""

    def __init__(self, log: EventLog, files: WarehouseFiles) -> None:
        """Takes the log and the files of the folder."""
        self._log, self._files = log, files
        self._registry = Registry(log)
        self._heartbeat = Heartbeat(self._registry)
        self._claim, self._process, self._is_taken = Claim(), new_id(), False

    def take(self) -> None:
        """Makes the folder, which is open, this process's own.

        Raises:
            OtherPlace: The warehouse of this log is another folder.
            InUse: A process on another host writes this folder.
            EventLogUnavailable: Redis does not answer.
        """
        if self._is_taken:
            return
        identity, now = read_identity(self._files.out), self._registry.now_ms()
        registered = self._registry.get(identity.copy_id) if identity else None
        verdict = self._claim.verdict(self._files.out, registered, now)
        if registered and verdict == "copied":
            raise self._refuse_copy(registered)
        if registered and verdict == "busy":
            raise InUse(
                f"{self._files.out} is written by a process on {registered.host}; this one takes over when it ends"
            )
        self._require_own(identity)
        claimed = FolderIdentity(identity.copy_id if identity else new_id(), f"{self._process}.0")
        if registered and identity and registered.token and registered.process != identity.process:
            _log.warning(
                "%s is not as the last warehouse of this log left it: it was put back from a backup, or copied. What "
                "was written since is missing; penchant validate says from when to when",
                self._files.out,
            )
        # In the folder first: an id that the log has chosen and no folder has would shut out every folder.
        self._files.claim(claimed)
        self._registry.register("warehouse", claimed.copy_id, str(self._files.out.absolute()))
        if not self._registry.choose("warehouse", claimed.copy_id):
            raise self._refuse(self._registry.own("warehouse"), claimed)
        self._heartbeat.say(self._files.out, claimed, "writing")
        self._is_taken = True

    def release(self) -> None:
        """Gives the folder up for the next process."""
        self._is_taken, self._files.identity = False, None
        self._heartbeat.end()

    def _require_own(self, identity: FolderIdentity | None) -> None:
        """Refuses a folder that is not the warehouse of this log.

        Raises:
            OtherPlace: It is not.
        """
        owner = self._registry.own("warehouse")
        if owner and (identity is None or identity.copy_id != owner.copy_id):
            raise self._refuse(owner, identity)
        new = not self._files.holds_rows() and not self._files.info()
        # After a warehouse that was registered and then retired, the next one goes on with what is not acknowledged.
        if new and not self._registry.copies("warehouse") and has_acknowledged(self._log, GROUP):
            raise OtherPlace(
                f"a warehouse has written a part of this log already, and {self._files.out} holds nothing of it: give "
                "the folder that has it as warehouse_dir; if that is gone for good, let penchant warehouse --forget "
                "drop it, and what the log still holds is written here"
            )

    def _refuse(self, owner: Copy | None, identity: FolderIdentity | None) -> OtherPlace:
        register_rows(self._registry, self._files, identity)
        # Its rows are users' data all the same, so erasures have to reach them.
        named = owner.named() if owner else "another one, registered a moment ago"
        folder = self._files.out.absolute()
        return OtherPlace(
            f"the warehouse of this log is {named}, and {folder} is another folder: one log fills one. Give the same "
            "folder on every host (warehouse_dir, a mount that all of them reach), or set warehouse: false here. If "
            "the registered folder is gone for good, run penchant hosts --retire with its id"
        )

    def _refuse_copy(self, original: Copy) -> OtherPlace:
        """Gives a copy of a folder that is in use an identity of its own, and refuses it."""
        register_rows(self._registry, self._files, None)
        return OtherPlace(
            f"{self._files.out.absolute()} is a copy of the warehouse {original.named()}, which is in use: one log "
            "fills one folder. Remove the copy, or set warehouse: false here"
        )


def register_rows(registry: Registry, files: WarehouseFiles, identity: FolderIdentity | None) -> str:
    """Registers a folder that holds rows of users though it is not the log's own; returns its id, "" without rows.

    Args:
        registry: The register.
        files: The folder, which is open.
        identity: Its identity; None gives it a new one.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    if not files.holds_rows():
        return ""
    # Under an id of its own: certificates wait for this folder apart from the warehouse.
    if identity is None:
        identity = FolderIdentity(new_id(), new_id())
        write_identity(files.out, identity)
    registry.register("warehouse", identity.copy_id, str(files.out.absolute()))
    return identity.copy_id
