"""Documents as JSON lines in packed files that appear whole or not at all."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megalite.data.documents import Reading, Report, read_files
from megalite.errors import DataError
from megalite.resources import fsync

Compression = Literal["zst", "gz", "none"]


def suffix_of(compression: Compression) -> str:
    return ".jsonl" if compression == "none" else f".jsonl.{compression}"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the name `path` once it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the process's id: one that was thought dead and writes on cannot meddle with this one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def packing(file: BinaryIO, compression: Compression) -> Iterator[Any]:
    """The same documents give the same bytes: no times and no names in the headers."""
    if compression == "zst":
        import zstandard

        with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as packed:
            yield packed
    elif compression == "gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as zipped, io.BufferedWriter(zipped) as fast:
            yield fast
    else:
        yield file


def write_json(path: Path, values: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(values, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")


def line_of(document: Document) -> bytes:
    record = {"text": document.text, "id": document.id, **document.metadata}
    # A lone surrogate in a key of the source's own becomes the escape that JSON has for it.
    return json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace") + b"\n"


class ReadShard(PipelineStep):
    """The documents of `folder`/RANK.jsonl.zst, which an earlier phase wrote."""

    type = "reader"
    name = "shard"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        report = Report()
        path = str(self._folder / f"{rank:05d}.jsonl.zst")
        for document in read_files([path], Reading(metadata=True), report):
            identity = document.metadata.pop("id")
            yield Document(text=document.text, id=identity, metadata=document.metadata)
        if report.num_bad or report.num_empty:
            raise DataError(f"{path} is damaged; remove the output folder and start anew\n{report}")


class WriteShard(PipelineStep):
    """Writes `folder`/RANK.jsonl.zst and then, in RANK.json, what reading and the stages counted. Documents go on."""

    type = "writer"
    name = "shard"

    def __init__(self, folder: Path, reader: Any, stages: Sequence[Any]) -> None:
        super().__init__()
        self._folder, self._reader, self._stages = folder, reader, stages

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with replacing(self._folder / f"{rank:05d}.jsonl.zst") as file, packing(file, "zst") as packed:
            for document in data:
                packed.write(line_of(document))
                yield document
        counted = self._reader.counted() | {"stages": [stage.counted() for stage in self._stages]}
        write_json(self._folder / f"{rank:05d}.json", counted)
