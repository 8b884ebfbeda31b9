"""Blank the lines of a corpus that documents were made of. A line becomes as many spaces, which is an
empty document to whatever reads it: all other lines keep their numbers and their bytes."""

from __future__ import annotations

import gzip
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megalite.data.documents import is_json_lines, read_bytes
from megalite.data.indexed import IndexedDataset
from megalite.data.inputs import Report
from megalite.data.kinds import is_packed
from megalite.data.origins import Origin, Origins
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.lineage.texts import json_lines_at, parse_record, spelled_from
from megalite.utils.files import replacing
from megalite.utils.urls import is_url

Lines = dict[str, set[Origin]]
"""Lines to blank, by their file. A line may be several documents, of one token file or of two."""


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
    if not documents:
        return
    if origins is None:
        raise DataError(f"there is no {dataset.prefix}.src, which says what to blank")
    by_path: dict[str, dict[Origin, list[int]]] = {}
    for document in documents:
        origin = origins.of(document)
        if why := _why_not(origin, origins, tokenizer):
            raise _refusal(origin, why)
        by_path.setdefault(origin.path, {}).setdefault(origin, []).append(document)
    for path, own in by_path.items():
        if origins.key is not None and tokenizer is not None:
            _check_texts(dataset, own, path, origins.key, tokenizer)
        lines.setdefault(path, set()).update(own)


def _refusal(origin: Origin, why: str) -> DataError:
    return DataError(f"{origin.path}:{origin.line} cannot be blanked: {why}")


def _why_not(origin: Origin, origins: Origins, tokenizer: Tokenizer | None) -> str:
    """Return why a line must not be blanked, as far as that is known without reading it; empty if
    nothing speaks against it."""
    if is_url(origin.path) or not os.path.isfile(origin.path):
        return "its file is not on this machine"
    if origin.start < 0 or not is_json_lines(origin.path):
        return "only JSON lines can be"
    # A packed file is replaced by another one, which is written beside it.
    written = os.path.dirname(origin.path) if is_packed(origin.path) else origin.path
    if not os.access(written, os.W_OK):
        return f"this user may not write to {written}"
    if origins.key is None:
        # The tokens of a row are not those of its text alone: go by what the whole file was.
        size = next(size for path, size, *_ in origins.parts if path == origin.path)
        changed = os.stat(origin.path).st_size != size
        return "its file was changed since it was preprocessed" if changed else ""
    if tokenizer is None:
        return "without data.tokenizer it cannot be told whether it is still what was preprocessed"
    return ""


def _check_texts(
    dataset: IndexedDataset,
    own: Mapping[Origin, Sequence[int]],
    path: str,
    key: str,
    tokenizer: Tokenizer,
) -> None:
    """Raise DataError where the text of a line in the file `path`, under `key`, is not that of the
    documents which `own` says were made of it: tokenized again, it must give their tokens."""
    # For the errors below that are not of a single line, such as a file that cannot be opened.
    origin = next(iter(own))
    try:
        for origin, line in json_lines_at(path, own):
            text = parse_record(key, origin, line)[key]
            found = tokenizer.encode_documents([text])[0]
            for document in own[origin]:
                bounds = (dataset.document_start(d) for d in (document, document + 1))
                ids = dataset.read(*bounds).tolist()
                if spelled_from(ids, found) is None:
                    raise ValueError("another text stands there now")
    except (OSError, DataError, ValueError) as error:
        raise _refusal(origin, str(error)) from None


def blank(lines: Mapping[str, Collection[Origin]]) -> None:
    """Blank lines in their files. A packed file is packed again, and takes the place of the old one
    when it is complete. Raise OSError, and DataError for a packed file that is damaged."""
    for path, origins in lines.items():
        if is_packed(path):
            _pack_again(path, origins)
            continue
        with open(path, "r+b") as file:
            # In place: the same number of bytes, so that no other line moves. What is done again
            # after a crash is the same.
            for origin in origins:
                file.seek(origin.start)
                file.write(b" " * origin.length)
            file.flush()
            os.fsync(file.fileno())


def _pack_again(path: str, origins: Collection[Origin]) -> None:
    """Write a packed file anew, with blanks in place of lines."""
    with replacing(Path(path), durable=True) as temporary, ExitStack() as files:
        file = files.enter_context(open(temporary, "wb"))
        packed: Any
        if path.lower().endswith(".gz"):
            # Without a name and a time, the same bytes are the same file.
            packed = gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0)
        else:
            import zstandard

            packed = zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False)
        with packed:
            for chunk in _blanked(read_bytes(path, Report()), origins):
                packed.write(chunk)


def _blanked(chunks: Iterator[bytes], origins: Collection[Origin]) -> Iterator[bytes]:
    """Yield the chunks of a file, with spaces for the bytes of lines."""
    # Lines do not overlap: those before `number` have ended before the chunk begins.
    spans = sorted((origin.start, origin.start + origin.length) for origin in origins)
    first, number = 0, 0
    for chunk in chunks:
        changed = bytearray(chunk)
        end = first + len(chunk)
        while number < len(spans) and spans[number][0] < end:
            start, stop = spans[number]
            low, high = max(start, first) - first, min(stop, end) - first
            changed[low:high] = b" " * (high - low)
            if stop > end:
                break  # its rest is in the next chunk
            number += 1
        first += len(chunk)
        yield bytes(changed)
