"""HTTP connections with limits: each phase of one has a time limit, and there are never more than
the open files allow."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

LOG = logging.getLogger("megalite.serve")
HEADERS_S = 10.0
"""Time from the connection, or from the first byte of its next request, to the end of the request's
headers."""
IDLE_S = 30
"""Time between two requests of a connection."""
BODY_S, BODY_BYTES_PER_S = 20.0, 16 << 10
"""A body may take BODY_S seconds, and one more for every BODY_BYTES_PER_S bytes received."""
STALLED_S = 60.0
"""Time for a client that reads nothing of the data waiting for it."""
MOST_CONNECTIONS = 4096
ACCEPTED_AT_ONCE = 64
"""Connections accepted before the others get a turn. asyncio also retries a failed accept this many
times."""
RESERVED_FILES = ACCEPTED_AT_ONCE + 64
"""Open files that connections leave free, for the model, ratings and connections that are being
closed."""
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
)
FULL_BODY = (
    b'{"error":{"message":"all connections of this server are in use: try again later","type":"server_error",'
    b'"param":null,"code":"overloaded"}}'
)
OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def most_connections() -> int:
    """Return how many connections the limit of open files leaves room for."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 32
    return max(1, min(MOST_CONNECTIONS, limit - used - RESERVED_FILES))


class State(ServerState):
    """Extends uvicorn's state by the largest number of connections."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most


class Connection(H11Protocol):
    """Handles one HTTP/1.1 connection. The server calls `close_if_late` once a second."""

    server_state: State

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._phase: tuple[Any, ...] = ()
        self._since = time.monotonic()
        self._received = 0
        if (
            sum(not other.transport.is_closing() for other in self.connections)
            > self.server_state.most
        ):
            self._make_room()

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def _make_room(self) -> None:
        """Close the connection that has been without a complete request for longest. If all have
        one, refuse this one."""
        LOG.warning("all %d connections are in use", self.server_state.most)
        others = [
            c
            for c in self.connections
            if isinstance(c, Connection) and c is not self and c._unfinished
        ]
        if others:
            min(others, key=lambda c: c._since).transport.close()
        else:
            self.transport.write(FULL % (len(FULL_BODY), FULL_BODY))
            self.transport.close()

    @property
    def _unfinished(self) -> int:
        """Return why there is nothing to answer: no request yet (1), none since the last (2), an
        incomplete one (3); otherwise 0."""
        if self.transport.is_closing():
            return 0
        if self.cycle is None:
            return 1
        return 2 if self.cycle.response_complete else 3 if self.cycle.more_body else 0

    def close_if_late(self, now: float) -> None:
        """Close the connection if its present phase has taken too long. `now` is of
        `time.monotonic`."""
        # Any change is progress and begins the time anew: another phase, fewer unsent bytes.
        phase, limit = self._look()
        if phase != self._phase:
            # A new connection's time has run since it was made.
            self._since = now if self._phase else self._since
            self._phase = phase
        # By a rate and not by silence: a byte every few seconds would hold a connection for ever.
        if phase[0] == "body":
            limit += (self._received - phase[2]) / BODY_BYTES_PER_S
        if now - self._since <= limit:
            return
        if phase[0] == "sending":
            self.transport.abort()  # a normal close would wait for the unsent data
        else:
            self.transport.close()

    def _look(self) -> tuple[tuple[Any, ...], float]:
        """Return the present phase, which changes with every progress, and the seconds it may
        last."""
        # What is unsent comes first: a client that takes nothing keeps even a closed connection open.
        unsent = self.transport.get_write_buffer_size()
        if self.transport.is_closing() or (unsent and self.flow.write_paused):
            return ("sending", unsent), STALLED_S
        unfinished = self._unfinished
        if unfinished in (1, 2):
            # Bytes that h11 keeps are the beginning of headers: idle no longer, but not yet a request.
            begun = bool(self.conn.trailing_data[0])
            return (
                "waiting",
                self.cycle,
                begun,
            ), IDLE_S if unfinished == 2 and not begun else HEADERS_S
        if unfinished == 3:
            known = (
                self._phase[0] == "body" and self._phase[1] is self.cycle if self._phase else False
            )
            return ("body", self.cycle, self._phase[2] if known else self._received), BODY_S
        return ("answering",), float("inf")


def tell_of_failed_accept(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle an event loop's exceptions: a full table of open files becomes one log line without
    traceback."""
    problem = context.get("exception")
    if isinstance(problem, OSError) and problem.errno in OUT_OF_FILES:
        LOG.error("no connection can be taken on: %s", problem.strerror)
    else:
        loop.default_exception_handler(context)
