"""Numbers on the device that the host reads some steps later, when the device has long come past them: nothing has to
wait for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from megalite.health.stragglers import host_or_device_event

STEPS_LATER = 2
"""A device that is kept busy is one step behind its host, or nearly so."""

Note = TypeVar("Note")


class Late(Generic[Note]):
    """Every rank reads at the same place of the same step, so that what follows from it is done by all."""

    def __init__(self, device: torch.device):
        self._event = host_or_device_event(device)
        self._waiting: deque[tuple[int, Note, Tensor, Any]] = deque()

    def add(self, step: int, note: Note, numbers: Tensor) -> None:
        copy = numbers.to("cpu", non_blocking=True)  # into pinned memory, from a GPU
        copy = copy.clone() if copy is numbers else copy
        event = self._event()
        event.record()
        self._waiting.append((step, note, copy, event))

    def take(self, step: int, all_of_them: bool = False) -> Iterator[tuple[Note, list[Any]]]:
        """In step `step`: what was added STEPS_LATER steps ago or earlier, in order; or everything so far."""
        while self._waiting and (all_of_them or self._waiting[0][0] <= step - STEPS_LATER):
            _, note, numbers, event = self._waiting.popleft()
            event.synchronize()
            yield note, numbers.tolist()
