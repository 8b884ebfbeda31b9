"""Reads and writes documents as JSON lines in compressed files, which appear whole or not at
all."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megalite.data.documents import Reading, read_files
from megalite.data.inputs import Report
from megalite.errors import DataError
from megalite.utils.files import replacing

Compression = Literal["zst", "gz", "none"]


def suffix_of(compression: Compression) -> str:
    """Return the suffix of a file of documents."""
    return ".jsonl" if compression == "none" else f".jsonl.{compression}"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the name `path` once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=True) as temporary, open(temporary, "wb") as file:
        yield file


@contextmanager
def packing(file: BinaryIO, compression: Compression) -> Iterator[Any]:
    """Wrap a `file` so that what is written to it is compressed.

    The same documents give the same bytes: the headers hold no times and no names."""
    if compression == "zst":
        import zstandard

        # The level as a number: the library's default may change, and the bytes with it.
        with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as packed:
            yield packed
    elif compression == "gz":
        # Buffered: gzip is slow for many short writes.
        with (
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped,
            io.BufferedWriter(zipped) as fast,
        ):
            yield fast
    else:
        yield file


def write_json(path: Path, values: Any) -> None:
    """Write `values` to a JSON file, durably and atomically."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace") + b"\n")


def line_of(document: Document) -> bytes:
    """Return a document as a line of JSON."""
    record = {"text": document.text, "id": document.id, **document.metadata}
    text = json.dumps(record, ensure_ascii=False, default=str)
    # A lone surrogate in a key of the source's own becomes the escape that JSON has for it.
    return text.encode("utf-8", "backslashreplace") + b"\n"


class ReadShard(PipelineStep):
    """Reads the documents of `folder`/RANK.jsonl.zst, which an earlier phase wrote."""

    type = "reader"
    name = "shard"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        report = Report()
        path = str(self._folder / f"{rank:05d}.jsonl.zst")
        for document in read_files([path], Reading(metadata=True), report):
            # `line_of` has put it among the metadata.
            identity = document.metadata.pop("id")
            yield Document(text=document.text, id=identity, metadata=document.metadata)
        if report.num_bad or report.num_empty:
            raise DataError(f"{path} is damaged; remove the output folder and start anew\n{report}")


class WriteShard(PipelineStep):
    """Writes documents to `folder`/RANK.jsonl.zst and passes them on; then writes the counts of the
    reader and of the stages to RANK.json."""

    type = "writer"
    name = "shard"

    def __init__(self, folder: Path, reader: Any, stages: Sequence[Any]) -> None:
        super().__init__()
        self._folder = folder
        self._reader = reader
        self._stages = stages

    def run(
        self,
        data: Iterable[Document],
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Document]:
        with (
            whole_file(self._folder / f"{rank:05d}.jsonl.zst") as file,
            packing(file, "zst") as packed,
        ):
            for document in data:
                packed.write(line_of(document))
                yield document
        # Steps run as one generator: the counts are complete only when the last document has come
        # through.
        stages = [stage.counted() for stage in self._stages]
        counted = self._reader.counted() | {"stages": stages}
        write_json(self._folder / f"{rank:05d}.json", counted)
