"""Work with texts beside the event loop: small texts do not wait for large ones, and no more wait than fits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from megalite.infer.serving.engine import Overloaded

SMALL_BYTES = 64 << 10
LARGE_AT_ONCE = 8
"""Largest requests that may wait to be tokenized."""
BYTES_PER_TOKEN = 64
"""No text has so many: one that has more than this for each token that fits is refused before it is tokenized."""
T = TypeVar("T")


class Lane:
    def __init__(self, name: str, num_threads: int, most_bytes: int):
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._bytes, self._most_bytes = 0, most_bytes

    async def run(self, work: Callable[[], T], num_bytes: int) -> T:
        """Raises Overloaded where too much waits already; a text alone is always taken."""
        if self._bytes and self._bytes + num_bytes > self._most_bytes:
            raise Overloaded("too many large texts wait already: try again later")
        self._bytes += num_bytes
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._bytes -= num_bytes

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class Lanes:
    def __init__(self, max_bytes: int):
        """`max_bytes`: of a request."""
        self._small = Lane("tokenize", 2, 256 * SMALL_BYTES)
        self._large = Lane("tokenize-large", 1, LARGE_AT_ONCE * max_bytes)

    async def run(self, work: Callable[[], T], num_bytes: int) -> T:
        """Return what work gives, which takes as long as a text of so many bytes needs. Raises Overloaded."""
        lane = self._small if num_bytes <= SMALL_BYTES else self._large
        return await lane.run(work, num_bytes)

    def close(self) -> None:
        self._small.close()
        self._large.close()
