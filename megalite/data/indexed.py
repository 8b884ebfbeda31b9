"""Token files on disk: Megatron-LM's `.bin/.idx` pair, byte for byte.

PREFIX.bin is the tokens end to end. PREFIX.idx is little-endian, packed and therefore unaligned,
for N sequences and D - 1 documents (a document is one or more sequences; megalite and Megatron's
own tool write one):

    0   magic `MMIDIDX\\0\\0`, u64 version = 1, u8 dtype code, u64 N, u64 D
    34  N x i32 lengths (tokens), N x i64 pointers (bytes into .bin), D x i64 first sequence of each document, then N

Labelled data has one file more, which Megatron-LM does not know: PREFIX.mask, a u8, u16 or i64 for
each token. 0: nothing is learned from it; else 1, or, where tokens or texts have classes, 1 + the
number of the class.

Token files that documents were taken out of have PREFIX.removed beside them: the numbers of these
documents, ascending, as i64. Their tokens are fillers, which nothing is learned from.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megalite.data import whole
from megalite.data.remote import CachedObject, local_copy
from megalite.data.store import Missing
from megalite.errors import DataError
from megalite.utils.outside import read_object, shown
from megalite.utils.spelling import instead_of
from megalite.utils.urls import is_url

MAGIC, VERSION = b"MMIDIDX\0\0", 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {
    code: np.dtype(name)
    for code, name in {
        1: "u1",
        2: "i1",
        3: "<i2",
        4: "<i4",
        5: "<i8",
        6: "<f8",
        7: "<f4",
        8: "<u2",
    }.items()
}
Array = npt.NDArray[Any]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype that Megatron writes for `vocab_size`: u16 below 65,500 tokens, which leaves
    room to pad the vocabulary, otherwise i32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


NOTED: dict[str, type] = {
    "vocab_size": int, "eod_id": int, "tokenizer": str, "tokenizer_fingerprint": str, "tokenized_by": str,
    "format": str, "labels": list, "inputs": list, "num_learned": int, "text_bytes": int,
}  # fmt: skip
"""What of a note is used, and what it is."""


def read_note(prefix: str) -> dict[str, Any]:
    """Return the content of PREFIX.json, which preprocessing writes beside its token files; empty
    if there is none. Raise DataError."""
    name = f"{prefix}.json"
    try:
        path = local_copy(name) if is_url(name) else Path(name)
    except Missing:
        return {}
    note = read_object(path, DataError) if path.exists() else {}
    for key, kind in NOTED.items():
        value = note.get(key)
        are_texts = not isinstance(value, list) or all(isinstance(item, str) for item in value)
        if value is not None and not (isinstance(value, kind) and are_texts):
            raise DataError(
                f"{name}: {key} = {shown(value)} is not what preprocessing writes there"
            )
    return note


MASKS = ("u1", "<u2", "<i8")
"""Dtypes that a mask may have."""


class IndexedDataset:
    """Maps the pair PREFIX.bin, PREFIX.idx into memory: opening costs the same for a thousand
    tokens and a trillion.

    If PREFIX is a URL, .idx is fetched as a whole, and of .bin only what `fetch` asks for; the rest
    of `tokens` reads as zeros. Opening checks in O(1) and raises DataError for a truncated or
    mismatched pair; `check` looks at everything else."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self._remote: CachedObject | None = None
        if is_url(self.prefix):
            self._remote = CachedObject(f"{prefix}.bin")
            self._index = CachedObject(f"{prefix}.idx")  # kept open, or the cache could evict it
            # .bin is a sparse file of the full size, filled as ranges are fetched.
            self._bin, self._idx = self._remote.path, self._index.whole()
        else:
            self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        for path in (self._bin, self._idx):
            if not path.is_file():
                if self.prefix.endswith((".bin", ".idx")) and Path(self.prefix).is_file():
                    raise DataError(
                        f"{self.prefix} is one of two files; give {self.prefix[:-4]}, without the ending"
                    )
                raise DataError(
                    f"{path} does not exist; `megalite preprocess` writes {self.prefix}.bin and .idx"
                    f"{instead_of(self.prefix, '.idx')}"
                )
        # Kept open for the fingerprint: a file that is deleted or replaced during a run stays what
        # the run reads, and a checkpoint must say what was read, and not fail for it.
        self._opened = [open(self._idx, "rb"), open(self._bin, "rb")]  # noqa: SIM115
        num_indices = self._read_header()
        num, lengths_end = self.num_sequences, HEADER.size + 4 * self.num_sequences
        # Plain arrays over one map: reading one element of a memmap takes several times as long.
        index: Array = np.memmap(self._opened[0], np.uint8, "r")
        self._lengths = np.frombuffer(index, "<i4", num, HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", num, lengths_end)
        self._documents = np.frombuffer(index, "<i8", num_indices, lengths_end + 8 * num)
        self.num_documents = num_indices - 1
        size = self._check_ends()
        self.num_tokens = size // self.dtype.itemsize
        self.tokens: Array = np.memmap(self._opened[1], self.dtype, "r")  # [num_tokens]
        self.mask = self._open_mask()
        self.removed = self._open_removed()
        """Numbers of the documents that were taken out, ascending; None for none."""

    def _open_mask(self) -> Array | None:
        """Return the mask, [num_tokens], or None. Raise DataError if its size does not match."""
        name = f"{self.prefix}.mask"
        self._remote_mask: CachedObject | None = None
        if self._remote is not None:
            try:
                self._remote_mask = CachedObject(name)
            except Missing:
                return None
        path = self._remote_mask.path if self._remote_mask else Path(name)
        if not path.is_file():
            return None
        size = path.stat().st_size
        dtype = next(
            (dtype for dtype in MASKS if size == np.dtype(dtype).itemsize * self.num_tokens), None
        )
        if dtype is None:
            raise DataError(
                f"{name} is {size} bytes long, which is not 1, 2 or 8 for each of {self.num_tokens} tokens; it does "
                "not belong to the .bin beside it: write or copy all of them again"
            )
        self._opened.append(open(path, "rb"))  # noqa: SIM115
        return np.memmap(self._opened[-1], dtype, "r")

    def _open_removed(self) -> Array | None:
        """Return the documents that were taken out. Raise DataError if they are none of this
        file's."""
        path = Path(f"{self.prefix}.removed")
        if self._remote is not None:
            try:
                path = CachedObject(f"{self.prefix}.removed").whole()
            except Missing:
                return None
        if not path.is_file():
            return None
        data = path.read_bytes()
        found = np.frombuffer(data[: len(data) // 8 * 8], "<i8")
        if len(data) % 8 or not len(found) or found[0] < 0 or found[-1] >= self.num_documents:
            found = np.zeros(2, "<i8")
        if (np.diff(found) <= 0).any():
            raise DataError(
                f"{self.prefix}.removed is damaged, or of other token files than those beside it: write or copy all "
                "of them again"
            )
        return found

    def is_removed(self, places: Array) -> Array:
        """Return whether each token is of a document that was taken out, shaped like `places`;
        False for negative ones."""
        if self.removed is None:
            return np.zeros(places.shape, bool)
        starts, stops = self._removed_ranges
        number = np.searchsorted(starts, places, side="right") - 1
        return (number >= 0) & (places < stops[np.maximum(number, 0)])

    @cached_property
    def _removed_ranges(self) -> tuple[Array, Array]:
        """Return where the documents that were taken out begin and end, both ascending. Every batch
        asks, and they may be many."""
        assert self.removed is not None
        numbers = self.removed.tolist()
        starts, stops = (
            np.array([self.document_start(number + end) for number in numbers]) for end in (0, 1)
        )
        return starts, stops

    def _read_header(self) -> int:
        """Read the header, set `dtype` and `num_sequences`, and return the number of document
        indices. Raise DataError."""
        file = self._opened[0]
        size = os.fstat(file.fileno()).st_size
        if size < HEADER.size:
            raise self._broken(f"is {size} bytes long, shorter than its {HEADER.size}-byte header")
        magic, version, code, num, num_indices = HEADER.unpack(file.read(HEADER.size))
        if magic != MAGIC:
            raise self._broken(
                f"starts with {magic!r}, not {MAGIC!r}: it is not an index of this format"
            )
        if version != VERSION:
            raise self._broken(f"has version {version}; only version {VERSION} is known")
        if code not in DTYPES:
            raise self._broken(f"has dtype code {code}; known codes are 1 to {max(DTYPES)}")
        if num == 0 and num_indices < 2:
            raise DataError(
                f"{self._idx} is of an empty token file: no document came out of what it was made of"
            )
        if num < 1 or num_indices < 1:
            raise self._broken(
                f"holds {num} sequences and {num_indices} document indices; both must be at least 1"
            )
        expected = HEADER.size + 12 * num + 8 * num_indices
        # Multimodal files end in one mode byte a sequence, with no flag.
        if size not in (
            expected,
            expected + num,
        ):
            raise self._broken(f"is {size} bytes long where its header asks for {expected}")
        self.dtype, self.num_sequences = DTYPES[code], int(num)
        return int(num_indices)

    def _check_ends(self) -> int:
        """Compare the last entries of the index with the size of .bin, and return that. Raise
        DataError."""
        first, last = int(self._documents[0]), int(self._documents[-1])
        if first != 0 or last != self.num_sequences:
            raise self._broken(
                f"has documents from sequence {first} to {last}, not from 0 to {self.num_sequences}"
            )
        size, itemsize = os.fstat(self._opened[1].fileno()).st_size, self.dtype.itemsize
        # O(1): the last entry tells whether the two files fit; `check` reads the rest.
        expected = int(self._pointers[-1]) + int(self._lengths[-1]) * itemsize
        if size != expected:
            raise self._broken(f"ends at byte {expected} of a .bin which is {size} bytes long")
        if size == 0 or size % itemsize:
            raise self._broken(f"promises {self.dtype.name} tokens, but .bin has {size} bytes")
        return size

    def _broken(self, why: str) -> DataError:
        """Return the error for a damaged pair."""
        return DataError(
            f"{self.prefix}.idx {why}; .bin and .idx are truncated or not a pair: write or copy both again"
        )

    def check(self, highest: int | None = None) -> None:
        """Read the whole index, and the mask if `highest` is given. Raise DataError for an
        impossible length, pointer or document, or a mask value above `highest`. A large file is
        read once and remembered (whole.py)."""
        files = [self._idx]
        if self.mask is not None and highest is not None:
            files.append(
                self._remote_mask.whole() if self._remote_mask else Path(f"{self.prefix}.mask")
            )
        seen = None
        if sum(path.stat().st_size for path in files) > whole.REMEMBERED_BYTES:
            seen = whole.Remembered(
                files, self.fingerprint(), f"mask to {highest}" if len(files) > 1 else ""
            )
            if seen:
                return
        if why := whole.find_in_index(
            self._lengths, self._pointers, self._documents, self.dtype.itemsize
        ):
            raise self._broken(why)
        if (
            self.mask is not None
            and highest is not None
            and (why := whole.find_in_mask(self.mask, highest))
        ):
            raise DataError(
                f"{self.prefix}.mask {why}; it must have 0 where nothing is learned, and 1 or the number of a class "
                f"from 1 on elsewhere, here {highest} at most: it is damaged, or of another kind of data"
            )
        if seen is not None:
            seen.remember()

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        # The default would pickle the mapped files' whole content.
        return IndexedDataset, (self.prefix,)

    def __len__(self) -> int:
        return self.num_sequences

    def fetch(self, starts: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Bring `tokens[starts[i] : starts[i] + lengths[i]]` onto this machine, all [n] or one
        number for all; nothing happens for local files. Raise DataError if that fails, and
        IndexError for tokens out of range."""
        if self._remote is not None:
            first, count = np.broadcast_arrays(
                np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
            )
            self._remote.fetch(
                first.ravel() * self.dtype.itemsize, count.ravel() * self.dtype.itemsize
            )
            if self._remote_mask is not None and self.mask is not None:
                size = self.mask.itemsize
                self._remote_mask.fetch(first.ravel() * size, count.ravel() * size)

    def __getitem__(self, i: int) -> Array:
        """Return the tokens of sequence i, [length], read-only and still on disk. Raise IndexError
        outside 0 … N - 1."""
        if not 0 <= i < self.num_sequences:
            raise IndexError(f"{self.prefix}: sequence {i} of {self.num_sequences}")
        start = int(self._pointers[i]) // self.dtype.itemsize
        return self.read(start, start + int(self._lengths[i]))

    def read(self, first: int, last: int) -> Array:
        """Return tokens [first, last), read-only and still on disk, fetched if need be. Raise as
        `fetch` does."""
        self.fetch(first, last - first)
        return self.tokens[first:last].view(np.ndarray)

    def lengths(self, first: int, last: int) -> Array:
        """Return the numbers of tokens of sequences [first, last), int32; a copy."""
        return np.array(self._lengths[first:last])

    def token_of_sequence(self, i: int) -> int:
        """Return the offset of sequence i's first token in `tokens`; for i = N, the end. Raise
        IndexError."""
        if not 0 <= i <= self.num_sequences:
            raise IndexError(f"{self.prefix}: sequence {i} of {self.num_sequences}")
        return int(self._pointers[i]) // self.dtype.itemsize if i < len(self) else self.num_tokens

    def document_start(self, d: int) -> int:
        """Return the offset of document d's first token in `tokens`; for d = num_documents, the
        end. Raise IndexError."""
        if not 0 <= d <= self.num_documents:
            raise IndexError(f"{self.prefix}: document {d} of {self.num_documents}")
        return self.token_of_sequence(int(self._documents[d]))

    def starts_of_documents(self, first: int, last: int) -> Array:
        """Return the offsets in `tokens` at which documents first … last begin, int64 [last - first
        + 1], as a copy. That of num_documents is the end."""
        sequences = np.array(self._documents[first : last + 1])
        low, high = int(sequences[0]), int(sequences[-1])
        # Pointers count bytes, and stand for sequences; the end has none of its own.
        starts = np.append(
            self._pointers[low:high], self.token_of_sequence(high) * self.dtype.itemsize
        )
        return starts[sequences - low] // self.dtype.itemsize

    def document_of(self, token: int) -> int:
        """Return the document that a token is in. Raise IndexError for one out of range."""
        if not 0 <= token < self.num_tokens:
            raise IndexError(f"{self.prefix}: token {token} of {self.num_tokens}")
        # The last that begins at it or before: earlier ones that begin there are empty.
        return bisect.bisect_right(range(self.num_documents), token, key=self.document_start) - 1

    def document_starts(self, first: Array, last: Array) -> tuple[Array, Array]:
        """Find by bisection the documents that begin within tokens [first[i], last[i]) for each i.
        Return how many there are, [n], and the offsets of all, ascending, int64."""
        return document_starts(self._documents, self._pointers, self.dtype.itemsize, first, last)

    def fingerprint(self) -> str:
        """Return a hexadecimal digest of the content: file sizes, and 64 slices of 4 KiB spread
        evenly over each file. The work is bounded, so that a change which keeps the sizes and lies
        between the slices goes unnoticed. It is read once: every checkpoint asks."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        remotes = (None, self._remote, self._remote_mask)
        for file, remote in zip(self._opened, remotes, strict=False):
            size = os.fstat(file.fileno()).st_size
            starts = np.linspace(0, max(size - 4096, 0), 64, dtype=np.int64)
            if remote is not None:
                remote.fetch(starts, np.full_like(starts, min(size, 4096)))
            digest.update(str(size).encode())
            for start in starts.tolist():
                # Not of the map, of which each page would bring its neighbours into memory.
                digest.update(os.pread(file.fileno(), 4096, start))
        if self.removed is not None:  # whole: what was taken out may lie between the slices
            digest.update(self.removed.tobytes())
        return digest.hexdigest()[:32]


def document_starts_reference(
    documents: Array, pointers: Array, itemsize: int, first: Array, last: Array
) -> tuple[Array, Array]:
    """Find the documents that begin within tokens [first[i], last[i]): `csrc/data/starts.cpp` in
    Python. `documents` and `pointers` are those of the index, `itemsize` the bytes of a token.
    (numpy's own search would copy the index, which is unaligned in its file.)"""

    def start(document: int) -> int:
        number = int(documents[document])
        # A document without a sequence at the end of the file: Megatron-LM's tool writes it for an
        # empty text.
        return int(pointers[number]) // itemsize if number < len(pointers) else 2**63 - 1

    numbers, found = range(len(documents) - 1), []
    for begin, end in zip(first.tolist(), last.tolist(), strict=True):
        low = bisect.bisect_left(numbers, begin, key=start)
        high = bisect.bisect_left(numbers, end, lo=low, key=start)
        found.append([start(document) for document in range(low, high)])
    return np.array([len(of_row) for of_row in found], np.int64), np.array(
        [x for row in found for x in row], np.int64
    )


try:
    from megalite._data import document_starts
except ImportError:  # installed without a compiler
    document_starts = document_starts_reference
