"""Read documents from files: JSON lines (plain, .gz, .zst), JSON arrays, parquet, Arrow, plain
text. `kinds.py` tells which file is what, `inputs.py` which files there are.

Everything streams. What cannot be used is counted in a `Report`, which keeps the first messages as
`file:line: why`."""

from __future__ import annotations

import codecs
import importlib.util
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import orjson

from megalite.data.inputs import (
    Report,
    list_documents,
    printable,
)
from megalite.data.kinds import KNOWN, kind_by_content, kind_by_name, suffix_of
from megalite.data.store import open_file, size_of, stream
from megalite.errors import DataError
from megalite.utils.urls import is_url

# Bytes of a compressed file that are read at a time: few, because deflate may expand a
# thousandfold.
CHUNK_BYTES = 1 << 16
# Most bytes of plain text in one document. No real document is as long, but a file may be a whole
# crawl.
LONGEST_TEXT = 8 << 20
# Most bytes of a JSON line; a longer one is left out.
LONGEST_LINE = 64 << 20
# Most bytes of a JSON array, which is read as a whole.
LONGEST_ARRAY = 256 << 20
# If more of a text than this is not UTF-8, its encoding cannot be guessed byte by byte.
MOST_MENDED = 0.2
# Maps surrogates, by which `surrogateescape` represents bytes that are not UTF-8, to characters of
# Windows-1252, the commonest other encoding.
WINDOWS_1252 = {
    0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(0x80, 0x100)
}


class Document(NamedTuple):
    """Holds one document and where it comes from."""

    text: str
    num_bytes: int  # of the text in UTF-8
    path: str = ""
    line: int = 0  # where in the file it begins, counted from 1; a row in parquet and Arrow
    metadata: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    num_mended: int = 0  # bytes that were not UTF-8


@dataclass(frozen=True)
class Reading:
    """Holds how files become documents."""

    json_key: str = "text"  # key of JSON lines, column of parquet and Arrow
    metadata: bool = False  # also take the other keys or columns
    mend: bool = (
        False  # take bytes that are not UTF-8 for Windows-1252, instead of leaving the document out
    )


def iter_documents(inputs: Sequence[str], json_key: str, report: Report) -> Iterator[Document]:
    """Yield the documents of `inputs` (files, folders, globs) in a fixed order, and count
    everything in `report`.

    JSON lines hold a document under `json_key`, parquet and Arrow in the column of that name; any
    other UTF-8 file is one document. Raise DataError, before anything is read, for an input that
    matches nothing or a format whose library is missing."""
    return read_files(list_documents(inputs, report), Reading(json_key), report)


def read_files(
    files: Sequence[str] | Mapping[str, int], reading: Reading, report: Report
) -> Iterator[Document]:
    """Yield the documents of `files`, whose sizes may be given, read as `reading` says and counted
    in `report`. Raise DataError for a missing library before anything is read."""
    check_libraries(files)
    sizes = files if isinstance(files, Mapping) else {path: size_of(path) for path in files}
    report.total_bytes += sum(sizes.values())
    return _read_all(sizes, reading, report)


def check_libraries(files: Iterable[str]) -> None:
    """Raise DataError for a file whose name says that reading it needs a library which is
    missing."""
    missing = {name for name in ("zstandard", "pyarrow") if importlib.util.find_spec(name) is None}
    for path in files if missing else ():
        needed = {"zstandard"} if path.lower().endswith(".zst") else set()
        if kind_by_name(path) in ("parquet", "arrow"):
            needed.add("pyarrow")
        for name in needed & missing:
            raise DataError(needs_library(path, name))


def needs_library(path: str, name: str) -> str:
    """Return the message that a library is missing to read a file."""
    return f"{path}: reading it needs {name}; pip install 'megalite[data]'"


def _read_all(files: Mapping[str, int], reading: Reading, report: Report) -> Iterator[Document]:
    """Yield the documents of all files in order, mended if need be, and keep the report's progress
    exact."""
    for path, size in files.items():
        before = report.bytes_read
        for text, line, metadata in _reader(path)(path, reading, report):
            mended = 0
            try:
                num_bytes = len(text.encode())
            except UnicodeEncodeError:
                try:
                    text, mended = mend(text)
                except ValueError as error:
                    report.bad(path, line, error)
                    continue
                num_bytes = len(text.encode())
                report.num_mended += 1
            if num_bytes:
                report.num_documents += 1
                yield Document(text, num_bytes, path, line, metadata, mended)
            else:
                report.num_empty += 1
        # Readers report only rough progress within a file: set the exact total at its end.
        report.bytes_read = before + size


def mend(text: str) -> tuple[str, int]:
    """Return the text as valid UTF-8, and how many of its bytes were not. Raise ValueError that
    says why it cannot be mended."""
    mended = text.translate(WINDOWS_1252)
    num_bytes = sum(0xDC80 <= ord(character) <= 0xDCFF for character in text)
    try:
        mended.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no text
        raise ValueError("the text has a lone surrogate, which UTF-8 cannot hold") from None
    if num_bytes > MOST_MENDED * len(text):
        raise ValueError(
            f"not UTF-8: {num_bytes:,} bytes of {len(text):,} characters; convert it to UTF-8"
        )
    return mended, num_bytes


BOM, WHITE = codecs.BOM_UTF8, codecs.BOM_UTF8 + b" \t\r\n"  # some editors write a byte-order mark
Reader = Callable[[str, Reading, Report], Iterator[tuple[str, int, dict[str, Any]]]]


def is_json_lines(path: str) -> bool:
    """Return whether a file is read as JSON lines."""
    return _reader(path) is _read_json_lines


def _reader(path: str) -> Reader:
    """Return the function that yields (text, line, metadata) from this file."""
    kind = kind_by_name(path)
    if not kind:
        try:
            kind = _sniffed(path)
        except (OSError, DataError) as error:
            kind = f"not: unreadable: {error}"
    if kind in ("parquet", "arrow") and importlib.util.find_spec("pyarrow") is None:
        kind = f"not: {needs_library(path, 'pyarrow')}"
    if kind.startswith("not: "):
        return partial(_read_nothing, kind.removeprefix("not: "))
    return READERS[kind]


def _sniffed(path: str) -> str:
    """Return the kind of a file whose name does not tell. Many corpora call JSON lines .json, or
    part-00000, while a pretty-printed .json in a source tree is text like any other."""
    chunks = read_bytes(path, Report())
    head, first = next(chunks, b""), b""
    if head.lstrip(WHITE)[:1] == b"{":
        lines = lines_of(itertools.chain([head], chunks))
        first = next(line for line in lines if line.strip(WHITE))
    try:
        first_is_object = isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        first_is_object = False
    return kind_by_content(path, head, first_is_object)


def _read_nothing(
    why: str, path: str, reading: Reading, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Report the file as bad and yield nothing."""
    report.bad(path, 1, why)
    yield from ()


def _read_array(
    path: str, reading: Reading, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield from a JSON array of objects, each with a text."""
    parts: list[bytes] = []
    held, number = 0, 0
    try:
        for chunk in read_bytes(path, report):
            held += len(chunk)
            if held > LONGEST_ARRAY:
                report.bad(
                    path,
                    1,
                    f"a JSON array of more than {LONGEST_ARRAY:,} bytes; convert it to JSON lines",
                )
                return
            parts.append(chunk)
        values = orjson.loads(b"".join(parts).removeprefix(BOM))
    except (OSError, DataError, ValueError) as error:
        report.bad(path, 1, f"unreadable JSON array: {error}")
        return
    for number, value in enumerate(values, 1):
        try:
            record = _checked(value, reading)
        except ValueError as error:
            report.bad(path, number, error)
        else:
            yield record.pop(reading.json_key), number, record if reading.metadata else {}


def _read_json_lines(
    path: str, reading: Reading, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield from JSON lines. A damaged file costs only what follows the damage."""
    number = 0
    try:
        for number, line in enumerate(lines_of(read_bytes(path, report)), 1):
            if number == 1:
                line = line.removeprefix(BOM)
            if not line.strip():
                report.num_empty += 1
                continue
            if len(line) > LONGEST_LINE:
                report.bad(path, number, f"the line is longer than {LONGEST_LINE:,} bytes")
                continue
            try:
                record = record_of(line, reading)
            except ValueError as error:
                report.bad(path, number, error)
            else:
                text = record.pop(reading.json_key)
                yield text, number, record if reading.metadata else {}
    except (OSError, DataError) as error:
        report.bad(path, number + 1, f"unreadable from here on: {error}")


def record_of(line: bytes, reading: Reading) -> dict[str, Any]:
    """Parse one JSON line. Raise ValueError that says why it has no text."""
    try:
        record: Any = json.loads(
            line.decode("utf-8", "surrogateescape" if reading.mend else "strict")
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError:  # what else json raises
        raise ValueError("a number has more digits than Python reads") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    return _checked(record, reading)


def _checked(record: Any, reading: Reading) -> dict[str, Any]:
    """Return `record` if it is an object with a text under the key. Raise ValueError otherwise."""
    json_key = reading.json_key
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if json_key not in record:
        from megalite.data.formats import hint_of_format

        there = ", ".join(list(record)[:8])
        raise ValueError(f"no key {json_key!r}; keys here: {there}{hint_of_format(record)}")
    if not isinstance(record[json_key], str):
        raise ValueError(f"{json_key!r} is not text but {type(record[json_key]).__name__}")
    return record


def _read_parquet(
    path: str, reading: Reading, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield from a parquet file, 256 rows at a time."""
    from pyarrow import parquet

    def batches() -> Iterator[Any]:
        with open_file(path) as source, parquet.ParquetFile(source) as file:
            columns = _columns(file.schema_arrow.names, reading)
            size, num_rows, rows = source.seek(0, os.SEEK_END), max(file.metadata.num_rows, 1), 0
            before = report.bytes_read
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield batch
                rows += batch.num_rows
                report.bytes_read = before + size * rows // num_rows

    return _read_batches(path, batches(), reading, report)


def _read_arrow(
    path: str, reading: Reading, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield from an Arrow stream of record batches, as `save_to_disk` of the `datasets` library
    writes it."""
    import pyarrow

    def batches() -> Iterator[Any]:
        before = report.bytes_read
        with open_file(path) as file, pyarrow.ipc.open_stream(file) as stream:
            columns = _columns(stream.schema.names, reading)
            for batch in stream:
                report.bytes_read = before + file.tell()
                check_batch(batch)
                yield batch.select(columns)

    return _read_batches(path, batches(), reading, report)


def check_batch(batch: Any) -> None:
    """Refuse a batch of a damaged stream, whose offsets pyarrow would follow out of bounds. Raise
    ArrowException. Whether texts are UTF-8 is checked when they are read."""
    import pyarrow

    as_bytes = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    for column in batch.columns:
        column.validate()
        # Validated as bytes: a text that is not UTF-8 shall cost only its own row, not the batch.
        column = column.view(as_bytes[column.type]) if column.type in as_bytes else column
        column.validate(full=True)


def _columns(names: list[str], reading: Reading) -> list[str]:
    """Return the columns to read. Raise DataError if that of the text is missing."""
    if reading.json_key not in names:
        raise DataError(f"no column {reading.json_key!r}; columns here: {', '.join(names[:8])}")
    return names if reading.metadata else [reading.json_key]


def _read_batches(
    path: str, batches: Iterator[Any], reading: Reading, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield the rows of record batches. An unreadable batch ends the file with a message."""

    row, json_key = 0, reading.json_key
    try:
        for batch in batches:
            others = [(name, batch.column(name)) for name in batch.schema.names if name != json_key]
            for number, scalar in enumerate(batch.column(json_key)):
                row += 1
                try:
                    text = scalar.as_py()
                    metadata = {name: column[number].as_py() for name, column in others}
                except UnicodeDecodeError as error:
                    report.bad(path, row, f"not UTF-8: {error.reason} at byte {error.start}")
                    continue
                if isinstance(text, str):
                    yield text, row, metadata
                else:
                    report.bad(path, row, f"{json_key!r} is not text but {type(text).__name__}")
    except Exception as error:
        # pyarrow has classes of its own, and none for a damaged size that no memory suffices for.
        report.bad(path, row + 1, f"unreadable from this row on: {error}")


def _read_text(
    path: str, reading: Reading, report: Report
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield the file as one document. A file longer than LONGEST_TEXT gives several, cut at line
    ends, so that memory stays bounded."""
    chunks = read_bytes(path, report)
    # Incremental: a character may lie across two chunks.
    decoder = codecs.getincrementaldecoder("utf-8-sig")(
        "surrogateescape" if reading.mend else "strict"
    )
    parts: list[str] = []
    line, fed, held = 1, 0, 0  # lines given out, bytes decoded, and bytes of them that `parts` hold
    try:
        for chunk in chunks:
            if not fed and b"\0" in chunk[:8192]:  # git's test for a binary file
                report.num_binary += 1
                return
            fed, held = fed + len(chunk), held + len(chunk)
            parts.append(decoder.decode(chunk))
            # Joined once a document, not once a chunk, which would take quadratic time.
            if held >= LONGEST_TEXT:
                text = "".join(parts)
                cut = text.rfind("\n") + 1 or len(text)
                yield text[:cut], line, {}
                line += text.count("\n", 0, cut)
                parts, held = [text[cut:]], len(text) - cut
        yield "".join([*parts, decoder.decode(b"", final=True)]), line, {}
        if not kind_by_name(path):
            suffix = printable(suffix_of(path))
            report.as_text[suffix] = report.as_text.get(suffix, 0) + 1
    except UnicodeDecodeError as error:
        line += sum(part.count("\n") for part in parts) + error.object[: error.start].count(b"\n")
        report.bad(
            path, line, f"not UTF-8: {error.reason} at byte {fed - len(error.object) + error.start}"
        )
    except (OSError, DataError) as error:
        report.bad(path, 1, f"unreadable: {error}")


READERS: dict[str, Reader] = {
    "lines": _read_json_lines, "array": _read_array, "parquet": _read_parquet, "arrow": _read_arrow, "text": _read_text,
    "refused": partial(_read_nothing, f"a format that is not read; {KNOWN}"),
}  # fmt: skip


def lines_of(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield lines without their newline. A line is joined once, however many chunks it spans; of
    one longer than LONGEST_LINE only the beginning comes."""
    parts: list[bytes] = []
    held = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        if held <= LONGEST_LINE:
            parts.append(first)
            held += len(first)
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts, held = [rest[-1]], len(rest[-1])
    if last := b"".join(parts):
        yield last


def read_bytes(path: str, report: Report) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file. Raise OSError, and DataError if compressed data is
    damaged or truncated."""
    packed = _counted(_packed(path), report)
    if path.lower().endswith(".gz"):
        yield from _unpack(packed, lambda: zlib.decompressobj(wbits=31), zlib.error)
    elif path.lower().endswith(".zst"):
        import zstandard

        # The default refuses the long windows of `zstd --long` and --ultra.
        context = zstandard.ZstdDecompressor(max_window_size=2**31)
        yield from _unpack(packed, context.decompressobj, zstandard.ZstdError)
    else:
        yield from packed


def _packed(path: str) -> Iterator[bytes]:
    """Yield the bytes of a file or URL as stored, in small chunks."""
    if is_url(path):
        for data in stream(path):
            yield from (
                data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)
            )
        return
    with open(path, "rb") as file:
        yield from iter(lambda: file.read(CHUNK_BYTES), b"")


def _counted(chunks: Iterator[bytes], report: Report) -> Iterator[bytes]:
    """Yield the chunks and add their sizes to the report."""
    for chunk in chunks:
        report.bytes_read += len(chunk)
        yield chunk


def _unpack(
    packed: Iterator[bytes], new: Callable[[], Any], failure: type[Exception]
) -> Iterator[bytes]:
    """Decompress one frame after the other: a file may hold several, with zeros behind them.

    The libraries' own file objects accept a .zst that ends within a frame as complete; hence this
    loop. Raise DataError."""
    frame = None
    for chunk in packed:
        while chunk:
            if frame is None:
                chunk = chunk.lstrip(b"\0")
                if not chunk:
                    break
                frame = new()
            try:
                yield frame.decompress(chunk)
            except failure as error:
                raise DataError(f"damaged: {error}") from None
            chunk = b""
            if frame.eof:
                chunk, frame = frame.unused_data, None
    if frame is not None:
        raise DataError("truncated: the packed data ends too early")
