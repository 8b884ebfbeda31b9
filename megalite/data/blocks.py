"""Split the inputs into blocks, which are read and tokenized independently and joined in their
order.

A plain file of JSON lines is split without being read: a line belongs to the block in which it
begins, and whoever tokenizes the block reads and parses it. The cuts depend on the files alone,
never on the number of workers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson

from megalite.data.documents import (
    BOM,
    LONGEST_TEXT,
    Document,
    Reading,
    is_json_lines,
    mend,
    read_bytes,
    read_files,
    record_of,
)
from megalite.data.inputs import MAX_MESSAGES, Report
from megalite.data.kinds import is_packed
from megalite.data.origins import PLACE, Array, places_of
from megalite.errors import DataError
from megalite.utils.urls import is_url

BLOCK_BYTES, READ_BYTES = 2 << 20, 1 << 16
NAMED = ("left_out", "as_text")
"""Fields of a report that are counts by name."""
TOO_LONG = f"longer than {LONGEST_TEXT >> 20} MiB; cut the text into several documents"


@dataclass(frozen=True)
class Shard:
    """Holds the number of one part, `index` (from 0) of `count` nearly equal ones, measured in
    bytes of the inputs on disk."""

    index: int = 0
    count: int = 1


class Block(NamedTuple):
    """Holds one of: the lines that begin within bytes [first, last) of `path`; whole lines of a
    compressed file, from byte `first` of what is unpacked; or documents of other files. `report`
    counts what was met on the way, `failure` says why the file ends with this block."""

    report: Report
    path: str = ""
    first: int = 0
    last: int = 0
    lines: bytes = b""
    documents: Sequence[Document] = ()
    failure: str = ""


class Texts(NamedTuple):
    """Holds a block's texts as UTF-8, none empty. `bad` lists the lines (from 1) that cannot be
    used, and why. `places` say where each text comes from, lines counted within the block where it
    has lines; `paths` are the files that they number."""

    texts: list[bytes]
    report: Report
    num_lines: int
    bad: list[tuple[int, str]]
    places: Array
    paths: list[str]


def iter_blocks(files: Mapping[str, int], json_key: str, shard: Shard) -> Iterator[Block]:
    """Yield the blocks of a shard of `files` (path to size in bytes); `json_key` names the text in
    JSON lines. A plain JSON line belongs to the shard in which it begins, as does any other file.
    Raise DataError for a missing library before anything is read."""
    read_files(files, Reading(json_key), Report())  # checks, and reads nothing yet
    return _iter_blocks(files, json_key, shard)


def shard_bytes(files: Mapping[str, int], shard: Shard) -> tuple[int, int]:
    """Return the shard's byte range [first, last) in all files end to end."""
    total = sum(files.values())
    return total * shard.index // shard.count, total * (shard.index + 1) // shard.count


def _iter_blocks(files: Mapping[str, int], json_key: str, shard: Shard) -> Iterator[Block]:
    """Yield the blocks as `iter_blocks` says."""
    (low, high), offset = shard_bytes(files, shard), 0
    others: dict[
        str, int
    ] = {}  # neighbours that are not JSON lines share blocks: they may be many and small
    for path, size in files.items():
        first, last = max(low - offset, 0), min(high - offset, size)
        # All shards go through all files, and each finds its own by these sums: none has to know
        # another. A file that is not split belongs to the shard in which it begins; the last shard
        # also takes empty files at the end.
        is_here = low <= offset and (offset < high or shard.index == shard.count - 1)
        offset += size
        if not is_json_lines(path):
            others |= {path: size} if is_here else {}
            continue
        if others:
            yield from _read_documents(others, json_key)
            others = {}
        # A URL is read fastest by a single read-ahead stream.
        if not (is_url(path) or is_packed(path)):
            for start in range(first, last, BLOCK_BYTES):
                end = min(start + BLOCK_BYTES, last)
                yield Block(Report(bytes_read=end - start), path, start, end)
        elif is_here:
            yield from _unpack_lines(path)
    if others:
        yield from _read_documents(others, json_key)


def _read_documents(files: Mapping[str, int], json_key: str) -> Iterator[Block]:
    """Yield blocks of about BLOCK_BYTES of documents."""
    report, before = Report(), Report()
    documents: list[Document] = []
    num_bytes = 0
    for document in read_files(files, Reading(json_key), report):
        documents.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= BLOCK_BYTES:
            yield Block(_difference(report, before), documents=documents)
            documents, num_bytes, before = [], 0, _difference(report, Report())
    yield Block(_difference(report, before), documents=documents)


def _unpack_lines(path: str) -> Iterator[Block]:
    """Yield blocks of whole lines from a compressed file or a URL."""
    report, before = Report(), Report()
    whole: list[bytes] = []
    tail: list[bytes] = []  # of a line that has not ended yet
    first, position, held, failure = 0, 0, 0, ""
    try:
        for chunk in read_bytes(path, report):
            cut = chunk.rfind(b"\n") + 1
            if cut:
                whole += [*tail, chunk[:cut]]
                tail = []
            # Keep only enough of an overlong line to see that it is too long: memory stays bounded.
            if sum(map(len, tail)) <= LONGEST_TEXT:
                tail.append(chunk[cut:])
            held += cut
            if held >= BLOCK_BYTES:
                yield Block(_difference(report, before), path, first, lines=b"".join(whole))
                whole, held, before = [], 0, _difference(report, Report())
                first = position + cut
            position += len(chunk)
        whole += tail
    except (OSError, DataError) as error:
        failure = f"unreadable from here on: {error}"
    yield Block(_difference(report, before), path, first, lines=b"".join(whole), failure=failure)


def texts_of(block: Block, json_key: str) -> Texts:
    """Read and parse a block. Return its texts, and the lines that cannot be used."""
    if block.documents:
        return _texts_of_documents(block)
    result = Texts([], _difference(block.report, Report()), 0, [], places_of([]), [block.path])
    lines, start, failure = block.lines, block.first, block.failure
    if block.last:
        try:
            lines, start, failure = _read_lines(block)
        except OSError as error:
            failure = f"unreadable from here on: {error}"
    # The fast parser takes common lines; those it leaves (`odd`) go through Python's json, which
    # says what is wrong.
    texts, odd = json_texts(lines, json_key, LONGEST_TEXT)
    for number, first, last in odd:
        line = lines[first:last]
        if not number and not block.first:
            line = line.removeprefix(BOM)
        try:
            texts[number] = _text_of(line, json_key, result.report).encode()
            result.report.num_empty += not texts[number]
        except ValueError as error:
            result.bad.append((number + 1, str(error)))
    if failure:
        result.bad.append((len(texts) + 1, failure))
    places = _places_of_lines(lines, len(texts), start)
    if odd:
        places = places[[bool(text) for text in texts]]
    result.texts.extend(filter(None, texts) if odd else texts)
    return result._replace(num_lines=len(texts), places=places)


def _texts_of_documents(block: Block) -> Texts:
    """Return the texts of a block of documents that were read already."""
    result = Texts([], _difference(block.report, Report()), 0, [], places_of([]), [])
    places, numbers = [], dict[str, int]()
    for document in block.documents:
        if document.num_bytes > LONGEST_TEXT:
            result.report.bad(document.path, document.line, TOO_LONG)
        else:
            result.texts.append(document.text.encode())
            number = numbers.setdefault(document.path, len(numbers))
            places.append((number, document.line, 0, -1))
    return result._replace(places=places_of(places), paths=list(numbers))


def _places_of_lines(lines: bytes, count: int, start: int) -> Array:
    """Return the places of `count` lines, the first of which begins at byte `start` of its file;
    they are counted from 1."""
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))[:count]
    ends = ends if len(ends) == count else np.append(ends, len(lines))
    places = np.zeros(count, PLACE)
    places["line"] = np.arange(1, count + 1)
    starts = np.concatenate([[0], ends[:-1] + 1])[:count]
    places["length"], places["start"] = ends - starts, start + starts
    # Of an overlong line only a part was kept, so that what follows it is elsewhere in the file.
    too_long = np.flatnonzero(places["length"] > LONGEST_TEXT)
    places["start"][too_long[0] + 1 if len(too_long) else count :] = -1
    return places


def json_texts_reference(
    lines: bytes, key: str, longest: int
) -> tuple[list[bytes], list[tuple[int, int, int]]]:
    """Parse JSON `lines` and return the text under `key` of each, and (number, first, last) of
    those left to the exact parser. `longest` is the most bytes of a line. This is
    `megalite._data.json_texts` in Python; whatever orjson accepts, json accepts with the same
    result."""
    texts, odd = [], []
    first = 0
    # An empty text in `texts` keeps its line's number; it is filtered out at last.
    for number, line in enumerate(lines.split(b"\n") if lines else ()):
        text: Any = None
        if len(line) <= longest:
            with suppress(ValueError, KeyError, TypeError):
                text = orjson.loads(line)[key]
        texts.append(text.encode() if isinstance(text, str) else b"")
        if not texts[-1] and first < len(lines):
            odd.append((number, first, first + len(line)))
        first += len(line) + 1
    return texts[:-1] if lines.endswith(b"\n") else texts, odd


try:
    from megalite._data import json_texts
except ImportError:  # installed without a compiler
    json_texts = json_texts_reference


def _read_lines(block: Block) -> tuple[bytes, int, str]:
    """Return the lines that begin within the block, at which byte of the file, and what is wrong
    with the file, empty for nothing. Raise OSError."""
    with open(block.path, "rb") as file:
        # One byte earlier, so that a newline right before the block shows that its first line
        # begins there.
        start = max(block.first - 1, 0)
        file.seek(start)
        data = file.read(block.last - start)
        # Blocks are cut by the size that the file had when it was listed.
        is_short = len(data) < block.last - start
        if block.first:
            cut = data.find(b"\n") + 1
            start += cut
            # Without a cut, it is all of a line that began before.
            data = data[cut:] if cut else b""
        parts = [data]
        # The last line may end behind the block. Of an overlong one, read only enough to see that
        # it is too long.
        while (
            data and not data.endswith(b"\n") and sum(map(len, parts)) <= BLOCK_BYTES + LONGEST_TEXT
        ):
            data = file.readline(READ_BYTES)
            parts.append(data)
    return b"".join(parts), start, "the file has become shorter since it was listed" * is_short


def _text_of(line: bytes, json_key: str, report: Report) -> str:
    """Return the text of one line, empty for a blank line. Raise ValueError that says why there is
    none."""
    if len(line) > LONGEST_TEXT:
        raise ValueError(TOO_LONG)
    if not line.strip():
        return ""
    text, num_mended = mend(record_of(line, Reading(json_key))[json_key])
    report.num_mended += num_mended > 0
    return text


class LineNumbers:
    """Adds up reports in the order of their blocks, and so turns line numbers within blocks into
    line numbers of files."""

    def __init__(self, total: Report) -> None:
        self._total = total
        self._path, self._first, self._num_lines = "", 0, 0
        self._before: int | None = None  # lines before the shard in its file, once they are counted

    def add(
        self,
        block: Block,
        report: Report,
        num_lines: int,
        bad: Sequence[tuple[int, str]],
        places: Array,
        paths: Sequence[str],
    ) -> Array:
        """Add the `report` of a block of `num_lines` lines, of which `bad` (number within the
        block, reason) cannot be used. Return its `places` with the lines counted from where the
        shard begins in their file."""
        if block.path != self._path:
            self._path, self._first, self._num_lines = block.path, block.first, 0
            self._before = None if block.first else 0
        add_to(self._total, report)
        for line, why in bad:
            # A shard that begins within the file, perhaps behind a terabyte: counted once, and only
            # for a message that is shown.
            if self._before is None and len(self._total.messages) < MAX_MESSAGES:
                self._before = 0
                with suppress(OSError):  # it may be gone, which is what is bad
                    self._before = _lines_before(self._path, self._first)
            self._total.bad(self._path, (self._before or 0) + self._num_lines + line, why)
        if block.path and len(places):
            places = places.copy()
            places["line"] += self._num_lines
        self._num_lines += num_lines
        return places

    @property
    def of_last_file(self) -> dict[str, int]:
        """Return the lines that were read of the last file, by its path; empty where it has
        none."""
        return {self._path: self._num_lines} if self._path else {}


def _lines_before(path: str, first: int) -> int:
    """Return how many lines of the file begin before byte `first`."""
    num_lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while first > 0 and (data := file.read(min(first, BLOCK_BYTES))):
            num_lines, last, first = num_lines + data.count(b"\n"), data[-1:], first - len(data)
    return num_lines + (last != b"\n")


def add_to(total: Report, part: Report) -> None:
    """Add `part` to `total`, in place."""
    for field in dataclasses.fields(Report):
        if field.name == "messages":
            total.messages += part.messages[: MAX_MESSAGES - len(total.messages)]
        elif field.name in NAMED:
            setattr(
                total,
                field.name,
                dict(Counter(getattr(total, field.name)) + Counter(getattr(part, field.name))),
            )
        else:
            setattr(total, field.name, getattr(total, field.name) + getattr(part, field.name))


def _difference(now: Report, before: Report) -> Report:
    """Return what was counted since `before`; with an empty `before`, a copy."""
    counts = {
        field.name: getattr(now, field.name) - getattr(before, field.name)
        for field in dataclasses.fields(Report)
        if field.name not in ("messages", "total_bytes", *NAMED)
    }
    named = {
        name: dict(Counter(getattr(now, name)) - Counter(getattr(before, name))) for name in NAMED
    }
    messages = now.messages[len(before.messages) :]
    return Report(**counts, left_out=named["left_out"], as_text=named["as_text"], messages=messages)
