"""Read documents from files: JSON lines (plain, .gz, .zst), JSON arrays, parquet, Arrow, plain
text, and folders and globs of these. `kinds.py` tells which file is what.

Everything streams. Unusable input is never fatal and never silent: a `Report` counts it, and keeps
the first messages as `file:line: why`."""

from __future__ import annotations

import codecs
import glob
import importlib.util
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import orjson

from megalite.data.kinds import KNOWN, kind_by_content, kind_by_name, suffix_of
from megalite.data.store import Store, open_file, size_of, stream
from megalite.errors import DataError
from megalite.utils.spelling import instead_of
from megalite.utils.urls import is_url

# Bytes of a compressed file that are read at a time: few, because deflate may expand a
# thousandfold.
CHUNK_BYTES = 1 << 16
MAX_MESSAGES = 20
# Most bytes of plain text in one document. No real document is as long, but a file may be a whole
# crawl.
LONGEST_TEXT = 8 << 20
# Most bytes of a JSON line; a longer one is left out.
LONGEST_LINE = 64 << 20
# Most bytes of a JSON array, which is read as a whole.
LONGEST_ARRAY = 256 << 20
# Files that the `datasets` library (`save_to_disk`) and hub snapshots keep beside the data.
HF_COMPANIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
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


@dataclass
class Report:
    """Counts what became of the inputs. `bytes_read` of `total_bytes` is the progress, in bytes on
    disk."""

    total_bytes: int = 0
    bytes_read: int = 0
    num_documents: int = 0
    num_empty: int = 0
    num_bad: int = 0
    num_mended: int = 0
    num_hidden: int = 0
    num_binary: int = 0
    # What else is no document, by what it is.
    left_out: dict[str, int] = field(default_factory=dict)
    # Files whose name did not say so, by its suffix.
    as_text: dict[str, int] = field(default_factory=dict)
    num_repeated: int = 0
    messages: list[str] = field(default_factory=list)

    def leave_out(self, what: str) -> None:
        """Count one item that is no document, by what it is."""
        self.left_out[what] = self.left_out.get(what, 0) + 1

    def bad(self, path: str, line: int, why: object) -> None:
        """Count one unusable line or file, and keep the message if it is among the first."""
        self.num_bad += 1
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(printable(f"{path}:{line}: {why}"))

    def bad_folder(self, error: OSError) -> None:
        """Count a folder that cannot be read, which os.walk would pass over in silence."""
        self.bad(str(error.filename), 1, f"unreadable folder: {error.strerror}")

    def __str__(self) -> str:
        """Return everything that was left out, one line each; empty if nothing was."""
        counts = {
            "bad lines or files": self.num_bad,
            "empty documents": self.num_empty,
            "hidden files or folders": self.num_hidden,
            "binary files": self.num_binary,
            **self.left_out,
            "more names of files that are taken already": self.num_repeated,
        }
        lines = [f"left out: {count:,} {what}" for what, count in counts.items() if count]
        if self.num_mended:
            lines.append(f"mended: {self.num_mended:,} documents that were not all UTF-8")
        if self.as_text:
            named = (
                f"{count:,} {suffix or 'without a suffix'}"
                for suffix, count in self.as_text.items()
            )
            lines.append(f"read as plain text, a document each: files {', '.join(named)}")
        lines += _grouped(self.messages)
        if (more := self.num_bad - len(self.messages)) > 0:
            lines.append(f"… and {more:,} more")
        return "\n".join(lines)


def printable(text: str) -> str:
    """Return a text as a console takes it. A byte of a file's name that is not UTF-8, which is a
    lone surrogate in Python, is written as an escape."""
    return text.encode(errors="backslashreplace").decode()


def _grouped(messages: Sequence[str]) -> list[str]:
    """Return the messages `file:line: why`, one for each reason, with how many more there are."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for message in messages:
        place, why = re.fullmatch(r"(.*?:\d+): (.*)", message, re.S).groups()  # type: ignore[union-attr]
        first.setdefault(why, place)
        counts[why] += 1
    return [
        f"{place}{f' and {counts[why] - 1} more' * (counts[why] > 1)}: {why}"
        for why, place in first.items()
    ]


def iter_documents(inputs: Sequence[str], json_key: str, report: Report) -> Iterator[Document]:
    """Yield the documents of `inputs` (files, folders, globs) in a fixed order, and count
    everything in `report`.

    JSON lines hold a document under `json_key`, parquet and Arrow in the column of that name; any
    other UTF-8 file is one document. Raise DataError, before anything is read, for an input that
    matches nothing or a format whose library is missing."""
    return read_files(list_documents(inputs, report), Reading(json_key), report)


def list_documents(
    inputs: Sequence[str], report: Report, also: tuple[str, ...] = ()
) -> dict[str, int]:
    """Return the files of `inputs` that hold documents, with their sizes, as `list_files` does;
    `also` are suffixes that the caller reads itself. Other files are counted in `report`. Raise
    DataError for one that is named explicitly, and if no file is left."""
    files = list_files(inputs, report)
    refused = ""
    for path in list(files):
        if os.path.basename(path) in HF_COMPANIONS:
            report.num_hidden += 1
        elif kind_by_name(path) != "refused" or path.lower().endswith(also):
            continue
        else:
            refused = f"files of the format {suffix_of(path)} are not read; {KNOWN}"
            if path in inputs:
                raise DataError(f"{path}: {refused}")
            report.bad(path, 1, refused)
        del files[path]
    if not files:
        raise DataError(
            f"{', '.join(inputs)}: no file of documents{f': {refused}' if refused else ''}"
        )
    return files


def list_files(inputs: Sequence[str], report: Report) -> dict[str, int]:
    """Return the files, with sizes in bytes, that `inputs` (files, folders, globs; paths or URLs)
    match, in a fixed order. Each file comes once, whatever links and spellings lead to it. `~` is
    the home directory. Raise DataError if an input matches nothing."""
    found: dict[str, int] = {}
    for item in inputs:
        found |= _expand(item, report)
    taken: dict[str, str] = {}
    # Prefer a file's own name to that of a link.
    # False sorts before True: real names come first, and setdefault keeps the first.
    for path in sorted(
        found, key=lambda path: is_url(path) or os.path.realpath(path) != os.path.abspath(path)
    ):
        taken.setdefault(path if is_url(path) else os.path.realpath(path), path)
    report.num_repeated += len(found) - len(taken)
    kept = set(taken.values())
    return {path: size for path, size in found.items() if path in kept}


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


def _expand(item: str, report: Report) -> list[tuple[str, int]]:
    """Return the files that one input matches, with sizes, sorted. Raise DataError if there are
    none."""
    files = _find(item, report) if is_url(item) else _match(item, report)
    if not files and not is_url(item) and os.path.exists(item) and not os.path.isdir(item):
        raise DataError(
            f"input {item!r} is a pipe or a device, which cannot be read more than once; write it to a file first"
        )
    if not files:
        raise DataError(
            f"input {item!r} matches no file; give existing files, folders or a quoted glob"
            f"{instead_of(item)}"
        )
    return files


def _match(item: str, report: Report) -> list[tuple[str, int]]:
    """Return the local files that a path, folder or glob matches, with sizes."""
    if not os.path.exists(item):
        item = os.path.expanduser(item)
    # A file may have brackets in its name: what exists is no pattern.
    matches = [item] if os.path.exists(item) else sorted(set(_glob(item, report)))
    files: list[str] = []
    for match in matches:
        files += _walk(match, report) if os.path.isdir(match) else [match]
    return [(path, os.stat(path).st_size) for path in files if os.path.isfile(path)]


def _glob(pattern: str, report: Report) -> Iterator[str]:
    """Yield the paths that match a glob. `**` is any folder below, as in Python's glob, but links
    that lead back are not followed. Folders that cannot be read are counted in `report`."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index("**")
    tops = glob.glob("/".join([*parts[:place], ""])) if place else ["."]
    if place == len(parts) - 1:  # all below, as a folder stands for
        yield from tops
        return
    for top in tops:
        for folder in _folders(top, report):
            below = os.path.join(glob.escape(folder), *parts[place + 1 :])
            yield from _glob(below if place else below.removeprefix("./"), report)


def _folders(top: str, report: Report) -> Iterator[str]:
    """Yield a folder and all visible ones below it, also behind links, each once."""
    entered: set[str] = set()
    for root, folders, _ in os.walk(top, followlinks=True, onerror=report.bad_folder):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield root


def _find(url: str, report: Report) -> list[tuple[str, int]]:
    """Return the visible objects that a URL matches, with sizes."""
    found = Store(url).find()
    visible = [
        item for item in found if not any(part.startswith(".") for part in item.below.split("/"))
    ]
    report.num_hidden += len(found) - len(visible)
    return [(item.url, item.size) for item in visible]


def _walk(folder: str, report: Report) -> Iterator[str]:
    """Yield the visible files below `folder`, sorted, and count the hidden ones."""
    for root, folders, names in os.walk(folder, onerror=report.bad_folder):
        visible = [name for name in names if not name.startswith(".")]
        entered = sorted(name for name in folders if not name.startswith("."))
        report.num_hidden += len(names) - len(visible) + len(folders) - len(entered)
        folders[:] = entered  # os.walk goes on with what is left here, in this order
        yield from (os.path.join(root, name) for name in sorted(visible))


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
