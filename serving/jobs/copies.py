"""The copies of a log that a host reaches: folders of Parquet, and files that no erasure reaches by itself."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from serving.errors import ConfigError, InUse
from serving.folder_identity import FolderIdentity, host_name, new_id, read_identity
from serving.privacy.certificates import Certificate
from serving.privacy.ledger import Erasure
from serving.stores.registry import Copy, Heartbeat, Kind, Registry
from serving.warehouse.derived import derive
from serving.warehouse.files import WarehouseFiles
from serving.warehouse.revision import hold_erasures


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
        copy: Its entry in the register.
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
        if not kept_here:
            # With a new identity, a process that has stood still meanwhile finds that the folder was taken.
            files.claim(FolderIdentity(copy.copy_id, f"{new_id()}.0"))
            registry.seen(copy.copy_id, "", "gone through erasures")
        removed = hold_erasures(files, erasures)
        derive(files)
        return removed
    finally:
        files.close()


def register_made(registry: Registry, kind: Kind, place: Path) -> None:
    """Registers a file made from users' data that no erasure reaches, so that certificates name it.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    # By its place: the same output written again is the same copy.
    copy_id = hashlib.blake2b(f"{kind} {host_name()} {place}".encode(), digest_size=16).hexdigest()
    registry.register(kind, copy_id, str(place))


def forget_deleted(registry: Registry) -> None:
    """Removes from the register what was made on this host and has been deleted since.

    Raises:
        EventLogUnavailable: Redis does not answer.
    """
    for copy in registry.copies("batch", "bundle"):
        if copy.host == host_name() and not Path(copy.place).exists():
            registry.forget(copy.copy_id)


def unknown_erasures(erasures: Sequence[Erasure], noted: Sequence[Erasure]) -> list[Erasure]:
    """Returns the erasures that are not noted, or are noted from an earlier place in the log."""
    places: dict[str, int] = {}
    for erasure in noted:
        places[erasure.certificate_id] = max(places.get(erasure.certificate_id, 0), erasure.log_id)
    return [erasure for erasure in erasures if erasure.log_id > places.get(erasure.certificate_id, -1)]


def waits(certificate: Certificate, copy_id: str, *, logically: bool = False) -> bool:
    """Returns True if a certificate waits for a copy; `logically`, if it waits for its first date."""
    return any(
        receipt.copy_id == copy_id and receipt.open and not (logically and receipt.erased_at)
        for receipt in certificate.copies
    )
