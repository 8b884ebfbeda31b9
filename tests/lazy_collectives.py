"""Collectives that do nothing until they are waited for.

gloo over loopback has nearly always finished before its result is read, so that a missing wait goes
unseen on a CPU and reads weights in flight on a cluster. Here `start_*` only takes note; messages
begin in the wait. Whoever reads a result too early finds what was there before, and whoever changes
a buffer that is still to be sent sends the change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from megalite.comm import collectives


class _Later:
    """A work that begins when it is waited for."""

    def __init__(self, begin: Any):
        self._begin, self._begun = begin, False

    def wait(self) -> None:
        if not self._begun:
            self._begun = True
            for work in self._begin():
                work.wait()


class _LazyDistributed:
    """torch.distributed, but that nothing asynchronous happens before its wait."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, *arguments: Any, async_op: bool = False, **options: Any) -> Any:
        if not async_op:
            return dist.all_reduce(*arguments, **options)
        return _Later(lambda: [dist.all_reduce(*arguments, async_op=True, **options)])

    def batch_isend_irecv(self, messages: list[dist.P2POp]) -> list[_Later]:
        return [_Later(lambda: dist.batch_isend_irecv(messages))]


@contextmanager
def lazy_collectives() -> Iterator[None]:
    """Make the collectives of this process lazy. All ranks must, as messages otherwise wait for
    each other."""
    collectives.dist = _LazyDistributed()  # type: ignore[assignment]
    try:
        yield
    finally:
        collectives.dist = dist
