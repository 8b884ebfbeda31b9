"""metrics.jsonl: one JSON object a line, one line a step, with evaluations in between. Other tools
read this record. samples.jsonl likewise: one line an answer to a prompt."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from megalite.utils.files import replacing

MOST_PENDING = 32 << 20
"""Bytes of lines that may wait in memory for a disk. Beyond it the oldest are lost."""


def replaced(path: Path) -> Path:
    """Return the file beside a metrics.jsonl for the lines of steps that a resumed run did
    again."""
    return path.with_suffix(".replaced.jsonl")


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics.jsonl, in order. Lines that are not records, as after a crash,
    are skipped."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), (int, float)):
                yield record


class JsonlSink:
    """Sink that appends records to metrics.jsonl.

    After a resume from step `start_step` the lines of later steps are first moved to
    `replaced(path)`: the file reads as if the run had never stopped, and nothing is lost.

    No line is lost to a disk that is full or gone: lines wait in memory until one can be written
    again. `say` prints a line for the user when that begins."""

    name = "metrics.jsonl"

    def __init__(self, path: Path, start_step: int, say: Callable[[str], None] = print):
        self._path = path
        self._start_step = start_step
        self._say = say
        self._file: FileIO | None = None  # unbuffered: a crash of the process loses no line
        self._rewound = not path.exists()
        self._pending = b""
        self._error: OSError | None = None
        self._flush()

    def step(self, record: dict[str, Any]) -> None:
        """Append a record."""
        self._pending += _line(record).encode()
        self._flush()

    evaluation = tasks = step

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Leave samples to `SamplesSink`."""

    def close(self, status: str) -> None:
        """Write what is pending and close the file. Raises OSError if lines are lost."""
        self._flush()
        if self._file is not None:
            self._file.close()
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        """Write all pending lines, or keep them for the next call."""
        try:
            if not self._rewound:
                moved = _rewind(self._path, self._start_step)
                self._rewound = True
                if moved:
                    first, last = moved
                    self._say(
                        f"{self._path}: lines of steps {first} to {last}, done again, go to {replaced(self._path).name}"
                    )
            if self._file is None:
                self._file = FileIO(self._path, "a")
            while self._pending:
                # A disk that fills up takes a part: go on behind it next time, so that no line is
                # written twice.
                written = self._file.write(self._pending)
                self._pending = self._pending[written:]
            self._error = None
        except OSError as error:
            if self._error is None:
                self._say(
                    f"warning: {self._path}: {error.strerror or error}; its lines wait until there is room again"
                )
            self._error = error
            # The oldest go first, possibly within a line: readers pass over what is no record.
            self._pending = self._pending[-MOST_PENDING:]
            self._close_quietly()

    def _close_quietly(self) -> None:
        """Close the file after an error. It is opened again by name: a file system may have been
        mounted anew."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


class SamplesSink(JsonlSink):
    """Sink that appends answers to prompts to samples.jsonl."""

    name = "samples.jsonl"

    def step(self, record: dict[str, float]) -> None:
        """Leave records to metrics.jsonl."""

    evaluation = tasks = step

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Append a line for each answer."""
        for prompt, answer in zip(prompts, answers, strict=True):
            super().step({"step": step, "prompt": prompt, "answer": answer})


def _line(record: Mapping[str, Any]) -> str:
    finite = dict(record)
    for key, x in record.items():
        # JSON has no NaN or infinity; null keeps every reader working.
        if isinstance(x, float) and not math.isfinite(x):
            finite[key] = None
    return json.dumps(finite, allow_nan=False) + "\n"


def _rewind(path: Path, start_step: int) -> tuple[int, int] | None:
    """Move the lines of steps after `start_step` to `replaced(path)`. Returns the first and last of
    these, or None."""
    steps: list[int] = []
    lines: list[str] = []
    with replacing(path, durable=True) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            for record in read_metrics(path):
                step = int(record["step"] or 0)
                if step <= start_step:
                    file.write(_line(record))
                else:
                    steps.append(step)
                    lines.append(_line(record))
        # The moved lines are on disk before the file without them takes its name: a crash between
        # loses none.
        if lines:
            _append(replaced(path), "".join(lines).encode())
    return (min(steps), max(steps)) if steps else None


def _append(path: Path, data: bytes) -> None:
    """Append `data` to a file, all of it or nothing, durably. Raises OSError."""
    with FileIO(path, "a") as file:
        before = file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise
