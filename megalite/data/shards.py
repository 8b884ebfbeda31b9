"""A token file written in parts by several jobs, and put together when all parts are there.

A part is complete once its .json is there, which is written last. Whichever job completes the last part joins them, in
their order, into the files that one job alone would have written, byte for byte."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalite.data.blocks import Shard, add_to
from megalite.data.documents import Report
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.metadata import Preprocessed, read_metadata
from megalite.errors import DataError


def name_of(prefix: str, shard: Shard) -> str:
    return f"{prefix}.{shard.index:05}-of-{shard.count:05}"


def read_complete(prefix: str, settings: dict[str, Any], exact: bool) -> Preprocessed | None:
    """The complete token file of these settings, if there is one. A shard may have no document, and then no pair; its
    files may vanish at any moment, when another job joins the shards."""
    result = read_metadata(prefix, settings)
    if result is None or (exact and "gigatoken" in result.tokenized_by):
        return None
    if result.num_documents:
        try:
            found = IndexedDataset(prefix)
        except (DataError, FileNotFoundError):
            return None
        if (found.num_documents, found.num_tokens) != (result.num_documents, result.num_tokens):
            return None
    return result


def join(
    prefix: str, count: int, settings: dict[str, Any], exact: bool, dtype: Any, progress: Callable[[int, int], None]
) -> Preprocessed | None:
    """Put the shards together and remove them; None while some are missing. `progress` is told how many bytes of the
    inputs and how many tokens are in place.

    Raises DataError, with the shards kept, if none has a document or they cannot be locked."""
    names = [name_of(prefix, Shard(index, count)) for index in range(count)]

    def read_all() -> list[Preprocessed]:
        found = (read_complete(name, settings, exact) for name in names)
        return [part for part in found if part is not None]

    if len(read_all()) < count:
        return None
    # Two jobs may complete the last two shards at once. Who comes second finds them gone, here or behind the lock.
    try:
        lock = open(f"{names[0]}.json", "r+b")  # noqa: SIM115
    except FileNotFoundError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:  # some file systems of clusters have no locks
            raise DataError(
                f"{prefix}: all {count} shards are there, but cannot be joined where files have no locks "
                f"({error.strerror}); copy them to another file system, and start any one of the jobs again there"
            ) from None
        parts = read_all()
        if len(parts) < count:
            return None
        with IndexedWriter(prefix, dtype) as writer:
            for number, part in enumerate(parts, 1):
                if part.num_documents:
                    writer.add_pair(part.prefix)
                progress(settings["input_bytes"] * number // count, writer.num_tokens)
        result = _sum(prefix, parts)
        result.write()
        for name in names:
            remove(name)
    return result


def remove(name: str) -> None:
    for suffix in (".json", ".idx", ".bin"):  # .json first: without it the others count for nothing
        Path(f"{name}{suffix}").unlink(missing_ok=True)


def _sum(prefix: str, parts: list[Preprocessed]) -> Preprocessed:
    report = Report()
    for part in parts:
        add_to(report, part.report)
    return Preprocessed(
        prefix,
        parts[0].settings,
        " and ".join(dict.fromkeys(part.tokenized_by for part in parts)),
        num_documents=sum(part.num_documents for part in parts),
        num_tokens=sum(part.num_tokens for part in parts),
        text_bytes=sum(part.text_bytes for part in parts),
        num_left=sum(part.num_left for part in parts),
        report=report,
    )
