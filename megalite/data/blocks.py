"""The inputs cut into blocks, to be read and tokenized apart from each other and put together in their order.

Files of JSON lines are handed over as bytes of whole lines, so that parsing, too, is done by those who tokenize. Where
the cuts fall depends on the files alone, never on how many do the work."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import orjson

from megalite.data.documents import (
    LONGEST_TEXT,
    MAX_MESSAGES,
    Document,
    Reading,
    Report,
    is_json_lines,
    mend,
    read_bytes,
    read_files,
    record_of,
)
from megalite.data.indexed import DataError

BLOCK_BYTES, READ_BYTES = 1 << 20, 1 << 18
TOO_LONG = f"longer than {LONGEST_TEXT >> 20} MiB; cut the text into several documents"


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 0) of `count` about equal ones, in bytes of the inputs as they lie on disk."""

    index: int = 0
    count: int = 1


class Block(NamedTuple):
    """Whole JSON lines, or documents of other files; and what was counted and found unreadable on the way there."""

    report: Report
    documents: list[Document]
    lines: bytes = b""
    path: str = ""
    start: int = 0  # byte of the file at which the shard's first line begins
    first_line: int = 1  # of this block, counted from there


def iter_blocks(files: Sequence[str], json_key: str, shard: Shard) -> Iterator[Block]:
    """Stream the shard's blocks. A JSON line belongs to the shard in which it begins, as does any other whole file.

    Raises DataError, before anything is read, for a missing library."""
    read_files(files, Reading(json_key), Report())  # checks, and reads nothing yet
    return _iter_blocks(files, json_key, shard)


def shard_bytes(files: Sequence[str], shard: Shard) -> tuple[int, int]:
    """The bytes [first, last) of all files end to end that are the shard's."""
    total = sum(os.stat(path).st_size for path in files)
    return total * shard.index // shard.count, total * (shard.index + 1) // shard.count


def _iter_blocks(files: Sequence[str], json_key: str, shard: Shard) -> Iterator[Block]:
    (low, high), offset = shard_bytes(files, shard), 0
    others: list[str] = []  # neighbours that are not JSON lines share blocks: they may be many and small
    for path in files:
        size = os.stat(path).st_size
        first, last = max(low - offset, 0), min(high - offset, size)
        is_here = low <= offset and (offset < high or shard.index == shard.count - 1)
        offset += size
        if not is_json_lines(path):
            others += [path] if is_here else []
            continue
        if others:
            yield from _read_documents(others, json_key)
            others = []
        report = Report()
        if path.endswith((".gz", ".zst")):
            if is_here:
                yield from _cut_lines(path, 0, read_bytes(path, report), report)
        elif first < last:
            yield from _cut_lines(path, first, _read_span(path, first, last, report), report)
    if others:
        yield from _read_documents(others, json_key)


def _read_documents(files: Sequence[str], json_key: str) -> Iterator[Block]:
    report, before = Report(), Report()
    documents: list[Document] = []
    num_bytes = 0
    for document in read_files(files, Reading(json_key), report):
        documents.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= BLOCK_BYTES:
            yield Block(_difference(report, before), documents)
            documents, num_bytes, before = [], 0, _difference(report, Report())
    yield Block(_difference(report, before), documents)


def _read_span(path: str, first: int, last: int, report: Report) -> Iterator[bytes]:
    """The lines that begin within bytes [first, last). Raises OSError."""
    with open(path, "rb") as file:
        if first:
            file.seek(first - 1)
            while (skipped := file.readline(READ_BYTES)) and not skipped.endswith(b"\n"):
                pass
        data = b"\n"
        while (left := last - file.tell()) > 0 and (data := file.read(min(READ_BYTES, left))):
            report.bytes_read = file.tell() - first
            yield data
        report.bytes_read = last - first
        while data and not data.endswith(b"\n"):  # the last line may end behind the span
            data = file.readline(READ_BYTES)
            yield data


def _cut_lines(path: str, start: int, chunks: Iterator[bytes], report: Report) -> Iterator[Block]:
    before, line, held = Report(), 1, 0
    whole: list[bytes] = []
    tail: list[bytes] = []  # of a line that has not ended yet
    try:
        for chunk in chunks:
            cut = chunk.rfind(b"\n") + 1
            if cut:
                whole += [*tail, chunk[:cut]]
                tail = []
            # Of a line that is too long enough is kept for `texts_of` to see that it is.
            if sum(map(len, tail)) <= LONGEST_TEXT:
                tail.append(chunk[cut:])
            held += cut
            if held >= BLOCK_BYTES:
                lines = b"".join(whole)
                yield Block(_difference(report, before), [], lines, path, start, line)
                before, line = _difference(report, Report()), line + lines.count(b"\n")
                whole, held = [], 0
        whole, tail = [*whole, *tail], []
    except (OSError, DataError) as error:
        bad_line = line + b"".join(whole).count(b"\n")
        report.bad(path, lines_before(path, start) + bad_line, f"unreadable from here on: {error}")
    yield Block(_difference(report, before), [], b"".join(whole), path, start, line)


def texts_of(block: Block, json_key: str) -> tuple[list[str], Report]:
    """The block's texts, none of them empty, and all that has been counted for them."""
    report, texts = _difference(block.report, Report()), []
    for document in block.documents:
        if document.num_bytes > LONGEST_TEXT:
            report.bad(document.path, document.line, TOO_LONG)
        else:
            texts.append(document.text)
    lines = block.lines.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, block.first_line):
        try:
            text = _text_of(line, json_key, is_first=number == 1 and not block.start, report=report)
        except ValueError as error:
            report.bad(block.path, lines_before(block.path, block.start) + number, error)
            continue
        if text:
            texts.append(text)
        else:
            report.num_empty += 1
    return texts, report


def _text_of(line: bytes, json_key: str, is_first: bool, report: Report) -> str:
    """Raises ValueError that says why there is none. Whatever orjson takes, json takes for the same; the rest, which is
    rare, is left to it and to the messages that all of megalite gives."""
    if len(line) > LONGEST_TEXT:
        raise ValueError(TOO_LONG)
    try:
        text = orjson.loads(line)[json_key]
    except (ValueError, KeyError, TypeError):
        line = line.removeprefix(b"\xef\xbb\xbf") if is_first else line
        if not line.strip():
            return ""
        text, num_mended = mend(record_of(line, Reading(json_key))[json_key])
        report.num_mended += num_mended > 0
        return text
    return text if isinstance(text, str) else record_of(line, Reading(json_key))[json_key]


@cache
def lines_before(path: str, start: int) -> int:
    """How many lines of the file begin before this byte: asked for once a shard, and only if a line of it is bad."""
    num_lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while start > 0 and (data := file.read(min(start, READ_BYTES))):
            num_lines, last, start = num_lines + data.count(b"\n"), data[-1:], start - len(data)
    return num_lines + (last != b"\n")


def add_to(total: Report, part: Report) -> None:
    for field in dataclasses.fields(Report):
        if field.name == "messages":
            total.messages += part.messages[: MAX_MESSAGES - len(total.messages)]
        else:
            setattr(total, field.name, getattr(total, field.name) + getattr(part, field.name))


def _difference(now: Report, before: Report) -> Report:
    """What has come since; from nothing, a copy."""
    counts = {
        field.name: getattr(now, field.name) - getattr(before, field.name)
        for field in dataclasses.fields(Report)
        if field.name not in ("messages", "total_bytes")
    }
    return Report(**counts, messages=now.messages[len(before.messages) :])
