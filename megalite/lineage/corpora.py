"""Blank the lines of a corpus that documents were made of. A line becomes as many spaces, which is an
empty document to whatever reads it: all other lines keep their numbers and their bytes."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megalite.data.documents import Report, is_json_lines, read_bytes
from megalite.data.indexed import IndexedDataset
from megalite.data.kinds import is_packed
from megalite.data.origins import Origin, Origins
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.lineage.texts import read_record, spelled_from
from megalite.utils.files import replacing
from megalite.utils.urls import is_url

Lines = dict[str, list[Origin]]
"""Lines to blank, by their file."""


def add_lines(
    lines: Lines,
    dataset: IndexedDataset,
    origins: Origins | None,
    documents: Sequence[int],
    tokenizer: Tokenizer | None,
) -> None:
    """Add to `lines` those that `documents` of a token file were made of. Raise DataError for one
    that is not known, not of JSON lines, or not there any more: nothing else must be blanked in its
    place."""
    for document in documents:
        if origins is None:
            raise DataError(f"there is no {dataset.prefix}.src, which says what to blank")
        origin = origins.of(document)
        if why := _why_not(dataset, document, origin, origins, tokenizer):
            raise DataError(f"{origin.path}:{origin.line} cannot be blanked: {why}")
        # A line may be several documents, of one token file or of two.
        if origin not in lines.setdefault(origin.path, []):
            lines[origin.path].append(origin)


def _why_not(
    dataset: IndexedDataset,
    document: int,
    origin: Origin,
    origins: Origins,
    tokenizer: Tokenizer | None,
) -> str:
    """Return why the line of a document must not be blanked; empty if it may be."""
    if is_url(origin.path) or not os.path.isfile(origin.path):
        return "its file is not on this machine"
    if origin.start < 0 or not is_json_lines(origin.path):
        return "only JSON lines can be"
    if origins.key is None:
        # The tokens of a row are not those of its text alone: go by what the whole file was.
        size = next(size for path, size, *_ in origins.parts if path == origin.path)
        changed = os.stat(origin.path).st_size != size
        return "its file was changed since it was preprocessed" if changed else ""
    if tokenizer is None:
        return "without data.tokenizer it cannot be told whether it is still what was preprocessed"
    try:
        text = read_record(origins.key, origin)[origins.key]
    except (OSError, DataError, ValueError) as error:
        return str(error)
    ids = dataset.read(*(dataset.document_start(d) for d in (document, document + 1)))
    found = tokenizer.encode_documents([text])[0]
    return "" if spelled_from(ids.tolist(), found) is not None else "another text stands there now"


def blank(lines: Mapping[str, Sequence[Origin]]) -> None:
    """Blank lines in their files. A packed file is packed again, and takes the place of the old one
    when it is complete. Raise OSError, and DataError for a packed file that is damaged."""
    for path, origins in lines.items():
        if is_packed(path):
            _pack_again(path, origins)
            continue
        with open(path, "r+b") as file:
            for origin in origins:
                file.seek(origin.start)
                file.write(b" " * origin.length)
            file.flush()
            os.fsync(file.fileno())


def _pack_again(path: str, origins: Sequence[Origin]) -> None:
    """Write a packed file anew, with blanks in place of lines."""
    with replacing(Path(path), durable=True) as temporary, ExitStack() as files:
        file = files.enter_context(open(temporary, "wb"))
        packed: Any
        if path.lower().endswith(".gz"):
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
        else:
            import zstandard

            packed = zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
        with packed:
            for chunk in _blanked(read_bytes(path, Report()), origins):
                packed.write(chunk)


def _blanked(chunks: Iterator[bytes], origins: Sequence[Origin]) -> Iterator[bytes]:
    """Yield the chunks of a file, with spaces for the bytes of lines."""
    first = 0
    for chunk in chunks:
        changed = bytearray(chunk)
        for origin in origins:
            low = max(origin.start - first, 0)
            high = min(origin.start + origin.length - first, len(chunk))
            if low < high:
                changed[low:high] = b" " * (high - low)
        first += len(chunk)
        yield bytes(changed)
