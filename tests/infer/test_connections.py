"""The server among clients that hold connections and say nothing, or half of something."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import PATIENCE_S, Clock, Gated, Local, serving

from megalite.infer.serving import connections

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The server looks at its connections ten times a second."""
    clock = Clock()
    for module in ("connections", "run"):
        monkeypatch.setattr(f"megalite.infer.serving.{module}.time", clock)
    monkeypatch.setattr("megalite.infer.serving.run.TICKS_PER_S", 1)
    return clock


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    model = Gated(b"0123456789", num_slots=8)
    model.run()
    with serving(model, tmp_path / "ratings") as found:
        yield found


def connect(local: Local, sent: bytes = b"") -> socket.socket:
    host, port = local.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    made.sendall(sent)
    return made


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(65536) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def until(true: Any) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def seen_by(local: Local) -> None:
    """Until what was sent has come, and the server has looked at its connections twice since."""
    assert httpx.get(f"{local.url}/health", verify=False).status_code == 200
    phases = [c for c in local.server.server_state.connections if not c.transport.is_closing()]
    for _ in range(2):
        for connection in phases:
            connection.looked = False  # type: ignore[union-attr]
        until(lambda: all(c.looked or c.transport.is_closing() for c in phases))


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    look = connections.Connection.close_if_late

    def looked(self: Any, now: float) -> None:
        look(self, now)
        self.looked = True

    monkeypatch.setattr(connections.Connection, "close_if_late", looked)


def test_who_says_nothing_more_is_hung_up_on(local: Local, clock: Clock) -> None:
    of_headers = [connect(local), connect(local, b"GET /health HTTP/1.1\r\nHost: loc")]
    of_bodies = [connect(local, HEAD), connect(local, HEAD + b'{"prompt": ')]
    seen_by(local)
    clock.now += connections.HEADERS_S - 1
    seen_by(local)
    assert all(map(is_open, of_headers + of_bodies))
    clock.now += 2
    until(lambda: not any(map(is_open, of_headers)))
    clock.now += connections.BODY_S - connections.HEADERS_S - 2
    seen_by(local)
    assert all(map(is_open, of_bodies))
    clock.now += 2
    until(lambda: not any(map(is_open, of_bodies)))


def test_between_requests_and_in_the_headers_of_the_next(local: Local, clock: Clock) -> None:
    ask = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    once = connect(local, ask)
    until(lambda: local.server.server_state.total_requests == 1)
    seen_by(local)
    clock.now += connections.IDLE_S - 1
    once.sendall(ask[:20])
    seen_by(local)
    clock.now += connections.HEADERS_S - 1
    seen_by(local)
    assert is_open(once), "its time begins with its first byte"
    clock.now += 2
    until(lambda: not is_open(once))


def test_a_body_that_comes_steadily_is_waited_for(local: Local, clock: Clock) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2, "user": "y" * 400_000}).encode()
    slow = connect(local, HEAD.replace(b"1000", b"%d" % len(body)))
    for start in range(0, len(body), 100_000):
        slow.sendall(body[start : start + 100_000])
        seen_by(local)
        clock.now += 5
    slow.settimeout(PATIENCE_S)
    assert slow.recv(65536).startswith(b"HTTP/1.1 200")


def test_an_answer_that_takes_long_is_given_and_one_that_nobody_takes_is_not(
    tmp_path: Path, clock: Clock
) -> None:
    model = Gated(b"0123456789", num_slots=2)
    with serving(model, tmp_path) as local:
        body = b'{"prompt": "x", "max_tokens": 2}'
        waits = connect(local, HEAD.replace(b"1000", b"%d" % len(body)) + body)
        local.until("megalite_slots_busy 1.0")
        # Pages that are asked for and not taken: more than the system holds for a connection.
        deaf = connect(local)
        deaf.settimeout(1)
        pages = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000_000
        with pytest.raises(TimeoutError):
            deaf.sendall(pages)
        seen_by(local)
        theirs = next(
            c for c in local.server.server_state.connections if c.client == deaf.getsockname()
        )

        def is_dropped() -> bool:
            # Again, where the system has taken some more of it.
            clock.now += connections.STALLED_S + 1
            seen_by(local)
            return theirs not in local.server.server_state.connections

        until(is_dropped)
        clock.now += 300
        seen_by(local)
        model.run()
        waits.settimeout(PATIENCE_S)
        assert waits.recv(65536).startswith(b"HTTP/1.1 200")


def test_connections_without_a_request_make_room_and_working_ones_do_not(tmp_path: Path) -> None:
    model = Gated(b"0123456789", num_slots=2)
    with serving(model, tmp_path) as local:
        local.server.server_state.most = 4
        half = [
            connect(local),
            connect(local, b"GET /"),
            connect(local, HEAD),
            connect(local, HEAD),
        ]
        until(lambda: len(local.server.server_state.connections) == 4)
        body = b'{"prompt": "x", "max_tokens": 2}'
        ask = HEAD.replace(b"1000", b"%d" % len(body)) + body
        working = [connect(local, ask) for _ in range(4)]
        until(lambda: not any(map(is_open, half)))
        refused = connect(local)
        assert refused.recv(65536).startswith(b"HTTP/1.1 503")
        model.run()
        for one in working:
            one.settimeout(PATIENCE_S)
            assert one.recv(65536).startswith(b"HTTP/1.1 200")
        assert httpx.get(f"{local.url}/health").status_code == 200


def test_there_is_room_below_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in (256, 1024, 4096):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert 0 < connections.most_connections() <= limit - connections.RESERVED_FILES
    monkeypatch.setattr(
        resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    )
    assert connections.most_connections() == connections.MOST_CONNECTIONS
