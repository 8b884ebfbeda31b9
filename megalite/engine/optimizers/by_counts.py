"""Load balance without a loss (Wang et al. 2024; DeepSeek-V3): the bias by which a router chooses
experts moves up for those that had fewer tokens of the global batch than the mean, and down for
those that had more."""

from __future__ import annotations

from torch import Tensor

from megalite.engine.optimizers import Shard


class ByCounts:
    """Updates selection biases. The gradient that it sees is each expert's tokens beyond the mean,
    times the number of experts: whole numbers, whose sum is exact up to 2^24, and its sign the same
    on every layout."""

    def __init__(self, rate: float):
        """`rate`: how much a step moves a bias."""
        self.rate = rate

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        return (divisor > 0).float() * self.rate  # a refused step moves nothing

    def update_(self, shard: Shard, common: Tensor) -> None:
        shard.master.sub_(shard.grad.sign() * common)
