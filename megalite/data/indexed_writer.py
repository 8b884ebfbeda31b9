"""Write token files, Megatron-LM's `.bin/.idx` pair, whose format `indexed.py` says."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megalite.data.indexed import (
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    Array,
    IndexedDataset,
)
from megalite.errors import DataError
from megalite.utils.files import name_full_disk
from megalite.utils.locks import NoLocks, lock
from megalite.utils.resources import fsync

CHUNK_DOCUMENTS = 1 << 20  # of the index in memory at a time


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx, and PREFIX.mask if that has a dtype, in one pass and
    constant memory. The files get these names only when complete.

    As a context manager it finishes at the end of the block, and leaves nothing behind if the block
    raises. Raises DataError while another process writes the same files."""

    def __init__(
        self, prefix: str | Path, dtype: npt.DTypeLike, mask_dtype: npt.DTypeLike | None = None
    ) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise DataError(
                f"{prefix}: tokens of type {self.dtype.name} cannot be stored in this format"
            )
        self._code = codes[0]
        self.num_documents = self.num_sequences = self.num_tokens = 0
        self._counts: list[Array] = []
        """Sequences of each document, where any has several."""
        self._mask_dtype = None if mask_dtype is None else np.dtype(mask_dtype)
        # Complete when there is an index.
        kinds = ("bin", "mask", "idx") if self._mask_dtype else ("bin", "idx")
        self._final = [Path(f"{prefix}.{kind}") for kind in kinds]
        self._temporary = [Path(f"{path}.tmp") for path in self._final]
        self._final[0].parent.mkdir(parents=True, exist_ok=True)
        self._files = [_open_alone(self._temporary[0])]
        self._files += [open(path, "w+b") for path in self._temporary[1:]]  # noqa: SIM115
        self._bin, self._idx = self._files[0], self._files[-1]
        # The tokens' file alone is locked, and opened first: who has it may truncate the others.
        # Lengths come first in .idx, so that they are written in place; the rest of the index is
        # computed from them.
        self._idx.seek(HEADER.size)

    def add_document(self, tokens: npt.ArrayLike) -> None:
        """Append one document of one sequence. Raise DataError as `add_documents` does."""
        array = np.asarray(tokens)
        self.add_documents(array, [array.size])

    def add_documents(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike,
        mask: npt.ArrayLike | None = None,
        counts: npt.ArrayLike | None = None,
    ) -> None:
        """Append documents whose `tokens` lie end to end, [sum(lengths)], as do their values in
        `mask`. With `counts`, for all documents of a file, each is of so many sequences, whose
        lengths these are. Raise DataError for an empty document, one of 2^31 tokens or more, or an id that the
        dtype cannot hold."""
        flat, sizes = np.asarray(tokens), np.asarray(lengths, dtype=np.int64)
        if not sizes.size:
            return
        if sizes.min() < 1 or sizes.max() >= 2**31 or int(sizes.sum()) != flat.size:
            raise DataError(
                f"{self._final[0]}: documents need 1 to 2^31 - 1 tokens and lengths that sum to {flat.size}; "
                f"got lengths from {sizes.min()} to {sizes.max()} that sum to {sizes.sum()}"
            )
        if self.dtype.kind in "iu" and flat.dtype != self.dtype:
            low, high, info = flat.min(), flat.max(), np.iinfo(self.dtype)
            if flat.dtype.kind not in "iu" or low < info.min or high > info.max:
                raise DataError(
                    f"{self._final[0]}: token ids from {low} to {high} do not fit {self.dtype.name} "
                    f"({info.min} to {info.max}); was the vocabulary larger than the one given?"
                )
        if self._mask_dtype is not None:
            assert mask is not None
            assert len(np.asarray(mask)) == flat.size
            self._files[1].write(np.ascontiguousarray(mask, self._mask_dtype).data)
        self._bin.write(np.ascontiguousarray(flat, self.dtype).data)
        self._idx.write(sizes.astype("<i4").data)
        if counts is not None:
            self._counts.append(np.asarray(counts, np.int32))
        self.num_documents += sizes.size if counts is None else self._counts[-1].size
        self.num_sequences += sizes.size
        self.num_tokens += flat.size

    def add_pair(self, prefix: str | Path) -> None:
        """Append all documents of the pair `prefix`. The kernel copies the tokens; only the lengths
        are read. Raise DataError if the dtype differs, or if documents have several sequences or a
        mask."""
        other = IndexedDataset(prefix)
        other.check()
        if (
            other.dtype != self.dtype
            or other.num_documents != other.num_sequences
            or other.mask is not None
        ):
            raise DataError(
                f"{prefix}: {other.num_documents} documents of {other.num_sequences} {other.dtype.name} sequences do "
                f"not go with documents of one {self.dtype.name} sequence each; tokenize the input again"
            )
        with open(f"{prefix}.bin", "rb") as source:
            _copy(source, self._bin, other.num_tokens * self.dtype.itemsize)
        for start in range(0, other.num_sequences, CHUNK_DOCUMENTS):
            self._idx.write(other._lengths[start : start + CHUNK_DOCUMENTS].tobytes())
        self.num_documents += other.num_documents
        self.num_sequences += other.num_sequences
        self.num_tokens += other.num_tokens

    def finish(self) -> None:
        """Complete the index, make the files durable and give them their names. Raise DataError if
        there are no documents."""
        if not self.num_documents:
            raise DataError(f"{self._final[0]}: no document was written")
        self._write_index()
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
        # An older .idx must never stand beside the new .bin, not even between two renames. Nor what
        # else was written beside the older pair: the note of its tokenizer and settings would speak
        # of the new one, until that has its own.
        self._final[-1].unlink(missing_ok=True)
        for kind in (".mask", ".removed", ".src", ".json"):
            self._final[0].with_suffix(kind).unlink(missing_ok=True)
        try:
            for temporary, final in zip(self._temporary, self._final, strict=True):
                os.replace(temporary, final)
        except BaseException:  # Ctrl-C too: half a pair must not stay
            for final in self._final:
                final.unlink(missing_ok=True)
            raise
        fsync(self._final[0].parent)
        # Close only now: closing releases the lock, and nobody may begin to write the same files
        # before the renames.
        for file in self._files:
            file.close()
        self._files, self._temporary = [], []

    def _write_index(self) -> None:
        """Compute pointers and documents from the lengths, in chunks, and write the header last."""
        num, offset, chunk = self.num_sequences, 0, CHUNK_DOCUMENTS
        for start in range(0, num, chunk):
            self._idx.seek(HEADER.size + 4 * start)
            ends = np.frombuffer(self._idx.read(4 * min(chunk, num - start)), "<i4").cumsum(
                dtype="<i8"
            )
            pointers = (
                np.concatenate([np.zeros(1, "<i8"), ends[:-1]]) * self.dtype.itemsize + offset
            )
            self._idx.seek(HEADER.size + 4 * num + 8 * start)
            self._idx.write(pointers.data)
            offset += int(ends[-1]) * self.dtype.itemsize
        if self._counts:
            counts = np.concatenate([np.zeros(1, np.int32), *self._counts])
            self._idx.write(counts.cumsum(dtype="<i8").data)
        for start in () if self._counts else range(0, num + 1, chunk):
            self._idx.write(np.arange(start, min(start + chunk, num + 1), dtype="<i8").data)
        # The header comes last: until then the file is not a valid index.
        self._idx.seek(0)
        self._idx.write(HEADER.pack(MAGIC, VERSION, self._code, num, self.num_documents + 1))

    def abort(self) -> None:
        """Remove what has been written so far; does nothing after `finish`."""
        for path in self._temporary:
            path.unlink(missing_ok=True)
        for file in self._files:
            with suppress(OSError):  # on a full disk closing fails as well
                file.close()
        self._files, self._temporary = [], []

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.finish()
        except OSError as failed:
            error = failed
            raise
        finally:
            if isinstance(error, OSError):
                name_full_disk(error, self._final[0])
            self.abort()


def _open_alone(path: Path) -> BinaryIO:
    """Open an empty file that this process alone writes until it is closed. Raise DataError if
    another one does."""
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        # Without locks two writers are not kept apart, but a single one, the usual case, works.
        with suppress(NoLocks):
            if not lock(file, path):
                file.close()
                raise DataError(
                    f"{path} is being written by another process; let that one end first"
                )
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate()
                return file
        file.close()  # another process renamed or removed it between open and lock: try again


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int) -> None:
    """Append `source` to `target` within the kernel; a file system that can shares the blocks
    instead of copying them."""
    target.flush()
    copied = 0
    # Two file systems, or one or a platform that cannot: see below.
    with suppress(OSError, AttributeError):
        while copied < num_bytes and (
            step := os.copy_file_range(source.fileno(), target.fileno(), num_bytes - copied)
        ):
            copied += step
    target.seek(0, os.SEEK_END)
    source.seek(copied)
    shutil.copyfileobj(source, target, 1 << 24)
