"""Log lines: nobody forges one, none fails a request, and what comes often is told seldom."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st
from local_server import Clock, Gated, serving

from megalite.infer.serving.connections import tell_of_failed_accept
from megalite.infer.serving.logs import AsJson, OneLine, Seldom
from megalite.infer.serving.ratings import Ratings

ANY = st.text(st.characters(exclude_categories=[]))


@pytest.fixture
def written(caplog: pytest.LogCaptureFixture) -> Iterator[io.StringIO]:
    """What the server's loggers write, as `megalite serve` has them."""
    caplog.set_level(logging.INFO, "megalite.serve")
    log, said = logging.getLogger("megalite.serve"), io.StringIO()
    handler, seldom = logging.StreamHandler(said), Seldom()
    handler.setFormatter(OneLine("%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.addFilter(seldom)
    yield said
    log.removeHandler(handler)
    log.removeFilter(seldom)


@settings(max_examples=100, deadline=None, database=None)
@given(ANY)
def test_a_message_is_one_line(text: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s asked", (text,), None)
    line = OneLine("%(levelname)s %(message)s").format(record)
    line.encode()
    assert len((line + ".").splitlines()) == 1
    assert line.isprintable() or not any(
        ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in line
    )


def test_a_traceback_holds_no_line_that_looks_like_a_message() -> None:
    try:
        raise ValueError("x\nINFO 127.0.0.1 GET / 200\r\x1b[2J")
    except ValueError as problem:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "failed", (), (ValueError, problem, problem.__traceback__)
        )
    first, *rest = OneLine("%(levelname)s %(message)s").format(record).splitlines()
    assert first == "ERROR failed"
    assert rest
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in "".join(rest)


@given(
    st.recursive(
        ANY | st.integers() | st.floats() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(ANY, inner),
    )
)
def test_every_value_can_be_logged(value: Any) -> None:
    str(AsJson(value)).encode()


def test_values_that_cannot_be_written_at_all() -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert str(AsJson(loop)) == "(ValueError: it cannot be written as JSON)"
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert "RecursionError" in str(AsJson(deep))


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "top_k": %d}' % 10**40,
        b'{"prompt": "x", "max_tokens": %d}' % 10**40,
        b'{"prompt": "x", "model": "\\ud800"}',
        b'{"prompt": "x", "user": "\\udfff\\n"}',
        b'{"prompt": "x", "metadata": {"\\ud800": "\\ud800"}}',
        '{"prompt": "x\\nINFO forged \u2028 \x85"}'.encode(),
    ],
)
def test_logging_prompts_fails_no_request(
    tmp_path: Path, written: io.StringIO, body: bytes
) -> None:
    model = Gated(b"0" * 9)
    model.capacity = 32  # type: ignore[misc]
    model.run()
    headers = {"content-type": "application/json"}
    with serving(model, tmp_path, log_prompts=True) as local:
        done = httpx.post(
            f"{local.url}/v1/completions", content=body, headers=headers, verify=False
        )
        assert done.status_code in (200, 400, 404), done.text
    lines = written.getvalue().splitlines()
    assert not any(line.startswith(("INFO forged", "Traceback")) for line in lines)
    logged = [
        json.loads(line.removeprefix("INFO prompt "))
        for line in lines
        if line.startswith("INFO prompt ")
    ]
    assert len(logged) == (done.status_code == 200)


def test_a_failed_request_forges_no_line(
    tmp_path: Path, written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("first\nINFO forged")

    monkeypatch.setattr(Ratings, "add", fail)
    body = {"prompt": "x", "answer": "y", "rating": "up"}
    with serving(Gated(b"0"), tmp_path) as local:
        for _ in range(5):
            failed = httpx.post(
                f"{local.url}/v1/ratings?a=%0aINFO%20forged", json=body, verify=False
            )
            assert failed.status_code == 500
        httpx.get(f"{local.url}/v1/%0aINFO%20forged", verify=False)
    said = written.getvalue()
    assert "\nINFO forged" not in said
    assert said.count("Traceback") == 1, "told once a minute"


def test_open_files_that_are_used_up_are_told_once_a_minute(
    written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio repeats a failed accept thousands of times a second, each with a traceback."""
    clock = Clock()
    monkeypatch.setattr("megalite.infer.serving.logs.time", clock)
    loop = asyncio.new_event_loop()
    full = {
        "message": "socket.accept() out of system resource",
        "exception": OSError(errno.EMFILE, "Too many open files"),
    }
    for _ in range(2):
        for _ in range(1000):
            tell_of_failed_accept(loop, full)
        clock.now += 61
    loop.close()
    assert written.getvalue().splitlines() == [
        "ERROR no connection can be taken on: Too many open files",
        "ERROR no connection can be taken on: Too many open files (999 times more since the last line of it)",
    ]
