"""Runs of n tokens of evaluation texts, and where they stand in other tokens.

Legend: n = tokens of an n-gram, M = different n-grams of all texts, N = tokens looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.data.inputs import Report
from megalite.data.order import Int64s
from megalite.data.rows import list_rows, read_rows
from megalite.errors import DataError

BITS = 28
"""A table of at most 2^BITS bytes tells most n-grams apart from those looked for."""
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, an odd number (Knuth's multiplicative hashing)."""
Hashes = npt.NDArray[np.uint64]


class Asked(NamedTuple):
    """Holds a document of a task, in the forms in which it may stand in a training text."""

    task: str
    number: int
    texts: tuple[str, ...]


class Grams:
    """Holds the n-grams of evaluation texts, and looks for them in tokens."""

    def __init__(self, rows: Sequence[Int64s], length: int) -> None:
        """`rows` are the token ids of texts, each [tokens]."""
        self.length = length
        self._flat = np.concatenate([np.empty(0, np.int64), *rows])
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        starts = []
        for row, end in zip(rows, ends.tolist(), strict=True):
            # None where a row is shorter than an n-gram; none that reaches into the next row.
            starts.append(np.arange(end - len(row), end - length + 1))
        # The empty array is for no rows at all, which `concatenate` refuses.
        begins = np.concatenate([np.empty(0, np.int64), *starts])
        # Of runs with one hash of 64 bits the first stands for all.
        self._hashes, first = np.unique(_hashes(self._flat, length)[begins], return_index=True)
        self._begins = begins[first]
        # Sixteen to 32 cells an n-gram, by the upper bits of the hash: nearly all tokens of a
        # corpus fall into an empty one, and cost one look instead of a binary search.
        bits = min(len(self).bit_length() + 4, BITS)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[self._hashes >> self._shift] = True

    def __len__(self) -> int:
        """Return how many there are, M."""
        return len(self._begins)

    def tokens(self, number: Int64s) -> Int64s:
        """Return the tokens of n-grams by their numbers, [k, n]."""
        return self._flat[self._begins[number][:, None] + np.arange(self.length)]

    def find(self, tokens: Int64s) -> tuple[Int64s, Int64s]:
        """Return where n-grams stand in `tokens` [N], ascending, and which of them. All are
        compared token by token: a hash only says where to look."""
        hashes = _hashes(tokens, self.length)
        at = np.flatnonzero(self._table[hashes >> self._shift])
        number = np.searchsorted(self._hashes, hashes[at])
        # A hash above all of ours gives one number too many.
        inside = number < len(self)
        at, number = at[inside], number[inside]
        same = (tokens[at[:, None] + np.arange(self.length)] == self.tokens(number)).all(1)
        return at[same], number[same]

    def numbers_of(self, row: Int64s) -> Int64s:
        """Return the numbers of the n-grams of a text that was given, in order."""
        return self.find(row)[1] if len(row) >= self.length else np.empty(0, np.int64)


def _hashes(tokens: Int64s, length: int) -> Hashes:
    """Return a hash of each run of `length` tokens, [N - length + 1]."""
    values = tokens.astype(np.uint64)
    count = max(len(values) - length + 1, 0)
    found = np.zeros(count, np.uint64)
    # A polynomial over the tokens, modulo 2^64: unsigned numbers of numpy wrap without a warning.
    for first in range(length):
        found = found * _FACTOR + values[first : first + count] + np.uint64(1)
    # The upper bits are to depend on all tokens.
    found ^= found >> np.uint64(29)
    return found * _FACTOR


def texts_of_rows(inputs: Sequence[str]) -> Iterator[Asked]:
    """Yield the texts of rows (JSON lines, JSON, parquet): `text`, or `prompt` with each
    `completion`; messages count by their contents. Raise DataError for a row without any."""
    report = Report()
    for number, row in enumerate(read_rows(list_rows(inputs, report), report)):
        texts = [] if row.why else _texts_of(row.values)
        if not texts:
            raise DataError(
                f"{row.path}:{row.line}: {row.why or 'no text, or prompt and completion, in it'}"
            )
        yield Asked(Path(row.path).stem, number, tuple(texts))


def _texts_of(values: Mapping[str, Any]) -> list[str]:
    """Return the texts of a row; empty for none."""
    if isinstance(values.get("text"), str):
        return [values["text"]]
    prompt, answers = _plain(values.get("prompt")), values.get("completion")
    answers = answers if isinstance(answers, list) else [answers]
    texts = []
    for answer in answers:
        parts = [part for part in (prompt, _plain(answer)) if part]
        if parts:
            texts.append(" ".join(parts))
    return texts


def _plain(value: Any) -> str:
    """Return a text, or the contents of messages; empty for anything else."""
    if isinstance(value, list):
        contents = (each.get("content") for each in value if isinstance(each, dict))
        return "\n".join(content for content in contents if isinstance(content, str))
    return value if isinstance(value, str) else ""
