"""Sockets: uvicorn, within limits of time, size and number."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from spiffy.integrations.serve.api import ApiError
from spiffy.schemas import SpiffyError

_HEAD_BYTES = 32 * 1024
_HEAD_SECONDS = 10.0
_IDLE_SECONDS = 30  # between two requests of a connection
#: Asked by whoever decides whether the server is well: many clients are no sign that it is not.
_CHECKS = frozenset({"/health", "/metrics"})


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose request head does not come in time."""

    head_seconds = _HEAD_SECONDS
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait_for_head(True)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        self._wait_for_head(begun)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._wait_for_head(False)
        super().connection_lost(exc)

    def _wait_for_head(self, waiting: bool) -> None:
        if not waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif waiting and self._timer is None:
            self._timer = self.loop.call_later(self.head_seconds, self.transport.close)


@dataclass(frozen=True)
class Sockets:
    """What connections there may be.

    Attributes
    ----------
    connections
        At a time; further ones get 503, unless they ask for `/health` or `/metrics`.
    drain_seconds
        That requests have to end when the server is asked to stop.
    """

    connections: int = 256
    drain_seconds: int = 60


class _Bounded:
    """Refuses requests of connections beyond a number, and closes those."""

    def __init__(self, app: ASGIApp, most: int, count: Callable[[], int]) -> None:
        self.app, self.most, self.count = app, most, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        if scope["type"] != "http" or self.count() <= self.most:
            await self.app(scope, receive, send)
        elif scope["path"] in _CHECKS:
            await self.app(scope, receive, send_and_close)
        else:
            busy = ApiError(
                503, f"more connections than {self.most}: try again", kind="server_error"
            )
            await JSONResponse(busy.body, busy.status)(scope, receive, send_and_close)


class Server(uvicorn.Server):
    """Uvicorn's, that says when it listens."""

    def __init__(self, app: FastAPI, sockets: Sockets, announce: Callable[[], None]) -> None:
        config = uvicorn.Config(
            _Bounded(app, sockets.connections, lambda: len(self.server_state.connections)),
            http=BoundedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=sockets.drain_seconds,
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._announce()


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address; port 0: any that is free.

    It does not listen yet: who connects before there is a model to ask is refused.

    Raises
    ------
    SpiffyError
        If the address is none of this machine, or taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
        if os.name == "posix":  # else it would let two servers share a port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpiffyError(f"cannot listen at {host}, port {port}: {reason}") from None
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: FastAPI, sock: socket.socket, sockets: Sockets, announce: Callable[[], None]
) -> None:
    """Serve until SIGTERM or SIGINT; then no more connections, and what is begun is ended."""
    handlers: dict[signal.Signals, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains, and then raises the signal again for whoever handled it before.
        handlers[number] = signal.signal(number, lambda *_: None)
    try:
        Server(app, sockets, announce).run(sockets=[sock])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
