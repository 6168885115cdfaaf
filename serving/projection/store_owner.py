"""The profile store that a log fills: one log fills one, and a projector with another store stands by or is refused."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, replace

from serving.errors import ConfigError, ResourceExhausted, Unavailable
from serving.folder_identity import FolderIdentity, new_id
from serving.observability.outages import Outage
from serving.restart import Report, described
from serving.stores.event_log import EventLog
from serving.stores.profiles import ProfileStore
from serving.stores.registry import Copy, Heartbeat, Registry

_STAND_BY_S = 2.0
_RETRY_S = 0.5
_log = logging.getLogger(__name__)


class OtherStore(ConfigError):
    """A projector of this log fills another profile store."""


@dataclass(frozen=True, slots=True)
class StoreOwner:
    """A projector's claim that its profile store is the log's own.

    Attributes:
        log: The event log.
        store: The profile store.
        place: Address of the store, without a password.
    """

    log: EventLog
    store: ProfileStore
    place: str

    def wait(self, heartbeat: Heartbeat, stop: threading.Event, report: Report, *, patient: bool) -> bool:
        """Waits until the profile store is the log's own; returns False if `stop` was set first.

        Args:
            heartbeat: Gives signs of life of the store from then on.
            stop: Ends the waiting.
            report: Told what it waits for.
            patient: Wait also for a projector that fills another store.

        Raises:
            OtherStore: A projector fills another store, and `patient` is False.
        """
        identity = FolderIdentity("", f"{new_id()}.0")
        outage = Outage(_log, "no events are brought into profiles by this host")
        while not stop.is_set():
            try:
                self.log.open()
                identity = replace(identity, copy_id=self.store.store_id())
                refusal = self.claim(Registry(self.log), identity.copy_id)
                if refusal is None:
                    heartbeat.say(None, identity, "projecting")
                    outage.works()
                    return True
                if not patient:
                    raise refusal
                outage.failed(refusal)
                report(f"stands by: {refusal}")
                stop.wait(_STAND_BY_S)
            except (Unavailable, ResourceExhausted) as error:
                report(f"waits: {described(error)}")
                stop.wait(_RETRY_S)
        return False

    def claim(self, registry: Registry, copy_id: str) -> OtherStore | None:
        """Makes the store the log's own; returns the refusal if a running projector fills another one."""
        registered = registry.get(copy_id)
        if registered is None or registered.retired_at:
            registry.register("profiles", copy_id, self.place)
        owner = registry.own("profiles")
        if owner is None or owner.copy_id == copy_id:
            registry.choose("profiles", copy_id)
            return None
        if owner.alive(registry.now_ms()):
            return self._refusal(owner)
        _log.warning(
            "the profiles of this log were in %s, where no projector runs; now they are in %s",
            owner.named(),
            self.place,
        )
        # In place of that very one: of two projectors that find it stopped, one wins.
        registry.choose("profiles", copy_id, instead_of=owner.copy_id)
        return None

    def require(self) -> None:
        """Refuses to go on if a projector with another store has taken over meanwhile.

        Raises:
            OtherStore: One has.
            Unavailable: A Redis does not answer.
        """
        owner = Registry(self.log).own("profiles")
        if owner is not None and owner.copy_id != self.store.store_id():
            raise self._refusal(owner)

    def _refusal(self, owner: Copy) -> OtherStore:
        return OtherStore(
            f"the profiles of this log are in {owner.named()}, and {self.place} is another Redis: one log fills one. "
            "Give the same redis on every host, or set projector: false here"
        )
