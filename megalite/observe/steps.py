"""Delays the records of steps until the device has computed them. A GPU runs behind the host:
asking for the loss right after a step would make the host wait.
"""

from __future__ import annotations

import contextlib
from collections import deque
from types import TracebackType

import torch
from torch import Tensor

from megalite.observe.recorder import Recorder
from megalite.observe.throughput import Meter, Tick

Record = dict[str, float | Tensor]
"""Record of a step. Tensors are numbers [] on the device. Bool ones are flags: recorded as 1 if
set, else left out."""


class StepLog:
    """Hands each step's record to the recorder, in order, once the device has finished the step.

    Leaving the `with` block waits for all records. After an error only those are written that the
    device has finished.
    """

    def __init__(self, recorder: Recorder | None, meter: Meter):
        """Log nothing without a `recorder`, as on all ranks but the first. `meter` times the
        steps."""
        self._recorder = recorder
        self._meter = meter
        self._waiting: deque[tuple[Record, Tensor, Tick]] = deque()

    def add(self, record: Record, tokens: int) -> None:
        """Queue the `record` of the step that ends here and consumed `tokens`. Does not wait for
        the device."""
        if self._recorder is None:
            return
        numbers = torch.stack([value for value in record.values() if isinstance(value, Tensor)])
        # One copy into pinned memory; the tick after it in the stream tells when the numbers are
        # there.
        copy = numbers.to("cpu", non_blocking=True)
        self._waiting.append((record, copy, self._meter.tick(tokens)))
        self._write_passed()

    def wait(self) -> None:
        """Wait until all steps so far are recorded."""
        while self._waiting:
            self._write()

    def _write_passed(self) -> None:
        while self._waiting and self._waiting[0][2].passed():
            self._write()

    def _write(self) -> None:
        assert self._recorder is not None
        record, numbers, tick = self._waiting.popleft()
        times = tick.read()  # waits for the device, so that `numbers` are complete
        values = iter(numbers.tolist())  # stacked in the order of the record
        found: dict[str, float] = {}
        for key, value in record.items():
            if not isinstance(value, Tensor):
                found[key] = value
                continue
            number = next(values)
            if number or value.dtype != torch.bool:
                found[key] = number
        self._recorder.step(found | times)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
            return
        # A device that failed, or waits for a rank that did, never gets to the rest.
        with contextlib.suppress(Exception):
            self._write_passed()
