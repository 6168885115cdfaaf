"""A small HTTP server for operators: a few fixed pages, by GET, to clients that may be slow or hostile.

One thread runs an event loop, so that a slow client costs a few kilobytes and no thread. Two more threads render
the pages. Every exchange has a time limit, every connection carries one request, and of too many connections the oldest
is closed, so that connections held open on purpose do not lock out a scrape.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from serving.errors import ConfigError

EXCHANGE_S = 5.0
"""Longest time from a connection to the last byte of its response, in seconds."""

CONNECTIONS = 32
"""Most open connections."""

HEAD_BYTES = 8192
"""Longest head of a request, in bytes."""

_THREADS = 2
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
_log = logging.getLogger(__name__)


class Page(NamedTuple):
    """A response.

    Attributes:
        body: Its bytes.
        content_type: Their MIME type.
        status: The HTTP status; one of 200, 400, 404, 405, 431, 500 and 503.
    """

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200


Render = Callable[[Mapping[str, str]], Page]
"""Renders a page from the headers of a request, their names in lower case; may wait, but not for seconds."""


class HttpServer:
    """Serves pages while it is entered.

    Attributes:
        address: `HOST:PORT` that it listens on, the port resolved.
    """

    def __init__(self, address: str, pages: Mapping[str, Render], *, exchange_s: float = EXCHANGE_S) -> None:
        """Prepares a server; entering it opens the port.

        Args:
            address: `HOST:PORT`; port 0 picks a free one.
            pages: The function that renders a page, by path.
            exchange_s: Longest time of an exchange, in seconds.
        """
        self.address = address
        self._pages, self._exchange_s = dict(pages), exchange_s
        self._renderers = ThreadPoolExecutor(_THREADS, "http-page")
        self._loop = asyncio.new_event_loop()
        self._exchanges: dict[asyncio.Task[None], None] = {}
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)

    def __enter__(self) -> Self:
        """Listens.

        Raises:
            ConfigError: The address is not available.
        """
        host, _, port = self.address.rpartition(":")
        host = host.strip("[]")
        self._thread.start()
        listening = asyncio.start_server(self._accept, host, int(port), limit=HEAD_BYTES, backlog=CONNECTIONS)
        try:
            self._server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        except OSError as error:
            self._end()
            reason = error.strerror or error
            raise ConfigError(f"cannot listen on {self.address}: {reason}; choose another address") from None
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        """Stops listening and closes every connection."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._renderers.shutdown(wait=False, cancel_futures=True)

    async def _close(self) -> None:
        self._server.close()
        exchanges = list(self._exchanges)
        for exchange in exchanges:
            exchange.cancel()
        await asyncio.gather(*exchanges, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        exchange = asyncio.current_task()
        assert exchange is not None
        # Of too many the oldest goes: connections held open on purpose must not lock out a scrape.
        if len(self._exchanges) >= CONNECTIONS:
            next(iter(self._exchanges)).cancel()
        self._exchanges[exchange] = None
        try:
            # Over everything: a client that sends a byte a second would renew a limit per read.
            async with asyncio.timeout(self._exchange_s):
                # Without a buffer `drain` waits until the kernel has taken every byte.
                writer.transport.set_write_buffer_limits(0)
                writer.write(_encoded(await self._answer(reader)))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.CancelledError):
            pass  # too slow, gone, or closed here: no response is possible
        finally:
            del self._exchanges[exchange]
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> Page:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return Page(b"the head of the request is too long\n", status=431)
        except asyncio.IncompleteReadError:
            raise ConnectionResetError from None
        line, *fields = head.decode("latin-1").split("\r\n")
        words = line.split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return Page(b"not an HTTP/1.1 request\n", status=400)
        if words[0] != "GET":
            return Page(b"only GET is served here\n", status=405)
        path: str | None = None
        with contextlib.suppress(ValueError):
            path = urlsplit(words[1]).path
        render = self._pages.get(path) if path else None
        if render is None:
            paths = " ".join(sorted(self._pages))
            return Page(f"no such page; there is {paths}\n".encode(), status=404)
        headers = {name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
        try:
            # Not on the loop: a page may wait a second for its processes, and others must be accepted meanwhile.
            return await self._loop.run_in_executor(self._renderers, render, headers)
        except Exception:  # noqa: BLE001 - a defect in a page must not end the server
            _log.exception("the page %s cannot be rendered", path)
            return Page(b"the page cannot be rendered; see the log\n", status=500)


@contextlib.contextmanager
def serve_pages(address: str, pages: Mapping[str, Render]) -> Iterator[str | None]:
    """Serves pages while the block runs, unless the address is empty; yields the address, the port resolved, or None.

    Raises:
        ConfigError: The address is not available.
    """
    if not address:
        yield None
        return
    with HttpServer(address, pages) as server:
        yield server.address


def _encoded(page: Page) -> bytes:
    head = [
        f"HTTP/1.1 {page.status} {_REASONS[page.status]}",
        f"Content-Type: {page.content_type}",
        f"Content-Length: {len(page.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        *(["Allow: GET"] if page.status == 405 else []),
        "Connection: close",
    ]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + page.body
