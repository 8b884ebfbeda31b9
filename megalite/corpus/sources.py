"""From sources to shards, and from a shard's files to documents.

Which files are in which shard follows from the files alone, never from the number of workers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megalite.corpus import warc
from megalite.corpus.config import Source
from megalite.corpus.tally import Count
from megalite.data.documents import Document as Read
from megalite.data.documents import Reading, Report, list_documents, read_files
from megalite.errors import DataError

MOST_SHARDS = 1000
SMALLEST_SHARD = 4_000_000  # bytes


@dataclass(frozen=True)
class InputFile:
    source: str
    path: str
    num_bytes: int


def list_inputs(sources: Sequence[Source], report: Report) -> list[InputFile]:
    """Every file, in the order of the sources. Raises DataError for a source without files and a file with two."""
    inputs: dict[str, InputFile] = {}
    for source in sources:
        for path in list_documents([source.path], report, warc.SUFFIXES):
            file = inputs.setdefault(path, InputFile(source.name, path, os.stat(path).st_size))
            if file.source != source.name:
                raise DataError(f"{path} is in two sources, {file.source} and {source.name}; narrow one of their paths")
    return list(inputs.values())


def shards_of(files: Sequence[InputFile], shard_bytes: float | None) -> list[list[InputFile]]:
    """Neighbouring files of about `shard_bytes` together; a file is never cut."""
    total = sum(file.num_bytes for file in files)
    size = shard_bytes or max(SMALLEST_SHARD, total / MOST_SHARDS)
    shards: list[list[InputFile]] = [[]]
    held = 0
    for file in files:
        if shards[-1] and held + file.num_bytes > size:
            shards.append([])
            held = 0
        shards[-1].append(file)
        held += file.num_bytes
    return shards


class ReadInputs(PipelineStep):
    """The documents of one shard's files, each with its source, path and line. `shards` is the file that lists them."""

    type, name = "reader", "inputs"

    def __init__(self, sources: Sequence[Source], shards: Path) -> None:
        super().__init__()
        self._sources = {source.name: source for source in sources}
        self._shards = shards
        self.report = Report()
        self.read = {name: Count() for name in self._sources}

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for file in json.loads(self._shards.read_text(encoding="utf-8"))[rank]:
            source, path = self._sources[file["source"]], file["path"]
            if path.lower().endswith(warc.SUFFIXES):
                documents = warc.read_warc(path, self.report)
            else:
                documents = read_files([path], Reading(source.json_key, metadata=True, mend=True), self.report)
            for document in documents:
                if not document.text.strip():
                    self.report.num_empty += 1
                    continue
                self.read[source.name].add(document.num_bytes)
                yield _document(document, source)

    def counted(self) -> dict[str, Any]:
        sources = {name: asdict(count) for name, count in self.read.items()}
        return {"report": asdict(self.report), "sources": sources}


def _document(read: Read, source: Source) -> Document:
    given = dict(read.metadata)
    identity = given.pop("id", None)
    metadata: dict[str, Any] = {"source": source.name, "path": read.path, "line": read.line}
    if source.html or (read.path.lower().endswith(warc.SUFFIXES) and given["content_type"] in warc.HTML):
        metadata["html"] = True
    if read.num_mended:
        metadata["mended_bytes"] = read.num_mended
    if given:
        metadata["metadata"] = given
    return Document(
        text=read.text,
        id=identity if isinstance(identity, str) and identity else f"{read.path}:{read.line}",
        metadata=metadata,
    )
