"""Numbers computed on the device that the host reads some steps later, when reading them no longer
waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from megalite.health.stragglers import host_or_device_event

STEPS_LATER = 2
"""Steps between computing a number and reading it. A busy device is about one step behind its
host."""

Note = TypeVar("Note")


class Late(Generic[Note]):
    """Queues numbers on the device and hands them to the host STEPS_LATER steps later.

    The delay is counted in steps, not in time: every rank reads the same numbers at the same place
    of the same step, so that all ranks act on them together."""

    def __init__(self, device: torch.device):
        self._event = host_or_device_event(device)
        self._waiting: deque[tuple[int, Note, Tensor, Any]] = deque()

    def add(self, step: int, note: Note, numbers: Tensor) -> None:
        """Queue `numbers`, computed in step `step`, with a `note` that `take` returns beside
        them."""
        copy = numbers.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        if copy is numbers:  # on the CPU: the caller may go on to write into it
            copy = copy.clone()
        event = self._event()
        event.record()
        self._waiting.append((step, note, copy, event))

    def take(self, step: int, all_of_them: bool = False) -> Iterator[tuple[Note, list[Any]]]:
        """Yield (note, numbers) queued STEPS_LATER steps before `step` or earlier, in order, or
        `all_of_them`.

        Waits for the device where it has not come so far."""
        while self._waiting and (all_of_them or self._waiting[0][0] <= step - STEPS_LATER):
            _, note, numbers, event = self._waiting.popleft()
            event.synchronize()
            yield note, numbers.tolist()
