"""The band that a run's losses are expected in, and a warning where a validation is outside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Band = Callable[[Sequence[int] | np.ndarray], np.ndarray]
"""Returns low, middle and high of the loss after each of some steps, as [3, steps]; NaN where
nothing is known."""


class BandSink:
    """Sink that says when a validation loss leaves the band, and when it is back."""

    name = "observe.ladder"

    def __init__(self, band: Band, say: Callable[[str], None]):
        self._band, self._say = band, say
        self._was_outside = False

    def step(self, record: dict[str, float]) -> None:
        pass

    def evaluation(self, record: dict[str, float]) -> None:
        loss = record.get("valid_loss")
        if loss is None:
            return
        step = int(record["step"])
        low, middle, high = (float(x) for x in self._band([step])[:, 0])
        if np.isnan(middle):
            return
        # A loss that is not a number is outside, too.
        is_outside = not low <= loss <= high
        if is_outside != self._was_outside:
            where = "within"
            if is_outside:
                where = "below" if loss < low else "above"
            warning = "warning: " if is_outside else ""
            self._say(
                f"{warning}step {step:,}: validation loss {loss:.4f} is {where} what the ladder predicts, "
                f"{middle:.4f} ({low:.4f} to {high:.4f})"
            )
        self._was_outside = is_outside

    def tasks(self, record: dict[str, float]) -> None:
        pass

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        pass

    def close(self, status: str) -> None:
        pass
