"""Groups the files of the sources into shards, and reads a shard's documents.

Which files are in which shard follows from the files alone, never from the number of workers.
"""

from __future__ import annotations

import json
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
from megalite.data.documents import Reading, read_files
from megalite.data.inputs import Report, list_documents
from megalite.errors import DataError

MOST_SHARDS = 1000
SMALLEST_SHARD = 4_000_000
"""Lower bound of a shard's bytes, unless `shard_mb` is set."""


@dataclass(frozen=True)
class InputFile:
    """Names a file and the source it belongs to."""

    source: str
    path: str
    num_bytes: int


def list_inputs(sources: Sequence[Source], report: Report) -> list[InputFile]:
    """Return every file in the order of `sources`. What is left out is counted in `report`.

    Raises DataError for a source without files and for a file in two sources."""
    inputs: dict[str, InputFile] = {}
    for source in sources:
        for path, size in list_documents([source.path], report, warc.SUFFIXES).items():
            # Paths of one source may overlap; a file in two sources would be read twice under two
            # names.
            file = inputs.setdefault(path, InputFile(source.name, path, size))
            if file.source != source.name:
                raise DataError(
                    f"{path} is in two sources, {file.source} and {source.name}; narrow one of their paths"
                )
    return list(inputs.values())


def shards_of(files: Sequence[InputFile], shard_bytes: float | None) -> list[list[InputFile]]:
    """Group neighbouring files into shards of about `shard_bytes`. A file is never split."""
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
    """Reads the documents of one shard's files, each with its source, path and line.

    `shards` is the JSON file that lists the files of all shards."""

    type, name = "reader", "inputs"

    def __init__(self, sources: Sequence[Source], shards: Path) -> None:
        super().__init__()
        self._sources = {source.name: source for source in sources}
        self._shards = shards
        self.report = Report()
        self.read = {name: Count() for name in self._sources}

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        shards = json.loads(self._shards.read_text(encoding="utf-8"))
        # The task's number in its phase is that of its shard.
        for file in shards[rank]:
            source = self._sources[file["source"]]
            path = file["path"]
            if path.lower().endswith(warc.SUFFIXES):
                documents = warc.read_warc(path, self.report)
            else:
                how = Reading(source.json_key, metadata=True, mend=True)
                # With its size as it was listed: a file that is gone by now is a bad one, no error.
                documents = read_files({path: file["num_bytes"]}, how, self.report)
            for document in documents:
                if not document.text.strip():
                    self.report.num_empty += 1
                    continue
                self.read[source.name].add(document.num_bytes)
                yield _document(document, source)

    def counted(self) -> dict[str, Any]:
        """Return what was read and left out, as JSON."""
        sources = {name: asdict(count) for name, count in self.read.items()}
        return {"report": asdict(self.report), "sources": sources}


def _document(read: Read, source: Source) -> Document:
    """Turn a document as read into one of datatrove's. Its own metadata goes into the key
    `metadata`."""
    given = dict(read.metadata)
    identity = given.pop("id", None)
    metadata: dict[str, Any] = {"source": source.name, "path": read.path, "line": read.line}
    is_warc = read.path.lower().endswith(warc.SUFFIXES)
    if source.html or (is_warc and given["content_type"] in warc.HTML):
        metadata["html"] = True
    if read.num_mended:
        metadata["mended_bytes"] = read.num_mended
    # What the source said of a document stays apart from what we say of it.
    if given:
        metadata["metadata"] = given
    # Numbers are mostly those of rows in their file, so that another file has them as well.
    if not isinstance(identity, str) or not identity:
        identity = f"{read.path}:{read.line}"
    return Document(text=read.text, id=identity, metadata=metadata)
