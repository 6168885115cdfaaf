"""A real cluster for the tests of the stores: embedded servers that know each other."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from serving.redis_client import connect_one
from serving.redis_server import RedisServer, Role
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

    def well(self) -> bool:
        """Whether it takes commands about its keys."""
        try:
            return b"cluster_state:ok" in self.say("CLUSTER", "INFO")
        except redis.RedisError:
            return False


Front = Callable[["ClusterNode"], contextlib.AbstractContextManager[int]]


@contextlib.contextmanager
def cluster(folder: Path, role: Role, front: Front | None = None) -> Iterator[list[ClusterNode]]:
    """Three nodes, each with a third of the slots, all well.

    Args:
        folder: Where they keep their data.
        role: As of an embedded server.
        front: Opens the port by which clients come to a node, where that is not its own.
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
        yield nodes


def url_of(nodes: list[ClusterNode], scheme: str = "redis+cluster", options: str = "") -> str:
    """The URL of a cluster, naming every node."""
    return f"{scheme}://{','.join(node.announced for node in nodes)}{options}"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
