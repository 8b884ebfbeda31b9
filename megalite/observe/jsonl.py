"""metrics.jsonl: one JSON object a line, one line a step, evaluations in between. The record other tools read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


def read_metrics(path: Path) -> Iterator[dict[str, float | None]]:
    """The records of a metrics.jsonl, in order. A line cut short by a crash is passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), (int, float)):
                yield record


class JsonlSink:
    """Appends to `path`. After a resume from step `start_step` the lines of later steps are dropped first, so that the
    file reads as if the run had never stopped."""

    name = "metrics.jsonl"

    def __init__(self, path: Path, start_step: int):
        if path.exists():
            _rewind(path, start_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)  # a line is in the file as soon as it is written

    def step(self, record: dict[str, float]) -> None:
        self._file.write(_line(record))

    evaluation = tasks = step

    def close(self, status: str) -> None:
        self._file.close()


def _line(record: Mapping[str, float | None]) -> str:
    # JSON has no NaN or infinity; null keeps every reader working.
    finite = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _rewind(path: Path, start_step: int) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(_line(record) for record in read_metrics(path) if (record["step"] or 0) <= start_step)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
