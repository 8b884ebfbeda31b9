"""Check token files completely before the first step: every length, pointer and document of an
index, and every value of a mask. Opening a file looks only at its ends.

A gigabyte takes about a second. A file larger than REMEMBERED_BYTES that was found correct is
remembered in the cache, under its fingerprint and modification time."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalite.data.remote import cache_folder

CHUNK = 1 << 20
"""Numbers in memory at a time."""

REMEMBERED_BYTES = 64 << 20
"""Smaller files are checked anew every time, which takes less than reading them for training."""

Array = npt.NDArray[Any]


def find_in_index(lengths: Array, pointers: Array, documents: Array, itemsize: int) -> str:
    """Return what is wrong inside an index whose last entries are known to be right; empty if
    nothing is.

    Sequences of `lengths` tokens (of `itemsize` bytes) must lie end to end from byte 0 on, at
    `pointers`, and `documents` must not decrease. (A document may have no sequence: Megatron-LM's
    tool writes such for an empty text.)"""
    if pointers[0] != 0:
        return f"has its first sequence begin at byte {int(pointers[0])}, not at 0"
    for first in range(0, len(lengths), CHUNK):
        sizes = np.array(lengths[first : first + CHUNK], np.int64)
        if sizes.min() < 0:
            number = int(sizes.argmin())
            return f"says that sequence {first + number:,} has {sizes[number]:,} tokens"
        starts = np.array(pointers[first : first + CHUNK + 1])
        ends = (starts[: len(sizes)] + sizes * itemsize)[: len(starts) - 1]
        wrong = starts[1:] != ends
        if wrong.any():
            number = int(wrong.argmax())
            return (
                f"has sequence {first + number + 1:,} begin at byte {starts[number + 1]}, where the one before it ends "
                f"at byte {ends[number]}"
            )
    for first in range(0, len(documents), CHUNK):
        sequences = np.array(documents[first : first + CHUNK + 1])
        wrong = sequences[1:] < sequences[:-1]
        if wrong.any():
            number = int(wrong.argmax())
            return (
                f"has document {first + number + 1:,} begin at sequence {sequences[number + 1]}, before document "
                f"{first + number:,}, which begins at {sequences[number]}"
            )
    return ""


def find_in_mask(mask: Array, highest: int) -> str:
    """Return what is wrong with a mask whose values must be 0 to `highest`; empty if nothing is."""
    for first in range(0, len(mask), CHUNK):
        values = np.asarray(mask[first : first + CHUNK])
        wrong = (values < 0) | (values > highest)
        if wrong.any():
            number = int(wrong.argmax())
            return f"has the value {values[number]} at token {first + number:,}"
    return ""


class Remembered:
    """Remembers by a file in the cache that token files were found correct. A cache that cannot be
    written forgets."""

    def __init__(self, files: list[Path], fingerprint: str, what: str = "") -> None:
        """Derive the record's name from sizes, times and inodes of `files` and their `fingerprint`.
        `what` names what they were checked against."""
        times = [
            (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) for path in files
        ]
        name = hashlib.sha256(repr((fingerprint, times, what)).encode()).hexdigest()[:32]
        self._path = cache_folder() / "checked" / name

    def __bool__(self) -> bool:
        """Return whether the files were found correct before."""
        return self._path.exists()

    def remember(self) -> None:
        """Record that the files are correct."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch()
