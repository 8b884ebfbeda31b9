"""Pages out of WARC files, and texts out of WET files.

Responses with status 2xx and a type of text are documents. What is none is counted by name: errors, redirects,
revisits, other types."""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from megalite.corpus.charsets import decode
from megalite.data.documents import LONGEST_LINE, Document, Report, read_bytes
from megalite.errors import DataError

SUFFIXES = (".warc", ".warc.gz", ".warc.zst", ".wet", ".wet.gz")
HTML = ("text/html", "application/xhtml+xml")
OTHER_TYPES = "records of another type than text"
LONGEST_PAGE = LONGEST_LINE
"""Bytes, as they came and unpacked. A longer one is left out."""
CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
LOOKS_LIKE_HTML = re.compile(rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S)


def read_warc(path: str, report: Report) -> Iterator[Document]:
    """Stream the pages of a WARC file as HTML, and the texts of a WET file. What is no document, or damaged, is counted
    in `report`."""
    from warcio.archiveiterator import ArchiveIterator

    before, size, number = report.bytes_read, os.stat(path).st_size, 0
    # Unpacked here, since warcio takes a packed file that ends too early for complete.
    stream = _Stream(read_bytes(path, report))
    try:
        for number, record in enumerate(ArchiveIterator(io.BufferedReader(stream)), 1):
            if reason := _no_document(record):
                report.leave_out(reason)
            elif record.rec_type in ("response", "conversion"):
                yield from _document_of(record, path, number, report)
        if stream.failure:
            raise stream.failure
    except Exception as error:  # warcio has several classes for what is damaged, and lets through those of its parsers
        report.bad(path, number, f"unreadable from this record on: {stream.failure or error}")
    report.bytes_read = before + size


def _no_document(record: Any) -> str:
    """Why a record is none, although it may look like one."""
    if record.rec_type == "revisit":
        return "revisits: the page was seen before"
    if record.rec_type != "response" or record.http_headers is None:
        return ""
    status = record.http_headers.get_statuscode()[:1]
    return {"2": "", "3": "redirects (HTTP 3xx)", "4": "error pages (HTTP 4xx)", "5": "error pages (HTTP 5xx)"}.get(
        status, "responses without a status of success"
    )


def _document_of(record: Any, path: str, number: int, report: Report) -> Iterator[Document]:
    http = record.http_headers or record.rec_headers
    header = http.get_header("Content-Type") or ""
    identified = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    content_type = (identified or header).partition(";")[0].strip().lower()
    if content_type and content_type not in (*HTML, "text/plain"):
        report.leave_out(OTHER_TYPES)
        return
    body = record.raw_stream.read(LONGEST_PAGE + 1)
    if len(body) > LONGEST_PAGE:
        report.bad(path, number, f"the page is longer than {LONGEST_PAGE:,} bytes")
        return
    if record.raw_stream.limit:
        raise DataError(f"truncated: the record lacks {record.raw_stream.limit:,} bytes")
    is_cut = record.rec_headers.get_header("WARC-Truncated") is not None
    try:
        if record.http_headers is not None:
            body, shortened = unpacked(body, http)
            is_cut |= shortened
    except DataError as error:
        report.bad(path, number, error)
        return
    if not content_type:
        if not LOOKS_LIKE_HTML.match(body):
            report.leave_out(OTHER_TYPES)
            return
        content_type = HTML[0]
    decoded = decode(body, header, content_type in HTML, is_cut)
    if not decoded.text:
        if is_cut:
            report.bad(path, number, "the page is damaged from its first byte on")
        report.num_empty += not is_cut
        return
    if "\0" in decoded.text[:8192]:  # whatever its type says
        report.leave_out(OTHER_TYPES)
        return
    named = {"id": "WARC-Record-ID", "url": "WARC-Target-URI", "date": "WARC-Date"}
    metadata = {key: record.rec_headers.get_header(name) for key, name in named.items()}
    metadata |= {"content_type": content_type, "charset": decoded.codec}
    report.num_documents += 1
    yield Document(decoded.text, len(decoded.text.encode("utf-8", "replace")), path, number, metadata)


def unpacked(body: bytes, http: Any) -> tuple[bytes, bool]:
    """Return a response's body without chunks and compression, and whether its end is missing. Crawlers often store it
    unpacked and leave the headers as they were. Raises DataError for a compression that cannot be read."""
    is_cut = False
    if "chunked" in (http.get_header("Transfer-Encoding") or "").lower():
        body, is_cut = _without_chunks(body)
    codings = [word.strip().lower() for word in (http.get_header("Content-Encoding") or "").split(",")]
    for coding in reversed([word for word in codings if word not in ("", "identity", "none")]):
        body, shortened = _without_coding(body, coding)
        is_cut |= shortened
    return body, is_cut


def _without_chunks(body: bytes) -> tuple[bytes, bool]:
    """As it is, where its first line is no chunk's."""
    parts: list[bytes] = []
    position = 0
    while head := CHUNK_SIZE.match(body, position):
        size, start = int(head[1], 16), head.end()
        if size == 0:
            return b"".join(parts), False
        parts.append(body[start : start + size])
        position = start + size
        if position > len(body):
            return b"".join(parts), True
        # A chunk ends with a line's end; the next one's size follows.
        position += 2 if body.startswith(b"\r\n", position) else body.startswith(b"\n", position)
    return (b"".join(parts), True) if parts else (body, False)


def _without_coding(body: bytes, coding: str) -> tuple[bytes, bool]:
    if coding in ("gzip", "x-gzip"):
        return _inflated(body, 31) if body.startswith(b"\x1f\x8b") else (body, False)
    if coding == "deflate":  # as the standard says or, as many servers do it, without zlib's header
        has_header = len(body) > 1 and body[0] & 15 == 8 and int.from_bytes(body[:2]) % 31 == 0
        return _inflated(body, 15 if has_header else -15) if not LOOKS_LIKE_HTML.match(body) else (body, False)
    if coding == "zstd":
        import zstandard

        if not body.startswith(b"\x28\xb5\x2f\xfd"):
            return body, False
        unpacker = zstandard.ZstdDecompressor().decompressobj()
        return _fed(body, unpacker.decompress, lambda: unpacker.eof, zstandard.ZstdError)
    if coding == "br":
        return _without_brotli(body)
    raise DataError(f"the page is packed as {coding!r:.40}, which is not known")


def _inflated(body: bytes, wbits: int) -> tuple[bytes, bool]:
    """Members of gzip may follow each other; what follows the last one, if it is none, is nothing."""
    parts: list[bytes] = []
    room = LONGEST_PAGE
    while body and (not parts or body.startswith(b"\x1f\x8b")):
        unpacker = zlib.decompressobj(wbits)
        try:
            parts.append(unpacker.decompress(body, room + 1))
        except zlib.error as error:
            if not parts:
                return _fed_slowly(body, wbits, error)
            return b"".join(parts), True
        room -= len(parts[-1])
        if room < 0:
            raise DataError(f"the page is longer than {LONGEST_PAGE:,} bytes when it is unpacked")
        if not unpacker.eof:
            return b"".join(parts), True
        body = unpacker.unused_data
    return b"".join(parts), False


def _fed_slowly(body: bytes, wbits: int, error: zlib.error) -> tuple[bytes, bool]:
    """What can be unpacked before the damage. Raises DataError where that is nothing."""
    unpacker = zlib.decompressobj(wbits)
    found, _ = _fed(body, unpacker.decompress, lambda: unpacker.eof, zlib.error)
    if not found:
        raise DataError(f"the page's compression is damaged: {error}")
    return found, True


def _without_brotli(body: bytes) -> tuple[bytes, bool]:
    try:
        import brotli
    except ImportError:
        if LOOKS_LIKE_HTML.match(body):
            return body, False
        raise DataError("the page is packed by brotli; pip install 'megalite[corpus]' to read such pages") from None
    unpacker = brotli.Decompressor()
    found, is_cut = _fed(body, unpacker.process, unpacker.is_finished, brotli.error)
    return (found, is_cut) if found or not LOOKS_LIKE_HTML.match(body) else (body, False)


def _fed(
    body: bytes, unpack: Callable[[bytes], bytes], is_done: Callable[[], bool], failure: type[Exception]
) -> tuple[bytes, bool]:
    """Unpack a little at a time, so that neither damage nor a small page of a large one costs more than that."""
    parts: list[bytes] = []
    held = 0
    for start in range(0, len(body), 256):
        try:
            parts.append(unpack(body[start : start + 256]))
        except failure:
            break
        held += len(parts[-1])
        if held > LONGEST_PAGE:
            raise DataError(f"the page is longer than {LONGEST_PAGE:,} bytes when it is unpacked")
        if is_done():
            return b"".join(parts), False
    return b"".join(parts), True


class _Stream(io.RawIOBase):
    """Chunks of bytes as a file. It ends where they fail, and remembers why: what came before is not lost."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")
        self.failure: DataError | OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._rest:
                self._rest = memoryview(next(self._chunks))
        except StopIteration:
            return 0
        except (DataError, OSError) as error:
            self.failure = error
            return 0
        taken = min(len(buffer), len(self._rest))
        buffer[:taken], self._rest = self._rest[:taken], self._rest[taken:]
        return taken
