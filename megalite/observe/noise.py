"""The gradient noise scale (McCandlish et al. 2018): about the batch size, in sequences, above
which larger batches make steps hardly better.

A mean over b sequences has an expected squared norm of |G|² + S/b. Two sizes of batches in one step
give both: the global batch B, and the small ones of which its gradient is summed up anyway: what
one data rank has, before it is reduced over the ranks; under ZeRO-2, which reduces every
micro-batch, what it has of one. That costs a pass over the gradients, and no communication. Other
layouts have other small batches: the estimates differ, what they estimate does not. S and |G|² are
averaged over the measured steps before they are divided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.engine.buckets import BucketState
from megalite.engine.native import NativeEngine
from megalite.kernels.optimizer import sum_of_squares

DECAY = 0.95
"""Of the averages, over measured steps."""


class NoiseScale:
    """Measures the noise scale in steps that `begin` and `end`."""

    def __init__(self, engine: NativeEngine, mesh: Mesh):
        self._gradients, self._mesh = engine.gradients, mesh
        # Of S, of |G|², and of 1.
        self._averages = torch.zeros(3, dtype=torch.float64, device=mesh.device)

    def begin(self) -> None:
        """Begin to measure a step."""
        self._small = torch.zeros((), dtype=torch.float64, device=self._mesh.device)
        # Called with each bucket before it is reduced: the gradient of a small batch.
        self._gradients.observer = self._note

    def _note(self, bucket: BucketState, grads: Tensor) -> None:
        if self._is_measured(bucket):
            self._small += sum_of_squares(grads)

    def _is_measured(self, bucket: BucketState) -> bool:
        # The ends of a pipeline sum tied weights once a step, whatever the stage of ZeRO; experts
        # that ranks share have gradients of tokens of other ranks.
        return (
            self._gradients.counts(bucket)
            and not bucket.layout.tied
            and not bucket.layout.of_experts
        )

    def end(self, batch_size: int, num_small: int) -> Tensor:
        """Return the noise scale so far, in sequences, fp32 []. The step's global batch has
        `batch_size` sequences in `num_small` small batches. All ranks call it, when the gradients
        are reduced and not yet forgotten."""
        self._gradients.observer = None
        shards = [
            bucket.state("grad") for bucket in self._gradients.buckets if self._is_measured(bucket)
        ]
        big = sum_of_squares(*shards) if shards else torch.zeros_like(self._small)
        small, big = all_reduce(torch.stack((self._small, big)), self._mesh.world).unbind()
        # Losses are divided by the labels of the whole batch, so that with n = num_small a small
        # batch's gradient is n times too small: n² for its square, over n for the mean of the n, is
        # n.
        noise, signal = estimate(small * num_small, big, batch_size / num_small, batch_size)
        found = torch.stack((noise, signal, torch.ones_like(big)))
        # A step with bad numbers is as if it had not been.
        self._averages = torch.where(
            found.isfinite().all(), self._averages.lerp(found, 1 - DECAY), self._averages
        )
        return (self._averages[0] / self._averages[1]).float()

    def state(self) -> dict[str, Any]:
        return {"averages": self._averages.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        averages = [float(each) for each in state["averages"]]
        self._averages = torch.tensor(averages, dtype=torch.float64, device=self._mesh.device).view(
            3
        )


def estimate(
    small: Tensor, big: Tensor, small_size: float, big_size: float
) -> tuple[Tensor, Tensor]:
    """Return unbiased estimates of S and |G|² from the mean squared norm of gradients of
    `small_size` sequences, and that of one of `big_size`."""
    # Two equations E = |G|² + S / b, solved. With a single small batch, as large as the whole, both are
    # divided by zero, and the step does not count.
    noise = (small - big) / (1 / small_size - 1 / big_size)
    signal = (big_size * big - small_size * small) / (big_size - small_size)
    return noise, signal
