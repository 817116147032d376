"""Sockets: uvicorn, within limits of time, size and number."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from spiffy.integrations.serve.api import ApiError
from spiffy.integrations.serve.engine import Engine
from spiffy.integrations.serve.metrics import Metrics
from spiffy.schemas import SpiffyError

_HEAD_BYTES = 32 * 1024
_PIECE = 4 << 10  # bytes of a head that are looked at together
_HEAD_SECONDS = 10.0
_UNREAD_SECONDS = 60.0  # that nothing is read of what waits to be sent
_FAREWELL_SECONDS = 5  # for responses to say that the server has stopped
#: Asked by whoever decides whether the server is well: many clients are no sign that it is not.
_CHECKS = frozenset({"/health", "/metrics"})


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections on which what has begun does not come in time.

    That is the head of a request, and what is left of a body that was refused by its head. So too
    of clients that do not read what they are sent.
    """

    head_seconds, unread_seconds = _HEAD_SECONDS, _UNREAD_SECONDS
    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._wait_for_head(True)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        # The limit of a head is looked at only while it is incomplete: so not all of it at once.
        while self.conn.their_state is h11.IDLE and len(data) > _PIECE:
            super().data_received(data[:_PIECE])
            data = data[_PIECE:]
            if self.transport.is_closing():  # it was too long
                return
        super().data_received(data)
        self._limit()

    def on_response_complete(self) -> None:
        """See `H11Protocol`."""
        super().on_response_complete()
        self._limit()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._wait_for_head(False)
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        # Not close, which waits for what is unread to be read.
        self._unread = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        self._stop_waiting_for_reader()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """See `H11Protocol`."""
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def _stop_waiting_for_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _limit(self) -> None:
        """Set the time that this connection has from here on, while no answer is made for it."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        begun = theirs is h11.IDLE and bool(self.conn.trailing_data[0])
        refused = theirs is h11.SEND_BODY and ours is h11.DONE
        self._wait_for_head(begun or refused)
        # Where the last of a refused body came, uvicorn has let go of its own timer.
        if theirs is h11.IDLE and not begun and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

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
    keep_alive_seconds
        Between two requests of a connection.
    """

    connections: int = 256
    drain_seconds: int = 60
    keep_alive_seconds: int = 75


class _Bounded:
    """Refuses requests of connections beyond a number, and closes those."""

    def __init__(self, app: ASGIApp, most: int, count: Callable[[], int], metrics: Metrics) -> None:
        self.app, self.most, self.count, self.metrics = app, most, count, metrics

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
            self.metrics.requests.labels("other", busy.status).inc()
            await JSONResponse(busy.body, busy.status)(scope, receive, send_and_close)


class Server(uvicorn.Server):
    """Uvicorn's, that says when it listens, and ends with the engine.

    Attributes
    ----------
    failed
        Whether it ended because the engine did.
    """

    def __init__(
        self, app: FastAPI, engine: Engine, sockets: Sockets, announce: Callable[[], None]
    ) -> None:
        def connections() -> int:
            return len(self.server_state.connections)

        config = uvicorn.Config(
            _Bounded(app, sockets.connections, connections, engine.metrics),
            http=BoundedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=sockets.keep_alive_seconds,
            timeout_graceful_shutdown=sockets.drain_seconds + _FAREWELL_SECONDS,
            h11_max_incomplete_event_size=_HEAD_BYTES,
        )
        super().__init__(config)
        self._engine, self._drain_seconds, self._announce = engine, sockets.drain_seconds, announce
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end; asked ten times a second."""
        self.failed = not self._engine.alive
        return await super().on_tick(counter) or self.failed

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what is begun end; what is left when the time is over is told so."""
        giving_up = Thread(target=self._engine.stop, daemon=True)
        timer = asyncio.get_running_loop().call_later(self._drain_seconds, giving_up.start)
        await super().shutdown(sockets)
        timer.cancel()


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
        # A name such as localhost has several: the clients of most look for it at IPv4 first.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        sock = socket.socket(family, kind, protocol)
        if os.name == "posix":  # which elsewhere lets two servers listen at one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: of an impossible name
        reason = getattr(error, "strerror", None) or error
        raise SpiffyError(f"cannot listen at {host}, port {port}: {reason}") from None
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: FastAPI,
    engine: Engine,
    sock: socket.socket,
    sockets: Sockets,
    announce: Callable[[], None],
) -> None:
    """Serve until SIGTERM or SIGINT; then no more connections, and what is begun is ended.

    Raises
    ------
    SpiffyError
        If another server listens there by now, or the engine fails.
    """
    server, address = Server(app, engine, sockets, announce), address_of(sock)
    handlers: dict[signal.Signals, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn drains, and then raises the signal again for whoever handled it before.
        handlers[number] = signal.signal(number, lambda *_: None)
    try:
        server.run(sockets=[sock])
    except OSError as error:
        raise SpiffyError(f"cannot listen at {address}: {error.strerror}") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if server.failed:
        raise SpiffyError("the engine failed, see the log: start the server again")
