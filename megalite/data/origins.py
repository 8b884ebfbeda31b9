"""PREFIX.src beside a token file: which line of which file each of its documents was made of.

    0   magic `MLITESRC`, u64 number of documents D
    16  D x (u32 line, u32 length, i64 start)
    then JSON to the end: {"token_file": its fingerprint, "key": that of the texts, null for rows,
                           "files": [[path, size, first document], …]}

A line is counted from 1, and is the number of a row where files have no lines (parquet, Arrow, a
JSON array). `start` and `length` are the line's bytes in its file, which a .gz or .zst has once it
is unpacked; -1 and 0 where the reader does not know them. 16 bytes a document. A shard that begins within a file
counts its lines from there; they are right once shards are joined."""

from __future__ import annotations

import itertools
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.data.indexed import IndexedDataset
from megalite.errors import DataError
from megalite.utils.outside import reading
from megalite.utils.resources import fsync
from megalite.utils.urls import is_url

MAGIC = b"MLITESRC"
HEADER = struct.Struct("<8sQ")
RECORD = np.dtype([("line", "<u4"), ("length", "<u4"), ("start", "<i8")])
PLACE = np.dtype([("file", "<i8"), ("line", "<i8"), ("length", "<i8"), ("start", "<i8")])
"""A document's place while it is read: the number of its file in a list beside it, and a record."""
Array = npt.NDArray[Any]
LARGEST = 2**32 - 1


class Origin(NamedTuple):
    """Says what a document was made of."""

    path: str
    line: int  # counted from 1
    start: int  # first byte of the line; -1: not known
    length: int

    def __str__(self) -> str:
        where = f", bytes {self.start:,} to {self.start + self.length:,}" if self.start >= 0 else ""
        return f"{self.path}:{self.line}{where}"


def places_of(places: Sequence[tuple[int, int, int, int]]) -> Array:
    """Return (file, line, length, start) of each document as an array, [D]."""
    return np.array(places, PLACE)


def full_path(path: str) -> str:
    """Return the name under which a file is noted, which does not depend on the folder that the
    tool was started in."""
    return path if is_url(path) else os.path.abspath(path)


@contextmanager
def writing_origins(prefix: str | Path, key: str | None) -> Iterator[OriginsWriter]:
    """Write PREFIX.src while its token file is written; nothing is left behind if the block raises.
    Enter it before the writer of the token file, which is then complete at its end. `key` is that
    of the texts in JSON lines, None for rows of labelled data."""
    # Named as those of the token file are, so that who writes it again replaces a killed one's.
    temporary = Path(f"{prefix}.src.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            writer = OriginsWriter(file)
            yield writer
            writer.finish(IndexedDataset(prefix), key)
        fsync(temporary)
        os.replace(temporary, f"{prefix}.src")
    finally:
        temporary.unlink(missing_ok=True)


class OriginsWriter:
    """Writes where documents come from: `add` in their order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._count = file, 0
        self._files: list[tuple[str, int, int]] = []
        self._file.write(bytes(HEADER.size))

    def add(self, places: Array, files: Sequence[tuple[str, int]]) -> None:
        """Note the next documents: their `places`, and path and size of each file that these
        number."""
        borders = [0, *(np.flatnonzero(np.diff(places["file"])) + 1).tolist(), len(places)]
        for first, end in itertools.pairwise(borders if len(places) else ()):
            path, size = files[int(places["file"][first])]
            self._begin(full_path(path), size)
            records = np.empty(end - first, RECORD)
            records["line"] = np.minimum(places["line"][first:end], LARGEST)
            records["length"] = np.minimum(places["length"][first:end], LARGEST)
            records["start"] = places["start"][first:end]
            self._write(records)

    def add_all(self, other: Origins, path: str = "", lines: int = 0) -> None:
        """Note the documents of another token file, which are appended. Those from `path` are
        counted from behind its first `lines` lines."""
        for name, size, first, end in other.parts:
            self._begin(name, size)
            records = other.records[first:end].copy()
            if name == full_path(path):
                records["line"] = np.minimum(records["line"].astype(np.int64) + lines, LARGEST)
            self._write(records)

    def _begin(self, path: str, size: int) -> None:
        """Note from which file the next documents are."""
        if not self._files or self._files[-1][0] != path:
            self._files.append((path, size, self._count))

    def _write(self, records: Array) -> None:
        self._count += len(records)
        self._file.write(records.tobytes())

    def finish(self, dataset: IndexedDataset, key: str | None) -> None:
        """Complete the file of the token file `dataset`."""
        assert dataset.num_documents == self._count
        # The paths come behind the records, as they are known only at the end; and the header last
        # of all, without which the file is none.
        note = {"token_file": dataset.fingerprint(), "key": key, "files": self._files}
        self._file.write(json.dumps(note, ensure_ascii=False).encode("utf-8", "surrogatepass"))
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, self._count))


class Origins:
    """Reads PREFIX.src. Raises DataError for a damaged one, and for that of another token file."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self._path = Path(f"{dataset.prefix}.src")
        with reading(self._path, DataError):
            size = self._path.stat().st_size
            with open(self._path, "rb") as file:
                magic, count = HEADER.unpack(file.read(HEADER.size).ljust(HEADER.size))
                end = HEADER.size + RECORD.itemsize * count
                if magic != MAGIC or count != dataset.num_documents or end >= size:
                    raise self._other(dataset)
                file.seek(end)
                note = json.loads(file.read().decode("utf-8", "surrogatepass"))
            files, self.key = _checked(note, count), note.get("key")
        if note.get("token_file") != dataset.fingerprint():
            raise self._other(dataset)
        self.records: Array = np.asarray(np.memmap(self._path, RECORD, "r", HEADER.size, (count,)))
        self._firsts = [first for _, _, first in files]
        ends = [*self._firsts[1:], count]
        self.parts = [(*file, end) for file, end in zip(files, ends, strict=True)]
        """Path and size of each file, and which documents [first, end) are from it."""

    def _other(self, dataset: IndexedDataset) -> DataError:
        return DataError(
            f"{self._path} is damaged, or does not belong to {dataset.prefix}.bin, whose {dataset.num_documents:,} "
            "documents it should list: copy it again with them, or make all of them again"
        )

    def of(self, document: int) -> Origin:
        """Return what a document was made of. Raise IndexError for a number out of range."""
        if not 0 <= document < len(self.records):
            raise IndexError(f"{self._path}: document {document} of {len(self.records)}")
        path = self.parts[bisect_right(self._firsts, document) - 1][0]
        record = self.records[document]
        return Origin(path, int(record["line"]), int(record["start"]), int(record["length"]))

    def documents_of(self, path: str, line: int) -> list[int]:
        """Return the documents made of a line. `path` is the whole path of the file, or its end
        where only one file ends so. Raise DataError for an end that several have."""
        named = {name for name, *_ in self.parts}
        wanted = {full_path(path)} & named or {
            name for name in named if name.endswith(f"/{path.removeprefix('./')}")
        }
        if len(wanted) > 1:
            raise DataError(
                f"{path} may be any of {', '.join(sorted(wanted)[:4])}; give more of it"
            )
        found: list[int] = []
        for name, _, first, end in self.parts:
            if name in wanted:
                # Lines ascend within a file.
                lines = self.records["line"][first:end]
                low, high = (int(np.searchsorted(lines, line, side)) for side in ("left", "right"))
                found += range(first + low, first + high)
        return found


def _checked(note: Any, count: int) -> list[tuple[str, int, int]]:
    """Return the files that a note lists. Raise ValueError for what `OriginsWriter` cannot have
    written."""
    files = [(str(path), int(size), int(first)) for path, size, first in note["files"]]
    firsts = [first for _, _, first in files]
    if not firsts or firsts[0] != 0 or sorted(set(firsts)) != firsts or firsts[-1] >= count:
        raise ValueError("its files do not begin at documents in ascending order")
    return files


def open_origins(dataset: IndexedDataset) -> Origins | None:
    """Return the origins of a token file's documents; None where they were not written, and of a
    token file in an object store. Raise DataError as `Origins` does."""
    if is_url(dataset.prefix) or not Path(f"{dataset.prefix}.src").exists():
        return None
    return Origins(dataset)
