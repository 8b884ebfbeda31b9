"""`megalite serve`: from a checkpoint to a running server, and its shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from megalite.errors import ConfigError
from megalite.infer.serving import logs
from megalite.infer.serving.connections import (
    ACCEPTED_AT_ONCE,
    IDLE_S,
    Connection,
    State,
    most_connections,
    tell_of_failed_accept,
)
from megalite.infer.serving.front import Hosting, make_front

LOG = logging.getLogger("megalite.serve")
LAST_S = 2.0
"""Time after answers were cut off, for responses to reach their clients."""
BACKLOG = 2048
"""Connections that the system establishes before the server accepts them."""
TICKS_PER_S = 10
"""Ticks of uvicorn's own loop per second."""


class Server(uvicorn.Server):
    """Runs uvicorn with a graceful shutdown: on SIGTERM and SIGINT it accepts nothing more, and
    gives answers in progress `grace_s` seconds to end. A second SIGINT ends it at once."""

    def __init__(
        self, config: uvicorn.Config, engine: Any, grace_s: float, lost: Callable[[], str] = str
    ):
        """Serve with `engine`. Begin the shutdown as well when `lost` says why nothing can be answered
        any more, other than an empty text."""
        super().__init__(config)
        self._engine, self._grace_s, self._lost = engine, grace_s, lost
        self.server_state = State(most_connections())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(tell_of_failed_accept)
        try:
            await super().startup(sockets)
        except OSError as error:
            if not sockets:
                raise
            # Two that start at once both bind the address; the second to listen on it finds out.
            host, port, *_ = sockets[0].getsockname()  # IPv6 has two more
            raise cannot_listen(host, port, error) from None
        for listening in sockets or []:
            # Set again: asyncio has one number for this and for how many it accepts at once.
            listening.listen(BACKLOG)

    async def on_tick(self, counter: int) -> bool:
        """Close connections that are late, once a second."""
        if counter % TICKS_PER_S == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.close_if_late(now)
        if self._lost():
            self._grace_s = 0.0  # whatever is asked would fail
            self.handle_exit(signal.SIGTERM, None)
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown."""
        # In a thread: `close` takes a lock that the interrupted thread may hold.
        threading.Thread(target=self._engine.close, args=(self._grace_s,), name="closing").start()
        super().handle_exit(sig, frame)


def bind(host: str, port: int) -> socket.socket:
    """Bind `host` and `port` and return the socket, before the model is read, which takes long;
    nobody can connect yet. Raise ConfigError."""
    address = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        address.bind((host, port))
    except (OSError, OverflowError) as error:
        address.close()
        raise cannot_listen(host, port, error) from None
    return address


def cannot_listen(host: str, port: int, error: Exception) -> ConfigError:
    """Return the error for an address that `error` keeps the server from."""
    why = getattr(error, "strerror", None) or error
    return ConfigError(f"--host {host} --port {port} cannot be listened on: {why}")


def serve(
    make_host: Callable[[], Hosting],
    address: socket.socket,
    grace_s: float,
    lost: Callable[[], str] = str,
) -> None:
    """Serve what `make_host` returns on the socket `address` of `bind` until a signal ends it, or
    `lost` says why nothing can be answered any more; answers in progress then get `grace_s` seconds.
    On SIGHUP its model is opened anew."""
    logs.set_up()
    host = make_host()
    settings = host.settings
    server = make_server(make_front(host), grace_s, lost)
    # uvicorn installs the same handler later; but after shutdown it raises the signal again, which
    # must not kill then.
    signal.signal(signal.SIGTERM, server.handle_exit)
    had_terminal = _has_terminal()

    def hang_up(number: int, frame: FrameType | None) -> None:
        # A terminal that is closed sends the same signal, and then nobody wants the server.
        if had_terminal and not _has_terminal():
            server.handle_exit(number, frame)
        else:
            host.reload_soon()

    signal.signal(signal.SIGHUP, hang_up)
    protected = (
        f"{len(settings.keys)} API keys" if settings.keys else "open to all: no API key is set"
    )
    name, port = address.getsockname()[:2]
    url = f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
    LOG.info("%s on %s (%s); ratings go to %s", settings.name, url, protected, settings.ratings)
    server.run([address])


def _has_terminal() -> bool:
    """Return whether a terminal controls this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def make_server(app: Any, grace_s: float, lost: Callable[[], str] = str) -> Server:
    """Return the server of `app` with its limits."""
    config = uvicorn.Config(
        app, http=Connection, ws="none", loop="asyncio", log_config=None, access_log=False, server_header=False,
        # Otherwise uvicorn trusts what a client on this machine states as its address.
        proxy_headers=False, backlog=ACCEPTED_AT_ONCE,
        timeout_graceful_shutdown=round(grace_s + LAST_S), timeout_keep_alive=IDLE_S,
    )  # fmt: skip
    return Server(config, app.state.engine, grace_s, lost)
