"""Rows to learn from: those that no round has used, divided into ones to train on and ones that judge."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from megalite.data.annotations import read_annotations, tool_of
from megalite.data.inputs import Report
from megalite.data.rows import Row, list_rows, read_rows
from megalite.utils.files import replacing

JUDGING = "judging.jsonl"
"""File of a round with the held-out rows that judge its model, the newest of all rounds."""


class NewRows(NamedTuple):
    """Holds the rows of a round."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    num_bad: int
    """Rows without a prompt and a completion."""


def collect(inputs: Sequence[str], used: set[str], held_out_share: float) -> NewRows:
    """Return the rows of `inputs` whose `key_of` is not among the `used` ones. Raise DataError
    where there is no file."""
    found = NewRows([], [], 0)
    num_bad, seen = 0, set(used)
    for row in _rows_of(inputs):
        values = {name: row.values.get(name) for name in ("prompt", "completion")}
        if row.why or not all(values.values()):
            num_bad += 1
            continue
        if (key := key_of(values)) not in seen:
            seen.add(key)  # ten people who press the same button are one row
            judges = is_held_out(values["prompt"], held_out_share)
            (found.held_out if judges else found.train).append(values)
    return found._replace(num_bad=num_bad)


def _rows_of(inputs: Sequence[str]) -> Iterator[Row]:
    """Yield rows of completions; an export of an annotation tool is read as such."""
    for path, size in list_rows(inputs, Report()).items():
        # File by file, since exports of several tools may stand beside the server's own ratings.
        first = next(read_rows({path: size}, Report()), None)
        rows: Iterable[Row] = read_rows({path: size}, Report())
        if first and (tool := tool_of(first)):
            rows = read_annotations(rows, tool, "completion", "single_label", "vote").rows
        yield from rows


def key_of(values: Mapping[str, Any]) -> str:
    """Return what tells a row from others: a hash of its question and its answer."""
    return hashlib.sha256(_plain([values["prompt"], values["completion"]])).hexdigest()[:24]


def question_of(values: Mapping[str, Any]) -> str:
    """Return what tells a row's question from others, whatever was answered: a hash."""
    return hashlib.sha256(_plain(values["prompt"])).hexdigest()[:24]


def is_held_out(prompt: Any, share: float) -> bool:
    """Return whether rows of this question judge and are never trained on, in any round."""
    # By the question alone and not by chance: another answer to it in a later round is on the same
    # side. The words before it keep the choice apart from other uses of the hash.
    digest = hashlib.sha256(b"held out:" + _plain(prompt)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _plain(value: Any) -> bytes:
    # Messages are objects, whose keys may come in any order.
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def read_back(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of `write`; none where there is no file."""
    return [orjson.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, all or none."""
    with replacing(file, durable=True) as temporary:
        temporary.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
