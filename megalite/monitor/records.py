"""Reading a server's log of requests: rows in the order of time, of a window and of what it is
compared with."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from megalite.errors import DataError

Row = dict[str, Any]
"""A line of the log; see `megalite.infer.serving.request_log`."""
Array = npt.NDArray[np.float64]
SHADOW = "shadow"
"""Arm of requests that were sent to a model whose answers nobody got."""
UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0}
NO_ANSWER = {"failed", "not_finite", "time"}
"""Ends of answers that are the server's fault."""


class Window(NamedTuple):
    """Holds the rows that are judged, and those that they are compared with."""

    now: list[Row]
    reference: list[Row]
    start: float
    end: float
    """When the judged rows begin and end, in seconds since 1970."""
    num_damaged: int
    """Lines of the log that could not be read."""


def read_log(path: Path) -> tuple[list[Row], int]:
    """Return the rows of a request log, a folder or one of its files, in the order of time, and the
    number of its lines that cannot be read. Raise DataError where there is no row."""
    files = sorted(path.glob("requests-*.jsonl")) if path.is_dir() else [path]
    rows, num_damaged = [], 0
    for file in files:
        try:
            # As bytes, since a line that a crash cut off may end within a letter.
            lines = file.read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror}") from None
        for line in lines:
            if row := _row_of(line):
                rows.append(row)
            else:
                num_damaged += 1
    if not rows:
        raise DataError(
            f"{path} holds no line of a request: give the folder of `megalite serve --request-log`"
        )
    # A line is written when its request ends, and several servers may share the folder.
    return sorted(rows, key=lambda row: float(row["time"])), num_damaged


def _row_of(line: bytes) -> Row | None:
    """Return a line's row; None for one that a crash cut off, or that is none."""
    try:
        row = orjson.loads(line)
        numbers = [row["time"], row["seconds"], row["status"]]
    except (ValueError, TypeError, KeyError):
        return None
    is_row = isinstance(row.get("path"), str) and all(isinstance(x, int | float) for x in numbers)
    return row if is_row else None


def read_window(log: Path, reference: Path | None, seconds: float) -> Window:
    """Return the last `seconds` of a log, up to its newest row, beside the rows of `reference`, or
    of the log itself before them. Raise DataError."""
    rows, num_damaged = read_log(log)
    # Up to the newest row, not up to now: a quiet night is no drift, and an old log can be judged.
    end = float(rows[-1]["time"])
    start = end - seconds
    now = [row for row in rows if row["time"] > start]
    before = [row for row in rows if row["time"] <= start]
    if reference:
        before, more = read_log(reference)
        num_damaged += more
    return Window(now, before, start, end, num_damaged)


def asked(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which a model was asked, and not rated; what a shadow was asked nobody
    did."""
    return [row for row in rows if row["path"] != "/v1/ratings" and row.get("arm") != SHADOW]


def answered(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which a model was asked and answered."""
    return [row for row in asked(rows) if row["status"] < 400 and not is_error(row)]


def rated(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in which an answer was rated."""
    return [row for row in rows if row.get("rating") and row["status"] < 400]


def is_error(row: Row) -> bool:
    """Return whether the server failed. A stream begins with status 200 whatever comes of it."""
    return row["status"] >= 500 or bool(NO_ANSWER.intersection(row.get("finish") or ()))


def values_of(rows: Sequence[Row], key: str) -> Array:
    """Return a number of each row that has it."""
    found = [row.get(key) for row in rows]
    return np.array([x for x in found if isinstance(x, int | float)], dtype=np.float64)


def duration(text: str) -> float:
    """Return the seconds that `90m`, `24h` or `7d` stand for, as the `type` of an option."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([mhd])", text)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a time such as 90m, 24h or 7d")
    return float(found[1]) * UNITS[found[2]]
