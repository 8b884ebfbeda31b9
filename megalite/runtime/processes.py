"""Processes that work for another one: workers, and signals while a process waits for another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


def worker_pool(
    workers: int, initializer: Callable[..., None], *arguments: object
) -> AbstractContextManager[Executor | None]:
    """Open a pool of processes that each begin with `initializer(*arguments)`, which calls
    `start_worker`. Gives None for one worker, which is this very process."""
    if workers == 1:
        return nullcontext()
    # Spawned, since a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    return _Pool(workers, context, initializer=initializer, initargs=arguments)


class _Pool(ProcessPoolExecutor):
    def submit(self, work: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        # This may start a worker. Ctrl-C reaches the whole group, and a worker among its imports
        # would answer it by a traceback: it inherits that the signal is blocked, until
        # `start_worker` has it ignored.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(work, *arguments, **named)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker() -> None:
    """Prepare a process of a pool: it tokenizes in one thread, ignores Ctrl-C, and ends with its
    parent."""
    # The processes are the parallelism.
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
    # The parent alone answers Ctrl-C. Ignored first: one that is pending must not come through.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    leave_with_parent()


@contextmanager
def handling(numbers: Iterable[int], handler: Handler) -> Iterator[None]:
    """Let `handler` answer the signals `numbers` until the block ends; then what answered them
    before does. For the main thread alone, as signals are."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def leave_with_parent() -> None:
    """End this worker when its parent ends: a parent that was killed outright cannot end its
    workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def leave() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
