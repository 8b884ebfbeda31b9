"""Read objects in stores (`s3://…`, `gs://…`, `hf://…`, whatever fsspec knows) in ranges, with
retries."""

from __future__ import annotations

import io
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from megalite.errors import DataError, Unreachable
from megalite.utils.urls import check_no_secret, is_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

REQUEST_BYTES = 8 << 20
READ_AHEAD = 4  # requests under way while a stream is read
ATTEMPTS = 9
LONGEST_PAUSE = 16.0  # seconds; with this many attempts a fault of half a minute is waited out
# fsspec's own s3fs, gcsfs and aiohttp are two dozen packages; obstore is one, and works outside of
# Python's lock.
OBSTORE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https")
# Names that stores have for an object's version, the most reliable first.
VERSIONS = ("e_tag", "ETag", "etag", "blob_id", "generation", "md5Hash", "sha")
DATES = (
    "last_modified",
    "LastModified",
    "Last-Modified",
    "mtime",
    "modificationTime",
    "modify",
    "created",
)
# Faults that a retry does not mend.
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError)
LASTING_IN_OBSTORE = re.compile(
    r"^(PermissionDenied|Unauthenticated|InvalidPath|NotSupported)Error|status code: 4(?!08|29)\d\d"
)


class Missing(DataError):
    """Raised for an object that does not exist."""


class Status(NamedTuple):
    """Holds size and version of an object."""

    size: int
    version: str  # empty where the store tells none


class Found(NamedTuple):
    """Holds one object found below a URL."""

    url: str
    size: int
    below: str  # its path inside the folder, or inside what comes before a glob's first wildcard; empty where it is it


class Store:
    """Reads the store of one URL. Every fault is raised as a DataError that names the URL, and is
    final: transient ones are retried first, with growing pauses."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.trouble = ""
        """The last fault, while it is being retried."""
        try:
            check_no_secret(url)
        except ValueError as error:
            raise DataError(str(error)) from None
        try:
            self._files, self._path = _open(url)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{url}: {error}; pip install 'megalite[remote]', or what fsspec needs for it"
            ) from None

    def status(self) -> Status:
        """Return size and version of the object as it is now. Raise DataError."""
        info = self._patiently(self._info)
        if info["type"] == "directory":
            raise DataError(f"{self.url} is a folder, not an object")
        if info.get("size") is None:
            raise DataError(
                f"{self.url}: its server does not say how long it is; copy it to a disk"
            )
        # A date last: it may stay the same where an object is written twice within a second.
        version = next((str(info[key]) for key in (*VERSIONS, *DATES) if info.get(key)), "")
        return Status(int(info["size"]), version)

    def read(self, start: int, end: int, stop: threading.Event | None = None) -> bytes:
        """Return the bytes [start, end). Setting the event `stop` ends the retries. Raise
        DataError."""

        def once() -> bytes:
            data = self._files.cat_file(self._path, start=start, end=end)
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes came of [{start}, {end})")
            return data

        return self._patiently(once, stop)

    def find(self) -> list[Found]:
        """Return the objects that the URL, a glob or a folder, matches, sorted. Raise DataError."""

        def once() -> list[Found]:
            plain = re.split(r"[*?[]", self._path, maxsplit=1)[0]
            if plain == self._path:
                matches = {
                    self._path: self._info()
                }  # the name in there lacks the bucket in obstore
            else:
                self._files.invalidate_cache()
                matches = self._files.glob(self._path, detail=True)
            # The part that a glob's wildcard matches counts as below: `*` must not match hidden
            # names.
            asked = self._path.rstrip("/") if plain == self._path else plain.rpartition("/")[0]
            folders = [name for name, info in matches.items() if info["type"] == "directory"]
            for folder in folders:
                matches |= self._files.find(folder.rstrip("/"), detail=True)
            return sorted(
                Found(self._files.unstrip_protocol(name), info["size"], name[len(asked) + 1 :])
                for name, info in matches.items()
                if info["type"] != "directory"
            )

        return self._patiently(once)

    def _info(self) -> dict[str, Any]:
        """Return fsspec's information about the object."""
        self._files.invalidate_cache()  # of listings, which some stores remember
        return self._files.info(self._path)

    def _patiently(self, once: Callable[[], Any], stop: threading.Event | None = None) -> Any:
        """Call `once` until it succeeds, at most ATTEMPTS times. Raise Missing, DataError for
        lasting faults, and Unreachable for others."""
        stop = stop or threading.Event()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                result = once()
            except Exception as error:  # each store has classes of its own for a lost connection
                if isinstance(error, FileNotFoundError):
                    raise Missing(f"{self.url} does not exist") from None
                # First line only: the rest may be the whole request, with its credentials.
                why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                lasts = isinstance(error, LASTING) or LASTING_IN_OBSTORE.search(why) is not None
            else:
                self.trouble = ""
                return result
            self.trouble = why
            # Randomized, so that clients do not all return to an overloaded server at the same
            # time.
            pause = min(0.25 * 2 ** (attempt - 1), LONGEST_PAUSE) * random.uniform(0.5, 1)
            if lasts or attempt == ATTEMPTS or stop.wait(pause):
                break
        raise (DataError if lasts else Unreachable)(
            f"{self.url} cannot be read (attempt {attempt}): {why}"
        )


def stream(url: str) -> Iterator[bytes]:
    """Yield the bytes of an object in order, with a few requests ahead of the reader. Raise
    DataError."""
    store, stop = Store(url), threading.Event()
    size = store.status().size
    ahead: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(READ_AHEAD, "megalite-stream") as pool:
        try:
            for start in range(0, size, REQUEST_BYTES):
                ahead.append(pool.submit(store.read, start, min(start + REQUEST_BYTES, size), stop))
                if len(ahead) > READ_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # also where the reader has had enough
            stop.set()
            pool.shutdown(cancel_futures=True)


def size_of(path: str) -> int:
    """Return the bytes of a file or an object. Raise OSError, and DataError for a URL."""
    return Store(path).status().size if is_url(path) else os.stat(path).st_size


def open_file(path: str) -> io.BufferedReader:
    """Open a file or an object for reading and seeking. Raise OSError, and DataError for a URL,
    also from later reads."""
    return io.BufferedReader(_ObjectFile(path)) if is_url(path) else open(path, "rb")


class _ObjectFile(io.RawIOBase):
    """Presents an object as a seekable raw file."""

    def __init__(self, url: str) -> None:
        self._store, self._position = Store(url), 0
        self.size = self._store.status().size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        )
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + min(len(buffer), REQUEST_BYTES), self.size)
        if end <= self._position:
            return 0
        data = self._store.read(self._position, end)
        buffer[: len(data)] = data
        self._position = end
        return len(data)


def _open(url: str) -> tuple[AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it."""
    import fsspec

    protocol = url.partition("://")[0]
    if protocol not in OBSTORE:
        return fsspec.url_to_fs(url)
    _use_obstore(protocol)
    # A plain http:// endpoint is the user's own choice. Retries are done here, so that obstore's
    # are off.
    return fsspec.url_to_fs(
        url, client_options={"allow_http": True}, retry_config={"max_retries": 0}
    )


@cache
def _use_obstore(protocol: str) -> None:
    """Register obstore as fsspec's implementation of a protocol."""
    from obstore.fsspec import register

    register(protocol)
