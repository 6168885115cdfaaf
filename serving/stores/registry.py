"""The copies of the log: warehouses, profile stores and ledgers of all hosts, registered with the events Redis.

A copy stays registered until it is retired, whether its host runs or not: an erasure is complete only when every one of
them has confirmed it. Of warehouses and of profile stores one is the log's own: the consumer group that fills it has
one place in the log, so what another one took would be missing there.

All of it is one hash: `fact:ID` (what it is and where), `seen:ID` (who has it now), `retired:ID`, and `own:KIND`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from features.errors import PenchantError
from serving.errors import ConfigError, NotFound
from serving.folder_identity import FolderIdentity, host_name, kernel_id, read_identity, runs, write_identity
from serving.redis.connection import ScriptCall
from serving.stores.event_log import EventLog
from serving.stores.scripts import HASH_CHOOSE, HASH_SET

COPIES = b"penchant:copies"
BEAT_S = 2.0
"""Pause between two signs of life of a process that has a copy."""

LEASE_MS = 10_000
"""Time after the last sign of life at which a process counts as gone."""

_END_S = 3.0
"""Longest wait for the last sign of life."""

_LOOKS = 3
"""Looks in which a folder may lag behind what the log was told of it."""

Kind = Literal["warehouse", "profiles", "ledger", "batch", "bundle"]
ERASED_FROM: tuple[Kind, ...] = ("warehouse", "profiles", "ledger")
"""Kinds of copies that confirm erasures."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy as the log knows it.

    Attributes:
        copy_id: Its id.
        kind: Its kind.
        host: Name of the host that registered it.
        place: Its folder or address there.
        registered_at: When it was registered, ms.
        seen_at: When a process that has it was last heard of, ms; 0 for never.
        token: That process; "" after it has ended in order.
        kernel: The kernel that it runs on, `folder_identity.kernel_id`.
        pid: Its process id there.
        state: Its state in its own words.
        retired_at: When it was declared gone for good, ms; 0 for a copy in use.
        own: True for the one of its kind that the log's consumer group fills.
    """

    copy_id: str
    kind: Kind
    host: str
    place: str
    registered_at: int
    seen_at: int = 0
    token: str = ""
    kernel: str = ""
    pid: int = 0
    state: str = ""
    retired_at: int = 0
    own: bool = False

    def alive(self, now_ms: int) -> bool:
        """Returns True if a process has this copy, or had it until a moment ago."""
        if not self.token or now_ms - self.seen_at >= LEASE_MS:
            return False
        # On this kernel the process itself can be looked for, which is sooner than its lease runs out.
        return self.kernel != kernel_id() or runs(self.pid)

    @property
    def process(self) -> str:
        """The part of the token that stays while its process runs."""
        return self.token.partition(".")[0]

    def named(self) -> str:
        """Names it in a message."""
        return f"{self.copy_id[:8]} ({self.place} on {self.host})"


class Registry:
    """The register in the events Redis; any thread may call anything."""

    def __init__(self, log: EventLog) -> None:
        """Takes the log whose copies these are."""
        self._log = log

    def copies(self, *kinds: Kind) -> list[Copy]:
        """Returns all copies, or those of some kinds, oldest first, retired ones included.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        fields = dict(self._log.router.scan(COPIES))
        copies = [_copy(name[5:].decode(), fields) for name in fields if name.startswith(b"fact:")]
        wanted = [copy for copy in copies if not kinds or copy.kind in kinds]
        return sorted(wanted, key=lambda copy: (copy.registered_at, copy.copy_id))

    def get(self, copy_id: str) -> Copy | None:
        """Returns one copy, None if it is not registered.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return next((copy for copy in self.copies() if copy.copy_id == copy_id), None)

    def own(self, kind: Kind) -> Copy | None:
        """Returns the one of a kind that the log's consumer group fills, None if there is none yet.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return next((copy for copy in self.copies(kind) if copy.own), None)

    def choose(self, kind: Kind, copy_id: str, instead_of: str = "") -> bool:
        """Makes a copy the log's own, if there is none, or in place of a certain one; returns True if it is the one.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        chosen = self._log.router.run(ScriptCall(HASH_CHOOSE, (COPIES,), (f"own:{kind}", instead_of, copy_id)))
        return bytes(chosen).decode() == copy_id

    def register(self, kind: Kind, copy_id: str, place: str) -> None:
        """Registers a copy of this host, or where it lies now; one that was retired is in use again.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        registered = self.get(copy_id)
        now = self._log.now_ms()
        since = registered.registered_at if registered and not registered.retired_at else now
        fact = {"kind": kind, "host": host_name(), "place": place, "registered_at": since}
        if registered and registered.retired_at:
            self._log.router.command("HDEL", COPIES, f"retired:{copy_id}", at=COPIES)
        if registered is None or (registered.host, registered.place) != (fact["host"], place) or registered.retired_at:
            self._set({f"fact:{copy_id}": json.dumps(fact)})

    def seen(self, copy_id: str, token: str, state: str) -> None:
        """Gives a sign of life of a copy; an empty token says that its process ends.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        sign: dict[str, Any] = {"at": self._log.now_ms(), "token": token, "state": state}
        sign |= {"kernel": kernel_id(), "pid": os.getpid()}
        self._set({f"seen:{copy_id}": json.dumps(sign)})

    def forget(self, copy_id: str) -> None:
        """Removes a copy that is no more, such as a batch file that was deleted.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        # `own:KIND` stays: batches and bundles, of which alone copies are forgotten, are never the log's own.
        names = (f"fact:{copy_id}", f"seen:{copy_id}", f"retired:{copy_id}")
        self._log.router.command("HDEL", COPIES, *names, at=COPIES)

    def retire(self, copy_id: str) -> Copy:
        """Declares a copy gone for good; erasures wait for it no more. Returns it.

        Args:
            copy_id: Its id, or the beginning of it if no other begins so.

        Raises:
            NotFound: No copy has this id, or several begin so.
            ConfigError: It is in use.
            EventLogUnavailable: Redis does not answer.
        """
        matches = [copy for copy in self.copies() if copy_id and copy.copy_id.startswith(copy_id)]
        if len(matches) != 1:
            raise NotFound(f"{len(matches)} copies have an id that begins with {copy_id!r}: see penchant hosts")
        copy, now = matches[0], self._log.now_ms()
        if copy.alive(now):
            raise ConfigError(f"the {copy.kind} {copy.named()} is in use: stop the process that has it, then retire it")
        self._set({f"retired:{copy.copy_id}": str(now)})
        # Only if it still is the log's own: another one may have been chosen meanwhile.
        if copy.own:
            self._log.router.run(ScriptCall(HASH_CHOOSE, (COPIES,), (f"own:{copy.kind}", copy.copy_id, "")))
        return next(copy for copy in self.copies() if copy.copy_id == matches[0].copy_id)

    def now_ms(self) -> int:
        """Returns the time, ms, by the clock that dates signs of life.

        Raises:
            EventLogUnavailable: Redis does not answer.
        """
        return self._log.now_ms()

    def _set(self, fields: Mapping[str, str]) -> None:
        words = [word for pair in fields.items() for word in pair]
        self._log.router.run(ScriptCall(HASH_SET, (COPIES,), tuple(words)))


class Claim:
    """Tells, over several looks, if a folder whose copy is in use is that very folder or a copy of it."""

    def __init__(self) -> None:
        self._first, self._unlike = "", 0

    def verdict(self, folder: Path, copy: Copy | None, now_ms: int) -> Literal["free", "busy", "copied"]:
        """Looks once.

        Returns:
            "free" if no process has it, "copied" if another folder is the one in use, and "busy" if this one is, or if
            that is not known yet: look again in a second.

        Raises:
            ConfigError: Its identity is damaged.
        """
        if copy is None or not copy.alive(now_ms):
            self._first, self._unlike = "", 0
            return "free"
        identity = read_identity(folder)
        if identity is None or identity.process != copy.process:
            return "copied"
        if copy.token in (self._first, "") or not self._first:
            self._first = self._first or copy.token
            return "busy"
        # The process that has it has changed its token since: it is here in a moment, or never.
        self._unlike = 0 if identity.token == copy.token else self._unlike + 1
        self._first = copy.token if not self._unlike else self._first
        return "copied" if self._unlike > _LOOKS else "busy"


class Heartbeat:
    """Gives signs of life of the folders of a process while it runs, from a thread of its own."""

    def __init__(self, registry: Registry) -> None:
        """Takes the register; `say` begins."""
        self._registry = registry
        self._states: dict[str, tuple[Path | None, FolderIdentity, str]] = {}
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, folder: Path | None, identity: FolderIdentity, state: str) -> None:
        """Registers the state of a copy, now and every `BEAT_S` from now on.

        Args:
            folder: Its folder, which holds the identity already; None for a copy that is no folder.
            identity: Its id and the token of this process.
            state: Its state, such as "writes".

        Raises:
            EventLogUnavailable: Redis does not answer; it is said later.
        """
        with self._lock:
            self._states[identity.copy_id] = folder, identity, state
        if self._thread is None:
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._over,), name="heartbeat", daemon=True)
            self._thread.start()
        self._registry.seen(identity.copy_id, identity.token, state)

    def restate(self, copy_id: str, state: str) -> None:
        """Changes the state of a copy from the next sign of life on."""
        with self._lock:
            if copy_id in self._states:
                folder, identity, _ = self._states[copy_id]
                self._states[copy_id] = folder, identity, state

    def has(self, copy_id: str) -> bool:
        """Returns True if this process has a copy."""
        return copy_id in self._states

    def end(self, state: str = "stopped") -> None:
        """Ends all copies of the process, which are free at once; without Redis their leases run out."""
        self._over.set()
        if self._thread:
            self._thread.join(_END_S)
            if self._thread.is_alive():  # a Redis that hangs keeps no process from ending
                _log.warning("the leases of this process run out by themselves: Redis does not answer")
                self._states, self._thread = {}, None
                return
        for copy_id, (_, identity, _) in self._states.items():
            _tried(partial(self._leave, copy_id, identity, state))
        self._states.clear()
        self._thread = None

    def _leave(self, copy_id: str, identity: FolderIdentity, state: str) -> None:
        copy = self._registry.get(copy_id)
        if copy and copy.process == identity.process:  # else another process has it already
            self._registry.seen(copy_id, "", state)

    def _run(self, over: threading.Event) -> None:
        while not over.wait(BEAT_S):
            with self._lock:
                names = list(self._states)
            for name in names:
                _tried(partial(self._beat, name))

    def _beat(self, copy_id: str) -> None:
        with self._lock:
            if copy_id not in self._states:  # ended meanwhile
                return
            folder, identity, state = self._states[copy_id]
            if folder:
                current = read_identity(folder)
                if current is None or current.process != identity.process:
                    del self._states[copy_id]  # another process has taken it
                    return
                identity = identity.next()
                write_identity(folder, identity)
                self._states[copy_id] = folder, identity, state
        self._registry.seen(copy_id, identity.token, state)


def _tried(work: Callable[[], None]) -> None:
    """Does what can wait for the next time; other users of the log report that Redis does not answer."""
    try:
        work()
    except (PenchantError, OSError) as error:
        _log.debug("no sign of life: %s", error)


def _copy(copy_id: str, fields: Mapping[bytes, bytes]) -> Copy:
    name = copy_id.encode()
    fact: dict[str, Any] = json.loads(fields[b"fact:" + name])
    sign: dict[str, Any] = json.loads(fields.get(b"seen:" + name, b"{}"))
    return Copy(
        copy_id,
        fact["kind"],
        fact["host"],
        fact["place"],
        fact["registered_at"],
        sign.get("at", 0),
        sign.get("token", ""),
        sign.get("kernel", ""),
        sign.get("pid", 0),
        sign.get("state", ""),
        int(fields.get(b"retired:" + name, 0)),
        fields.get(b"own:" + fact["kind"].encode()) == name,
    )
