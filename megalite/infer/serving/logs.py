"""Log lines that cannot be forged, that never fail a request, and that do not fill a disk."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from typing import Any

SAME_S = 60.0
"""A repeated warning, such as one that there is no more room, is logged once in this many
seconds."""
OFTEN = ("asyncio", "uvicorn.error", "megalite.serve")
# Characters that break a line or control a terminal: C0, DEL, C1, the line and paragraph
# separators; and halves of surrogate pairs, which cannot be encoded.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def escaped(text: str) -> str:
    """Return `text` with control characters escaped."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


class OneLine(logging.Formatter):
    """Formats a message as one line, whatever it holds. Lines of a traceback are indented, so that
    none looks like a message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return escaped(super().formatMessage(record))

    def formatException(self, exc_info: Any) -> str:
        return "\n".join(
            "  " + escaped(line) for line in super().formatException(exc_info).split("\n")
        )


class Seldom(logging.Filter):
    """Passes a repeated warning once a minute, with the number of repetitions. Messages below
    warning level, which report requests, always pass."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        # The message before its arguments are filled in: there are only few different ones.
        key = (record.name, str(record.msg)[:80])
        with self._lock:
            last, held = self._seen.get(key, (-SAME_S, 0))
            now = time.monotonic()
            if now - last < SAME_S:
                self._seen[key] = (last, held + 1)
                return False
            self._seen[key] = (now, 0)
        if held:
            record.msg = f"{record.msg} ({held} times more since the last line of it)"
        return True


class AsJson:
    """Formats a value as JSON when its log line is written. Any value can be logged, even what is
    no JSON."""

    def __init__(self, value: Any):
        self.value = value

    def __str__(self) -> str:
        try:
            return json.dumps(self.value, default=repr)
        except Exception as problem:  # a log line is not worth a request
            return f"({type(problem).__name__}: it cannot be written as JSON)"


def set_up() -> None:
    """Send all logs of the process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    seldom = Seldom()
    for name in OFTEN:
        logging.getLogger(name).addFilter(seldom)
