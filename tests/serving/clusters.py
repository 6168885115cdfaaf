"""A real cluster for the tests of the stores: embedded servers that know each other."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from serving.redis.client import connect_one
from serving.redis.embedded import RedisServer, Role
from tests.serving.faults import wait_until

SLOTS = 16384


class ClusterNode(RedisServer):
    """An embedded server that is a node of a cluster, reached by TCP."""

    def __init__(self, state_dir: Path, role: Role) -> None:
        super().__init__(state_dir, role, max_memory=1 << 28)
        self.port, self._bus = _free_ports(2)
        self.announced = f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _arguments(self) -> list[str]:
        host, _, port = self.announced.rpartition(":")
        settings = {
            "port": self.port,
            "bind": "127.0.0.1",
            "cluster-enabled": "yes",
            "cluster-port": self._bus,
            "cluster-announce-hostname": host,
            "cluster-announce-port": port,
            "cluster-announce-bus-port": self._bus,
            "cluster-preferred-endpoint-type": "hostname",
            "cluster-require-full-coverage": "no",
            "cluster-node-timeout": "1000",
            "repl-diskless-sync-delay": "0",
        }
        return [
            *super()._arguments(),
            *(str(word) for name, value in settings.items() for word in (f"--{name}", value)),
        ]

    def say(self, *words: Any) -> Any:
        """Sends one command to this node alone."""
        with connect_one(self.url, 5.0) as client:
            return client.execute_command(*words)

    def name(self) -> str:
        """What the cluster calls it."""
        return self.say("CLUSTER", "MYID").decode()

    def has(self, key: bytes) -> bool:
        """Whether a client that asks nobody else finds a key here, within a short time."""
        try:
            with connect_one(self.url, 0.1) as client:
                return bool(client.exists(key))
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """SIGKILL; it stays away until it is started."""
        assert self.pid
        os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def well(self) -> bool:
        """Whether it takes commands about its keys."""
        try:
            return b"cluster_state:ok" in self.say("CLUSTER", "INFO")
        except redis.RedisError:
            return False


Front = Callable[["ClusterNode"], contextlib.AbstractContextManager[int]]


@contextlib.contextmanager
def cluster(
    folder: Path, role: Role, front: Front | None = None, *, replica: bool = False
) -> Iterator[list[ClusterNode]]:
    """Three nodes, each with a third of the slots, all well.

    Args:
        folder: Where they keep their data.
        role: As of an embedded server.
        front: Opens the port by which clients come to a node, where that is not its own.
        replica: Whether a fourth node stands by for the second.
    """
    with contextlib.ExitStack() as stack:
        nodes = [ClusterNode(folder / str(number), role) for number in range(3)]
        for number, node in enumerate(nodes):
            if front:
                node.announced = f"localhost:{stack.enter_context(front(node))}"
            stack.enter_context(node)
            first, last = SLOTS * number // len(nodes), SLOTS * (number + 1) // len(nodes) - 1
            node.say("CLUSTER", "ADDSLOTSRANGE", first, last)
            node.say("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            nodes[0].say("CLUSTER", "MEET", "127.0.0.1", node.port, node._bus)
        wait_until(lambda: all(node.well() and len(node.say("CLUSTER", "SLOTS")) == len(nodes) for node in nodes))
        if replica:
            nodes.append(stack.enter_context(ClusterNode(folder / "3", role)))
            nodes[0].say("CLUSTER", "MEET", "127.0.0.1", nodes[3].port, nodes[3]._bus)
            wait_until(lambda: nodes[1].name().encode() in nodes[3].say("CLUSTER", "NODES"))
            nodes[3].say("CLUSTER", "REPLICATE", nodes[1].name())
            wait_until(lambda: in_step(nodes[1], nodes[3]))
            wait_until(lambda: all(_stands_by(node, nodes[3]) for node in nodes[:3]))
        yield nodes


def follows(node: ClusterNode) -> bool:
    """Whether it is a replica whose master has told it everything at least once."""
    role, *_, link, _ = node.say("ROLE")
    return role == b"slave" and link == b"connected"


def in_step(master: ClusterNode, replica: ClusterNode) -> bool:
    """Whether a replica has everything that its master has."""
    return follows(replica) and replica.say("ROLE")[-1] == master.say("ROLE")[1]


def _stands_by(node: ClusterNode, replica: ClusterNode) -> bool:
    return any(one[1] == replica.port for _, _, _, *replicas in node.say("CLUSTER", "SLOTS") for one in replicas)


def url_of(nodes: list[ClusterNode], scheme: str = "redis+cluster", options: str = "") -> str:
    """The URL of a cluster, naming every node."""
    return f"{scheme}://{','.join(node.announced for node in nodes)}{options}"


def _free_ports(count: int) -> list[int]:
    """Finds ports that nothing listens on, below those that a kernel gives to connections that go out."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.SystemRandom().randrange(15_000, 32_000)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports
