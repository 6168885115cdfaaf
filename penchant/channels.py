"""Options of gRPC channels that every caller of a service needs: past the proxy to a service on this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path

_HOSTS = Path("/etc/hosts")
_LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback")


def channel_options(target: str) -> list[tuple[str, int]]:
    """Returns the options of a gRPC channel to `target`: no proxy reaches a service on this machine.

    gRPC sends every connection to the proxy that `grpc_proxy`, `https_proxy` or `http_proxy` names, also those to
    loopback addresses, unless `no_proxy` lists them.
    """
    return [("grpc.enable_http_proxy", 0)] if is_local(target) else []


def is_local(target: str) -> bool:
    """Returns True if every address of a gRPC target, such as `localhost:50051`, is on this machine."""
    if target.lower().startswith(("unix:", "unix-abstract:")):
        return True
    named = re.match(r"dns:(//[^/]*/|/)?|ipv[46]:/*", target, re.IGNORECASE)
    addresses = target[named.end() :] if named else target
    return all(_is_loopback(_host(address)) for address in addresses.split(","))


def _host(address: str) -> str:
    """Returns the host of `HOST`, `HOST:PORT`, `[V6]:PORT` or a bare V6 address."""
    bracketed = re.match(r"\[([^\]]*)\]", address)
    if bracketed:
        return bracketed[1]
    return address if address.count(":") > 1 else address.partition(":")[0]


def _is_loopback(host: str) -> bool:
    name = host.rstrip(".").lower()
    if name in _LOCAL_NAMES or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        try:  # as a resolver reads 127.1
            address = ipaddress.ip_address(socket.inet_aton(name))
        except OSError:
            return name in _names_of_loopback()
    address = getattr(address, "ipv4_mapped", None) or address
    # A service that listens on every address prints that one, and callers use what it prints.
    return address.is_loopback or address.is_unspecified


def _names_of_loopback() -> set[str]:
    """Returns the names that this machine gives its loopback addresses itself, as Debian does with its own."""
    try:
        lines = _HOSTS.read_text(encoding="utf-8", errors="replace").lower().splitlines()
    except OSError:
        return set()
    entries = [line.partition("#")[0].split() for line in lines]
    loopback = re.compile(r"127\.[\d.]+|::1")
    named = [(entry[0], set(entry[1:])) for entry in entries if entry]
    elsewhere = set[str]().union(*(names for address, names in named if not loopback.fullmatch(address)))
    return set[str]().union(*(names for address, names in named if loopback.fullmatch(address))) - elsewhere
