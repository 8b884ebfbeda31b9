"""Token files checked whole, before the first step: every length, pointer and document of an index, and every value of
a mask. Opening a file looks at its ends alone.

A gigabyte takes about a second. What is larger than REMEMBERED_BYTES is remembered in the cache once it was found to be
right, under the fingerprint and the times of the files.
"""

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
    """Return what is wrong inside of an index whose last numbers are right; empty where all of it is.

    Sequences lie end to end from byte 0 on, and each document begins where or after the one before it does. (A document
    may have no sequence: Megatron-LM's tool writes such for an empty text.)"""
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
    """Return what is wrong with a mask whose values are to be 0 to `highest`; empty where nothing is."""
    for first in range(0, len(mask), CHUNK):
        values = mask[first : first + CHUNK]
        if values.max() > highest:
            number = int(values.argmax())
            return f"has the value {values[number]} at token {first + number:,}"
    return ""


class Remembered:
    """Whether files were found to be right before, as a file in the cache. A cache that cannot be written forgets."""

    def __init__(self, files: list[Path], fingerprint: str, what: str = "") -> None:
        """`what`: what they were held against."""
        times = [(path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) for path in files]
        name = hashlib.sha256(repr((fingerprint, times, what)).encode()).hexdigest()[:32]
        self._path = cache_folder() / "checked" / name

    def __bool__(self) -> bool:
        return self._path.exists()

    def remember(self) -> None:
        """Write it down."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path.touch()
