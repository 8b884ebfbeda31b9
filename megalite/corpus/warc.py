"""Reads pages from WARC files and texts from WET files.

Responses with status 2xx and a text type are documents. Everything else is counted by name: errors,
redirects, revisits, other types.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from megalite.corpus.charsets import decode
from megalite.data.documents import LONGEST_LINE, Document, read_bytes
from megalite.data.inputs import Report
from megalite.errors import DataError

SUFFIXES = (".warc", ".warc.gz", ".warc.zst", ".wet", ".wet.gz")
HTML = ("text/html", "application/xhtml+xml")
OTHER_TYPES = "records of another type than text"
LONGEST_PAGE = LONGEST_LINE
"""Largest number of a page's bytes, packed and unpacked. A longer page is left out."""
# Eight digits at most: more are a text that looks like a size, and a number beyond any page.
CHUNK_SIZE = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
LOOKS_LIKE_HTML = re.compile(
    # Possessive: given back, comments could be told apart in 2^n ways, and a page of 40 would be
    # tried for days.
    rb"\s*(?:<!--.*?-->\s*)*+<(?:!doctype\s+html|html|head|body)\b",
    re.I | re.S,
)


def read_warc(path: str, report: Report) -> Iterator[Document]:
    """Yield the pages of a WARC file as HTML, or the texts of a WET file. `report` counts other
    records and damage."""
    from warcio.archiveiterator import ArchiveIterator

    number = 1  # of the record that is read, also where reading it fails before there is one
    # Unpacked here, because warcio takes a truncated packed file for complete.
    stream = _Stream(read_bytes(path, report))
    try:
        for record in ArchiveIterator(io.BufferedReader(stream)):
            if reason := _no_document(record):
                report.leave_out(reason)
            # "conversion": the text of a page, in WET files.
            elif record.rec_type in ("response", "conversion"):
                yield from _document_of(record, path, number, report)
            number += 1
        if stream.failure:
            raise stream.failure
    except Exception as error:
        # warcio raises several classes for damage, and those of its parsers as well.
        report.bad(path, number, f"unreadable from this record on: {stream.failure or error}")


def _no_document(record: Any) -> str:
    """Return why a record that looks like a document is not one, or an empty string if it may be
    one."""
    if record.rec_type == "revisit":
        return "revisits: the page was seen before"
    if record.rec_type != "response" or record.http_headers is None:
        return ""
    status = record.http_headers.get_statuscode()[:1]
    reasons = {
        "2": "",
        "3": "redirects (HTTP 3xx)",
        "4": "error pages (HTTP 4xx)",
        "5": "error pages (HTTP 5xx)",
    }
    return reasons.get(status, "responses without a status of success")


def _document_of(record: Any, path: str, number: int, report: Report) -> Iterator[Document]:
    """Yield the document of a record, or count in `report` why it has none. Raises DataError if it
    is truncated."""
    http = record.http_headers or record.rec_headers
    header = http.get_header("Content-Type") or ""
    # The crawler looked at the content; servers often lie.
    identified = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    content_type = (identified or header).partition(";")[0].strip().lower()
    if content_type and content_type not in (*HTML, "text/plain"):
        report.leave_out(OTHER_TYPES)
        return
    # Not warcio's content_stream, which unpacks a bomb into any amount of memory, and believes
    # headers that crawlers have left as they were.
    body = record.raw_stream.read(LONGEST_PAGE + 1)
    if len(body) > LONGEST_PAGE:
        report.bad(path, number, f"the page is longer than {LONGEST_PAGE:,} bytes")
        return
    # So many bytes the header promised beyond what came.
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
    if not content_type:  # nobody has said what it is
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
    if "\0" in decoded.text[:8192]:  # binary, whatever its type says
        report.leave_out(OTHER_TYPES)
        return
    named = {"id": "WARC-Record-ID", "url": "WARC-Target-URI", "date": "WARC-Date"}
    metadata = {key: record.rec_headers.get_header(name) for key, name in named.items()}
    metadata |= {"content_type": content_type, "charset": decoded.codec}
    report.num_documents += 1
    num_bytes = len(decoded.text.encode("utf-8", "replace"))
    yield Document(decoded.text, num_bytes, path, number, metadata)


def unpacked(body: bytes, http: Any) -> tuple[bytes, bool]:
    """Undo the transfer and content encodings of a response. Returns its body, and whether its end
    is missing.

    Crawlers often store the body unpacked and leave the headers `http` as they were, so each
    encoding is undone only where the bytes show it. Raises DataError for a compression that cannot
    be read."""
    is_cut = False
    transfer = http.get_header("Transfer-Encoding") or ""
    if "chunked" in transfer.lower():
        body, is_cut = _without_chunks(body)
    content = http.get_header("Content-Encoding") or ""
    codings = [word.strip().lower() for word in content.split(",")]
    # The server applied them in this order.
    for coding in reversed(codings):
        if coding not in ("", "identity", "none"):
            body, shortened = _without_coding(body, coding)
            is_cut |= shortened
    return body, is_cut


def _without_chunks(body: bytes) -> tuple[bytes, bool]:
    """Join the chunks of a body, or return it as it is if it does not begin with a chunk's size."""
    parts: list[bytes] = []
    position = 0
    # HTTP/1.1: a size in hexadecimal, a line break, so many bytes, a line break; size 0 ends it.
    while head := CHUNK_SIZE.match(body, position):
        size = int(head[1], 16)
        start = head.end()
        if size == 0:
            return b"".join(parts), False
        parts.append(body[start : start + size])
        position = start + size
        if position > len(body):
            return b"".join(parts), True
        # A line break ends the chunk; the size of the next one follows.
        position += 2 if body.startswith(b"\r\n", position) else body.startswith(b"\n", position)
    return (b"".join(parts), True) if parts else (body, False)


def _without_coding(body: bytes, coding: str) -> tuple[bytes, bool]:
    """Undo one content encoding, where the bytes show it. Returns the body, and whether its end is
    missing."""
    if coding in ("gzip", "x-gzip"):
        return _inflated(body, 31) if body.startswith(b"\x1f\x8b") else (body, False)
    if coding == "deflate":
        if LOOKS_LIKE_HTML.match(body):
            return body, False
        # The standard asks for zlib's header; many servers leave it out. It has method 8 in its low
        # bits, and is a multiple of 31 as a number of two bytes (RFC 1950).
        is_deflate = len(body) > 1 and body[0] & 15 == 8
        has_header = is_deflate and int.from_bytes(body[:2]) % 31 == 0
        return _inflated(body, 15 if has_header else -15)
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
    """Unpack zlib's or gzip's format (`wbits` as in zlib). Returns the body, and whether its end is
    missing.

    Several members of gzip may follow one another; bytes after the last one are ignored. Raises
    DataError for damage at the very beginning, and for a page that grows too long."""
    parts: list[bytes] = []
    room = LONGEST_PAGE
    # At most one byte more than fits is unpacked: enough to know that the page is too long.
    while body and (not parts or body.startswith(b"\x1f\x8b")):
        unpacker = zlib.decompressobj(wbits)
        try:
            parts.append(unpacker.decompress(body, room + 1))
        except zlib.error as error:
            if not parts:
                return _fed_slowly(body, wbits, error)
            return b"".join(parts), True
        room -= len(parts[-1])
        if room < 0:  # a small packed page may unpack to gigabytes
            raise DataError(f"the page is longer than {LONGEST_PAGE:,} bytes when it is unpacked")
        if not unpacker.eof:
            return b"".join(parts), True
        body = unpacker.unused_data
    return b"".join(parts), False


def _fed_slowly(body: bytes, wbits: int, error: zlib.error) -> tuple[bytes, bool]:
    """Unpack what stands before the damage. Raises DataError if that is nothing."""
    unpacker = zlib.decompressobj(wbits)
    found, _ = _fed(body, unpacker.decompress, lambda: unpacker.eof, zlib.error)
    if not found:
        raise DataError(f"the page's compression is damaged: {error}")
    return found, True


def _without_brotli(body: bytes) -> tuple[bytes, bool]:
    """Unpack brotli, which has no mark to recognize it by. Raises DataError where the package is
    missing."""
    try:
        import brotli
    except ImportError:
        if LOOKS_LIKE_HTML.match(body):
            return body, False
        raise DataError(
            "the page is packed by brotli; pip install 'megalite[corpus]' to read such pages"
        ) from None
    unpacker = brotli.Decompressor()
    found, is_cut = _fed(body, unpacker.process, unpacker.is_finished, brotli.error)
    if not found and LOOKS_LIKE_HTML.match(body):  # stored unpacked
        return body, False
    return found, is_cut


def _fed(
    body: bytes,
    unpack: Callable[[bytes], bytes],
    is_done: Callable[[], bool],
    failure: type[Exception],
) -> tuple[bytes, bool]:
    """Unpack a little at a time, so that damage costs no more than that, and a bomb is noticed
    early.

    `unpack` raises `failure` on damage; `is_done` tells the end of the data. Returns the body, and
    whether its end is missing."""
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
    """Presents chunks of bytes as a file.

    It ends where the chunks fail, and `failure` holds why: what came before is not lost."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
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
        buffer[:taken] = self._rest[:taken]
        self._rest = self._rest[taken:]
        return taken
