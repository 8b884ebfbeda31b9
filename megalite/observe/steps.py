"""Steps on their way to the recorder. A GPU runs behind the host, which would wait for it if it asked for the loss of
every step at once."""

from __future__ import annotations

import contextlib
from collections import deque
from types import TracebackType

import torch
from torch import Tensor

from megalite.observe.recorder import Recorder
from megalite.observe.throughput import Meter, Tick

Record = dict[str, float | Tensor]
"""Of a step. Tensors are numbers on the device; those of bool are flags, written down as 1 where they are set."""


class StepLog:
    """Hands on the record of each step when the device has come to its end, in order. The `with` ends when all are
    written; when it ends by an error, what the device has done by then is."""

    def __init__(self, recorder: Recorder | None, meter: Meter):
        self._recorder, self._meter = recorder, meter
        self._waiting: deque[tuple[Record, Tensor, Tick]] = deque()

    def add(self, record: Record, tokens: int) -> None:
        """The end of a step of so many tokens. Waits for nothing."""
        if self._recorder is None:
            return
        numbers = torch.stack([value for value in record.values() if isinstance(value, Tensor)])
        # To pinned memory; the tick behind it tells when they are there.
        self._waiting.append((record, numbers.to("cpu", non_blocking=True), self._meter.tick(tokens)))
        self._write_passed()

    def wait(self) -> None:
        """Until all steps so far are written."""
        while self._waiting:
            self._write()

    def _write_passed(self) -> None:
        while self._waiting and self._waiting[0][2].passed():
            self._write()

    def _write(self) -> None:
        assert self._recorder is not None
        record, numbers, tick = self._waiting.popleft()
        times = tick.read()  # waits
        values = iter(numbers.tolist())
        here = {key: next(values) if isinstance(value, Tensor) else value for key, value in record.items()}
        unset = {key for key, x in record.items() if isinstance(x, Tensor) and x.dtype == torch.bool and not here[key]}
        self._recorder.step({key: value for key, value in here.items() if key not in unset} | times)

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            return
        # A device that failed, or waits for a rank that did, never comes to the rest: it is not waited for.
        with contextlib.suppress(Exception):
            self._write_passed()
