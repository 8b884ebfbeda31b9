"""Thread pools for work on texts beside the event loop: small texts do not wait for large ones, and
only a bounded amount waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from megalite.infer.serving.engine import Overloaded

SMALL_BYTES = 64 << 10
LARGE_AT_ONCE = 8
"""Number of largest requests that may wait to be tokenized."""
BYTES_PER_TOKEN = 64
"""More bytes per token than any text has: a text longer than this for each token that fits is
refused without tokenizing."""
T = TypeVar("T")


class Lane:
    """Runs work in a pool of threads, with a limit on the bytes that wait."""

    def __init__(self, name: str, num_threads: int, most_bytes: int):
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        # Only the event loop's thread changes `_bytes`, so that it needs no lock.
        self._bytes, self._most_bytes = 0, most_bytes

    async def run(self, work: Callable[[], T], num_bytes: int) -> T:
        """Run `work` and return its result. Raise Overloaded if too much waits already; a single
        text is always accepted."""
        # A text that is larger than all that may wait is taken where nothing else waits.
        if self._bytes and self._bytes + num_bytes > self._most_bytes:
            raise Overloaded("too many large texts wait already: try again later")
        self._bytes += num_bytes
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._bytes -= num_bytes

    def close(self) -> None:
        """Stop the threads, and cancel what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Lanes:
    """Holds a lane for small texts and one for large ones."""

    def __init__(self, max_bytes: int):
        """Create both lanes. `max_bytes` is the largest request."""
        # Hugging Face's tokenizers release the GIL while they encode, so that threads suffice.
        self._small = Lane("tokenize", 2, 256 * SMALL_BYTES)
        self._large = Lane("tokenize-large", 1, LARGE_AT_ONCE * max_bytes)

    async def run(self, work: Callable[[], T], num_bytes: int) -> T:
        """Run `work` and return its result; `num_bytes` of text decide the lane. Raise
        Overloaded."""
        lane = self._small if num_bytes <= SMALL_BYTES else self._large
        return await lane.run(work, num_bytes)

    def close(self) -> None:
        """Close both lanes."""
        self._small.close()
        self._large.close()
