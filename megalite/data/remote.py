"""Remote objects as local files: a cache of this node into which only the blocks that are read are
fetched.

A cached object is a folder of two files. `data` is as long as the object and sparse: each block is
stored at its offset in the object, so that it is mapped like any local file. `present` has one byte
per block, set once the block is complete and on the disk. Whoever fetches a block holds a lock on
its byte, which the kernel releases when a process is killed: all processes of a node fetch a block
once, and a half-written one is fetched again. The folder's name holds the object's size and
version, so that a changed object is another folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from rich.console import Console

from megalite.data.store import REQUEST_BYTES, Store
from megalite.errors import DataError
from megalite.utils.locks import lock_byte

# Shuffled samples are a few KiB each, from all over the object: most of a larger block would be
# fetched too early.
BLOCK_BYTES = 256 << 10
BLOCKS_PER_REQUEST = REQUEST_BYTES // BLOCK_BYTES  # neighbours come together
# What a process holds in memory, and what others may wait for, at most.
BLOCKS_PER_ROUND = 32 * BLOCKS_PER_REQUEST
THREADS = 32
POLL_SECONDS = 0.01
ATTEMPTS = 100
"""Times that a folder is made which other processes remove."""
SECONDS_PER_LINE = 5.0

Int64s = npt.NDArray[np.int64]
_FETCHING: dict[Path, threading.Lock] = {}
"""Locks by object. File locks do not exclude threads that share an open file."""


def cache_folder() -> Path:
    """Return the cache's folder on this machine: a subfolder of $MEGALITE_CACHE or
    $XDG_CACHE_HOME/megalite, named after the host, because a home directory may be shared by
    machines that do not see each other's writes at once. Raise DataError for a user without a
    home."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "megalite"
    try:
        folder = Path(os.environ.get("MEGALITE_CACHE") or default).expanduser()
    except RuntimeError:
        raise DataError(
            "this user has no home, where copies of objects are kept; set MEGALITE_CACHE to a folder for them"
        ) from None
    return folder / socket.gethostname()


def local_copy(url: str) -> Path:
    """Fetch the whole object into the cache and return its path. Raise DataError."""
    return CachedObject(url).whole()


class CachedObject:
    """Holds one object and its part in the cache: the file `path` is as long as the object, and
    zeros where nothing was fetched. Opening it fetches nothing. Raises DataError if the object is
    missing or has no version to tell it from a changed one."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._store = Store(url)
        self._status = self._store.status()
        if not self._status.version:
            raise DataError(
                f"{url}: its server tells no version or date, so that a changed object would be taken for the one in "
                "the cache; copy it to a disk"
            )
        self.size = self._status.size
        root, name = cache_folder(), re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-80:]
        others = f"{name}-{_digest(url)}"
        self._folder = root / f"{others}-{_digest(self._status, BLOCK_BYTES)}"
        self.path = self._folder / "data"
        try:
            self._data = _open_in_use(self.path, self.size)
            _remove_unused(folder for folder in root.glob(f"{others}-*") if folder != self._folder)
            num_blocks = -(-self.size // BLOCK_BYTES)
            self._locks = open(self._folder / "present", "a+b", buffering=0)  # noqa: SIM115
            self._locks.truncate(max(num_blocks, 1))  # an empty file cannot be mapped
            # Shared with other processes through the mapping; as an array of its own class it would
            # be slow to index.
            self._present = np.asarray(
                np.memmap(self._locks, np.bool_, "r+", shape=max(num_blocks, 1))
            )
        except OSError as error:
            raise self._unusable(error) from None
        self._one_at_a_time = _FETCHING.setdefault(self.path, threading.Lock())

    def fetch(self, starts: Int64s, lengths: Int64s) -> None:
        """Bring bytes [starts[i], starts[i] + lengths[i]) into `path`, all [n]. Raise IndexError
        for bytes beyond the object, and DataError if they cannot be fetched."""
        if not lengths.all():
            starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        if not starts.size:
            return
        ends = starts + lengths
        if starts.min() < 0 or ends.max() > self.size:
            raise IndexError(f"bytes {starts.min()} to {ends.max()} are not all in {self.url}")
        first, last = starts // BLOCK_BYTES, (ends - 1) // BLOCK_BYTES
        counts = last - first + 1
        # Fast path: samples are shorter than blocks, so that first and last block are usually all
        # there is to check.
        if counts.max() <= 2 and self._present[first].all() and self._present[last].all():
            return
        blocks = np.unique(
            np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        )
        if not self._present[blocks].all():
            with self._one_at_a_time:
                self._fetch(blocks)

    def whole(self) -> Path:
        """Fetch the whole object and return `path`. Raise DataError."""
        self.fetch(np.zeros(1, np.int64), np.full(1, self.size))
        return self.path

    def _fetch(self, blocks: Int64s) -> None:
        """Download the missing blocks, in rounds, or wait until other processes have them."""
        said = time.monotonic()
        while (missing := blocks[~self._present[blocks]]).size:
            mine = np.empty(0, np.int64)
            try:
                mine = self._lock(missing)
                # Check again: another process may have completed a block before it was locked here.
                self._download(mine[~self._present[mine]])
            except OSError as error:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if not (is_full and _remove_unused(self._folder.parent.iterdir())):
                    raise self._unusable(error) from None
            finally:
                for block in mine.tolist():
                    lock_byte(self._locks, fcntl.F_UNLCK, block)
            if not mine.size:
                time.sleep(POLL_SECONDS)
            if time.monotonic() - said >= SECONDS_PER_LINE:
                said = time.monotonic()
                done = int(np.count_nonzero(self._present[blocks]))
                self._say(
                    f"{done * BLOCK_BYTES / 1e6:,.0f} of {len(blocks) * BLOCK_BYTES / 1e6:,.0f} MB fetched"
                )

    def _lock(self, blocks: Int64s) -> Int64s:
        """Lock blocks that no other process is fetching, and return these. It never waits, so that
        no deadlock is possible."""
        mine: list[int] = []
        for block in blocks.tolist():
            try:
                lock_byte(self._locks, fcntl.F_WRLCK, block)
            except (BlockingIOError, PermissionError):  # which of them, differs by system
                continue
            mine.append(block)
            if len(mine) == BLOCKS_PER_ROUND:
                break
        return np.array(mine, np.int64)

    def _download(self, blocks: Int64s) -> None:
        """Fetch locked blocks in parallel requests, sync them to disk, and mark them present."""
        if not blocks.size:
            return
        stop, runs = threading.Event(), _runs(blocks)
        with ThreadPoolExecutor(min(THREADS, len(runs)), "megalite-fetch") as pool:
            try:
                copies = [pool.submit(self._copy, run, stop) for run in runs]
                while True:
                    done, under_way = wait(copies, SECONDS_PER_LINE, FIRST_EXCEPTION)
                    for copy in done:
                        copy.result()
                    if not under_way:
                        break
                    self._say(
                        f"waiting for {len(blocks) * BLOCK_BYTES / 1e6:,.0f} MB {self._store.trouble}"
                    )
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)
        os.fsync(self._data.fileno())  # or a power cut could leave `present` without the data
        # Ask after reading: everything read so far then belongs to the version that this answer
        # names.
        if self._store.status() != self._status:
            raise DataError(
                f"{self.url} changed while it was read; start again to use what it is now"
            )
        # Last of all: another process may read a block as soon as this says that it is there.
        self._present[blocks] = True

    def _copy(self, run: Int64s, stop: threading.Event) -> None:
        """Fetch one run of neighbouring blocks and write it to its place."""
        start, end = int(run[0]) * BLOCK_BYTES, min((int(run[-1]) + 1) * BLOCK_BYTES, self.size)
        data = memoryview(self._store.read(start, end, stop))
        while data:
            written = os.pwrite(self._data.fileno(), data, end - len(data))
            data = data[written:]

    def _say(self, what: str) -> None:
        """Print one line about the progress on stderr."""
        Console(stderr=True).print(f"{self.url}: {what}", highlight=False, markup=False)

    def _unusable(self, error: OSError) -> DataError:
        """Return the error for a cache that cannot be written."""
        return DataError(
            f"{self.url}: its cache {self._folder} cannot be used: {error.strerror}; let MEGALITE_CACHE name a folder "
            "on a disk of this machine with enough room"
        )


def _digest(*parts: object) -> str:
    """Return a short digest of `parts`, for a folder's name."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _runs(blocks: Int64s) -> list[Int64s]:
    """Split ascending blocks into runs of neighbours, each at most as long as a request may be."""
    gaps = np.flatnonzero(np.diff(blocks) > 1) + 1
    pieces = np.split(blocks, gaps)
    return [
        run[i : i + BLOCKS_PER_REQUEST]
        for run in pieces
        for i in range(0, len(run), BLOCKS_PER_REQUEST)
    ]


def _open_in_use(path: Path, size: int) -> IO[bytes]:
    """Open the file, created with `size` bytes. While it is open, `_remove_unused` leaves its
    folder alone. Raise OSError."""
    for attempt in range(ATTEMPTS):
        # Not `exist_ok`, which then checks that it is a folder: it may be removed in between.
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir(mode=0o700, parents=True)
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
            fcntl.flock(file, fcntl.LOCK_SH)
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate(size)
                return file
        except FileNotFoundError:
            # The folder was removed meanwhile; or a folder above it is a link that leads nowhere,
            # such as to a disk that is not mounted.
            if attempt == ATTEMPTS - 1:
                raise
    raise OSError(errno.EBUSY, "other processes remove it as often as it is made")


def _remove_unused(folders: Iterable[Path]) -> int:
    """Remove the folders that no process uses, and return how many there were."""
    removed = 0
    for folder in folders:
        try:
            with open(folder / "data", "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Renamed first, so that nobody sees it half removed: an old `present` beside a new
                # `data` would lie.
                gone = folder.rename(folder.with_name(f"{uuid.uuid4().hex}.removed"))
        except OSError:
            continue
        shutil.rmtree(gone, ignore_errors=True)
        removed += 1
    return removed
