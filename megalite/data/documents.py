"""Documents out of files: JSON lines (plain, .gz, .zst), parquet, plain text, folders and globs of these.

Everything streams. What cannot be used is never fatal and never silent: a `Report` counts it, and keeps the first
messages as `file:line: why`."""

from __future__ import annotations

import codecs
import glob
import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megalite.data.errors import DataError
from megalite.data.store import Store, open_file, stream
from megalite.urls import is_url

# Of a compressed file this much is taken at a time: small, because deflate unpacks up to a thousandfold.
CHUNK_BYTES = 1 << 16
MAX_MESSAGES = 20
# Bytes of plain text that are one document. No document is as long; a whole crawl in one file may be.
LONGEST_TEXT = 16 << 20


class Document(NamedTuple):
    text: str
    num_bytes: int  # of the text in UTF-8


@dataclass
class Report:
    """What came of the inputs. `bytes_read` of `total_bytes` is the progress, in bytes as they lie on disk."""

    total_bytes: int = 0
    bytes_read: int = 0
    num_documents: int = 0
    num_empty: int = 0
    num_bad: int = 0
    num_hidden: int = 0
    num_binary: int = 0
    messages: list[str] = field(default_factory=list)

    def bad(self, path: str, line: int, why: object) -> None:
        self.num_bad += 1
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(f"{path}:{line}: {why}")

    def __str__(self) -> str:
        """Everything that was left out, a line each; empty when nothing was."""
        counts = {
            "bad lines or files": self.num_bad,
            "empty documents": self.num_empty,
            "hidden files or folders": self.num_hidden,
            "binary files": self.num_binary,
        }
        lines = [f"left out: {count:,} {what}" for what, count in counts.items() if count]
        more = self.num_bad - len(self.messages)
        return "\n".join([*lines, *self.messages, *([f"… and {more:,} more"] if more > 0 else [])])


def iter_documents(inputs: Sequence[str], json_key: str, report: Report) -> Iterator[Document]:
    """Stream the documents of `inputs` (files, folders, globs) in a fixed order, counting everything in `report`.

    Inputs are paths or URLs. A file is read once, even if two inputs name it. JSON lines hold a document under
    `json_key`, parquet in the column of that name; any other file that is UTF-8 is one document. Raises DataError,
    before anything is read, for an input that matches nothing or a format whose library is missing."""
    files = {path: size for item in inputs for path, size in _expand(item, report)}
    for suffix, package in {".zst": "zstandard", ".parquet": "pyarrow"}.items():
        if importlib.util.find_spec(package) is None and (path := next((p for p in files if p.endswith(suffix)), None)):
            raise DataError(f"{path}: reading {suffix} needs {package}; pip install 'megalite[data]'")
    report.total_bytes += sum(files.values())
    return _read_all(files, json_key, report)


def _expand(item: str, report: Report) -> list[tuple[str, int]]:
    """The files one input stands for and their sizes, sorted. Raises DataError when there are none."""
    files = _find(item, report) if is_url(item) else _match(item, report)
    if not files:
        raise DataError(f"input {item!r} matches no file; give existing files, folders or a quoted glob")
    return files


def _match(item: str, report: Report) -> list[tuple[str, int]]:
    matches = [item] if os.path.exists(item) else sorted(glob.glob(item, recursive=True))
    files = [path for match in matches for path in (_walk(match, report) if os.path.isdir(match) else [match])]
    return [(path, os.stat(path).st_size) for path in files if os.path.isfile(path)]


def _find(url: str, report: Report) -> list[tuple[str, int]]:
    found = Store(url).find()
    visible = [item for item in found if not any(part.startswith(".") for part in item.below.split("/"))]
    report.num_hidden += len(found) - len(visible)
    return [(item.url, item.size) for item in visible]


def _walk(folder: str, report: Report) -> Iterator[str]:
    for root, folders, names in os.walk(folder):
        visible = [name for name in names if not name.startswith(".")]
        entered = sorted(name for name in folders if not name.startswith("."))
        report.num_hidden += len(names) - len(visible) + len(folders) - len(entered)
        folders[:] = entered  # os.walk goes on with what is left here, in this order
        yield from (os.path.join(root, name) for name in sorted(visible))


def _read_all(files: Mapping[str, int], json_key: str, report: Report) -> Iterator[Document]:
    for path, size in files.items():
        before = report.bytes_read
        for text, line in _reader(path)(path, json_key, report):
            try:
                num_bytes = len(text.encode())
            except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no text
                report.bad(path, line, "the text has a lone surrogate, which UTF-8 cannot hold")
                continue
            if num_bytes:
                report.num_documents += 1
                yield Document(text, num_bytes)
            else:
                report.num_empty += 1
        report.bytes_read = before + size


Reader = Callable[[str, str, Report], Iterator[tuple[str, int]]]


def _reader(path: str) -> Reader:
    """What reads (text, line number) pairs out of this file, by its name and, for .json alone, by its first line."""
    name = path.removesuffix(".gz").removesuffix(".zst")
    if path.endswith(".parquet"):
        return _read_parquet
    if name.endswith((".jsonl", ".ndjson")) or (name.endswith(".json") and _first_line_is_object(path)):
        return _read_json_lines
    return _read_text


def _first_line_is_object(path: str) -> bool:
    """Many corpora call JSON lines .json; a pretty-printed .json in a source tree is a text like any other."""
    try:
        return isinstance(json.loads(next(_lines(_chunks(path, Report())), b"")), dict)
    except (ValueError, RecursionError, OSError):
        return False


def _read_json_lines(path: str, json_key: str, report: Report) -> Iterator[tuple[str, int]]:
    number = 0
    try:
        for number, line in enumerate(_lines(_chunks(path, report)), 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark some editors write
            if not line.strip():
                report.num_empty += 1
                continue
            try:
                text = _text_of(line, json_key)
            except ValueError as error:
                report.bad(path, number, error)
            else:
                yield text, number
    except (OSError, DataError) as error:
        report.bad(path, number + 1, f"unreadable from here on: {error}")


def _text_of(line: bytes, json_key: str) -> str:
    """Raises ValueError that says why the line has no text."""
    try:
        record: Any = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if json_key not in record:
        raise ValueError(f"no key {json_key!r}; keys here: {', '.join(list(record)[:8])}")
    if not isinstance(record[json_key], str):
        raise ValueError(f"{json_key!r} is not text but {type(record[json_key]).__name__}")
    return record[json_key]


def _read_parquet(path: str, json_key: str, report: Report) -> Iterator[tuple[str, int]]:
    import pyarrow
    from pyarrow import parquet

    before, row = report.bytes_read, 0
    try:
        with open_file(path) as source, parquet.ParquetFile(source) as file:
            size = source.seek(0, os.SEEK_END)
            if json_key not in file.schema_arrow.names:
                raise DataError(f"no column {json_key!r}; columns here: {', '.join(file.schema_arrow.names[:8])}")
            for batch in file.iter_batches(batch_size=256, columns=[json_key]):
                for scalar in batch.column(0):
                    row += 1
                    try:
                        text = scalar.as_py()
                    except UnicodeDecodeError as error:
                        report.bad(path, row, f"not UTF-8: {error.reason} at byte {error.start}")
                        continue
                    if isinstance(text, str):
                        yield text, row
                    else:
                        report.bad(path, row, f"{json_key!r} is not text but {type(text).__name__}")
                report.bytes_read = before + size * row // file.metadata.num_rows
    except (OSError, DataError, pyarrow.ArrowException) as error:
        report.bad(path, row + 1, f"unreadable from this row on: {error}")


def _read_text(path: str, json_key: str, report: Report) -> Iterator[tuple[str, int]]:
    """One document; of a file longer than LONGEST_TEXT several, cut at line ends, so that memory stays bounded."""
    chunks, decoder = _chunks(path, report), codecs.getincrementaldecoder("utf-8-sig")()
    parts: list[str] = []
    line, fed, held = 1, 0, 0  # lines given out, bytes decoded, and bytes of them that `parts` hold
    try:
        for chunk in chunks:
            if not fed and b"\0" in chunk[:8192]:  # git's test for a binary file
                report.num_binary += 1
                return
            fed, held = fed + len(chunk), held + len(chunk)
            parts.append(decoder.decode(chunk))
            if held >= LONGEST_TEXT:
                text = "".join(parts)
                cut = text.rfind("\n") + 1 or len(text)
                yield text[:cut], line
                line += text.count("\n", 0, cut)
                parts, held = [text[cut:]], len(text) - cut
        yield "".join([*parts, decoder.decode(b"", final=True)]), line
    except UnicodeDecodeError as error:
        line += sum(part.count("\n") for part in parts) + error.object[: error.start].count(b"\n")
        report.bad(path, line, f"not UTF-8: {error.reason} at byte {fed - len(error.object) + error.start}")
    except (OSError, DataError) as error:
        report.bad(path, 1, f"unreadable: {error}")


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline. A line is joined once, however many chunks it spans."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        if rest:
            yield b"".join(parts)
            yield from rest[:-1]
            parts = [rest[-1]]
    if last := b"".join(parts):
        yield last


def _chunks(path: str, report: Report) -> Iterator[bytes]:
    """The unpacked bytes of a file. Raises OSError, and DataError where packed data is damaged or ends too early."""
    packed = _counted(_packed(path), report)
    if path.endswith(".gz"):
        yield from _unpack(packed, lambda: zlib.decompressobj(wbits=31), zlib.error)
    elif path.endswith(".zst"):
        import zstandard

        # The default refuses the long windows of `zstd --long` and --ultra.
        context = zstandard.ZstdDecompressor(max_window_size=2**31)
        yield from _unpack(packed, context.decompressobj, zstandard.ZstdError)
    else:
        yield from packed


def _packed(path: str) -> Iterator[bytes]:
    if is_url(path):
        for data in stream(path):
            yield from (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))
        return
    with open(path, "rb") as file:
        yield from iter(lambda: file.read(CHUNK_BYTES), b"")


def _counted(chunks: Iterator[bytes], report: Report) -> Iterator[bytes]:
    for chunk in chunks:
        report.bytes_read += len(chunk)
        yield chunk


def _unpack(packed: Iterator[bytes], new: Callable[[], Any], failure: type[Exception]) -> Iterator[bytes]:
    """Unpack one frame after the other: several may be joined in one file, with zeros behind them.

    The libraries' own file objects take a .zst which ends within a frame for complete; hence this loop."""
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
