"""Token files written in parts by several jobs, and joined when all parts are complete.

A part is complete once its .json is there, which is written last. The job that completes the last
part joins them, in order, into the files that a single job would have written, byte for byte."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalite.data.blocks import Shard, add_to
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inputs import Report
from megalite.data.metadata import Preprocessed, read_metadata
from megalite.data.origins import open_origins, writing_origins
from megalite.errors import DataError


def name_of(prefix: str, shard: Shard) -> str:
    """Return the prefix of a shard's files."""
    return f"{prefix}.{shard.index:05}-of-{shard.count:05}"


def read_complete(prefix: str, settings: dict[str, Any], exact: bool) -> Preprocessed | None:
    """Return the complete token file of these `settings`, None if there is none (with `exact`, one
    by gigatoken does not count). A shard may have no document, and then no pair; its files may
    vanish at any moment, when another job joins the shards."""
    result = read_metadata(prefix, settings)
    if result is None or (exact and "gigatoken" in result.tokenized_by):
        return None
    if result.num_documents:
        try:
            found = IndexedDataset(prefix)
        except (DataError, FileNotFoundError):
            return None
        # .json is written last; but a pair may have been replaced since, by hand or by a copy.
        if (found.num_documents, found.num_tokens) != (result.num_documents, result.num_tokens):
            return None
    return result


def join(
    prefix: str,
    count: int,
    settings: dict[str, Any],
    exact: bool,
    dtype: Any,
    progress: Callable[[int, int], None],
) -> Preprocessed | None:
    """Join the `count` shards of `prefix` and remove them. Return the whole, or None while some are
    missing.

    `settings` and `exact` are those of `read_complete`, `dtype` that of the tokens. `progress` is
    called with the bytes of the inputs and the tokens in place so far. Raise DataError, with the
    shards kept, if none has a document or they cannot be locked."""
    names = [name_of(prefix, Shard(index, count)) for index in range(count)]

    def read_all() -> list[Preprocessed]:
        found = (read_complete(name, settings, exact) for name in names)
        return [part for part in found if part is not None]

    # A cheap look without the lock, for the usual case that other jobs are still running.
    if len(read_all()) < count:
        return None
    # Two jobs may complete the last two shards at once. The second finds them gone, here or after
    # taking the lock.
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
        _join_origins(prefix, parts)
        result = _sum(prefix, parts)
        result.write()
        for name in names:
            remove(name)
    return result


def _join_origins(prefix: str, parts: list[Preprocessed]) -> None:
    """Write PREFIX.src from those of the parts, if all of them have one."""
    found = [
        open_origins(IndexedDataset(part.prefix)) if part.num_documents else None for part in parts
    ]
    known = [origins for origins in found if origins is not None]
    if not known or len(known) < sum(part.num_documents > 0 for part in parts):
        return
    path, lines = "", 0
    with writing_origins(prefix, known[0].key) as writer:
        for part, origins in zip(parts, found, strict=True):
            # A part counts lines from where it begins in a file, of which earlier parts have had
            # `lines`.
            if origins is not None:
                writer.add_all(origins, path, lines)
            for last, count in part.lines_read.items():
                path, lines = last, count + (lines if last == path else 0)


def remove(name: str) -> None:
    """Remove a shard's files."""
    for suffix in (
        ".json",
        ".src",
        ".idx",
        ".bin",
    ):  # .json first: without it the others count for nothing
        Path(f"{name}{suffix}").unlink(missing_ok=True)


def _sum(prefix: str, parts: list[Preprocessed]) -> Preprocessed:
    """Return the metadata of all parts together."""
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
