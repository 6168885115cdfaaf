"""The small HTTP server answers what it is for, refuses all else, and no client holds it up."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.request

import pytest

from serving.errors import ConfigError
from serving.processes.http_server import CONNECTIONS, HEAD_BYTES, HttpServer, Page

BIG = b"x" * 3_000_000


def broken(_):
    raise RuntimeError("a s3cret")


@pytest.fixture(scope="module")
def server():
    pages = {"/page": lambda headers: Page(headers.get("accept", "").encode()), "/big": lambda _: Page(BIG)}
    with HttpServer("127.0.0.1:0", pages | {"/broken": broken}, exchange_s=0.5) as server:
        yield server


def connect(server: HttpServer) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def ask(server: HttpServer, request: bytes) -> bytes:
    with connect(server) as connection:
        connection.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it does not read what follows the head
            while piece := connection.recv(1 << 16):
                answer += piece
        return answer


def get(server: HttpServer, path: str, **headers: str) -> bytes:
    request = urllib.request.Request(f"http://{server.address}{path}", headers=headers)
    return urllib.request.urlopen(request, timeout=10).read()


def test_a_page_is_made_from_the_headers(server):
    assert get(server, "/page?x=1", Accept="text/x") == b"text/x"
    assert get(server, "/big") == BIG


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /page HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"HEAD /page HTTP/1.1\r\n\r\n", b"405"),
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /page/../page HTTP/1.1\r\n\r\n", b"404"),
        (b"GET http://[/ HTTP/1.1\r\n\r\n", b"404"),
        (b"GET /page\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\xff\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 2 * HEAD_BYTES, b"431"),
        (b"GET /broken HTTP/1.1\r\n\r\n", b"500"),
    ],
)
def test_all_else_is_refused(server, request_, status):
    answer = ask(server, request_)
    assert answer.split(b" ")[1] == status
    assert b"s3cret" not in answer


def test_slow_clients_hold_up_nobody_and_are_closed(server):
    """More connections than there is room for: half a request each, and answers that nobody reads."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(server)) for _ in range(2 * CONNECTIONS)]
        for number, connection in enumerate(slow):
            with contextlib.suppress(OSError):  # closed already, for newer ones
                connection.sendall(b"GET /big HTTP/1.1\r\n\r\n" if number % 2 else b"GET /pa")
        assert get(server, "/page", Accept="now") == b"now"
        assert sum(thread.name.startswith("http") for thread in threading.enumerate()) <= 3
        end = time.monotonic() + 10
        while server._exchanges:
            assert time.monotonic() < end, "connections that ask for nothing stay open"
            time.sleep(0.05)


def test_an_address_in_use_is_named():
    with HttpServer("127.0.0.1:0", {}) as first, pytest.raises(ConfigError, match=f"cannot listen on {first.address}"):
        HttpServer(first.address, {}).__enter__()
