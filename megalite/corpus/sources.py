"""From sources to shards, and from a shard's files to documents.

Which files are in which shard follows from the files alone, never from the number of workers."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megalite.corpus.config import Source
from megalite.corpus.tally import Count
from megalite.data.documents import Document as Read
from megalite.data.documents import Reading, Report, list_files, read_bytes, read_files
from megalite.errors import DataError

MOST_SHARDS = 1000
SMALLEST_SHARD = 4_000_000  # bytes
WARC_SUFFIXES = (".warc", ".warc.gz", ".warc.zst", ".wet", ".wet.gz")
HTML = ("text/html", "application/xhtml+xml")
# What `save_to_disk` of the `datasets` library and snapshots of its hub have beside the data.
HF_COMPANIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass(frozen=True)
class InputFile:
    source: str
    path: str
    num_bytes: int


def list_inputs(sources: Sequence[Source], report: Report) -> list[InputFile]:
    """Every file, in the order of the sources. Raises DataError for a source without files and a file with two."""
    inputs: dict[str, InputFile] = {}
    for source in sources:
        for path in list_files([source.path], report):
            if os.path.basename(path) in HF_COMPANIONS:
                report.num_hidden += 1
                continue
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
            if path.endswith(WARC_SUFFIXES):
                documents = read_warc(path, self.report)
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
    if source.html or (read.path.endswith(WARC_SUFFIXES) and given["content_type"] in HTML):
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


def read_warc(path: str, report: Report) -> Iterator[Read]:
    """The pages of a WARC file as HTML, and the texts of a WET file. What is damaged is counted in `report`."""
    from trafilatura.utils import decode_file
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    before, size, number = report.bytes_read, os.stat(path).st_size, 0
    # Unpacked here, since warcio takes a packed file that ends too early for complete.
    stream = _Stream(read_bytes(path, report))
    try:
        for number, record in enumerate(ArchiveIterator(io.BufferedReader(stream)), 1):
            if record.rec_type not in ("response", "conversion"):
                continue
            content_type = _content_type(record)
            if content_type not in (*HTML, "text/plain"):
                report.num_binary += 1
                continue
            content = record.content_stream().read()
            if record.raw_stream.limit:
                raise DataError(f"truncated: the record lacks {record.raw_stream.limit:,} bytes")
            text = decode_file(content)
            if not text:
                report.num_empty += 1
                continue
            headers = record.rec_headers
            named = {"id": "WARC-Record-ID", "url": "WARC-Target-URI", "date": "WARC-Date"}
            metadata = {key: headers.get_header(name) for key, name in named.items()} | {"content_type": content_type}
            report.num_documents += 1
            yield Read(text, len(text.encode("utf-8", "replace")), path, number, metadata)
        if stream.failure:
            raise stream.failure
    except (OSError, DataError, ArchiveLoadFailed, ValueError) as error:
        report.bad(path, number, f"unreadable from this record on: {stream.failure or error}")
    report.bytes_read = before + size


def _content_type(record: Any) -> str:
    headers = record.http_headers or record.rec_headers
    given = record.rec_headers.get_header("WARC-Identified-Payload-Type") or headers.get_header("Content-Type") or ""
    return given.partition(";")[0].strip().lower()


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
