"""Losses of a layer's own, which are minimised beside the objective: a router's load balance or
z-loss (Shazeer et al. 2017; Zoph et al. 2022).

A layer may be on any pipeline stage, far from the objective. So its loss is not returned, but
attached to hidden states on their way through the layer: when their gradient comes back, the loss
gets its own (as in Megatron-LM's MoEAuxLossAutoScaler). A layer that is computed again in the
backward pass is met there once, as any other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import Function


class LayerLoss(nn.Module):
    """Attach a loss to hidden states. Its mean over the global batch, times `weight`, is added to
    what a step minimises; the step's record has the mean over all layers that have one of this
    name, as `layer_loss/NAME`.

    In evaluation, and outside of a training step, it does nothing."""

    def __init__(self, name: str, weight: float):
        super().__init__()
        self.name, self.weight = name, weight
        # Parallelism sets these three.
        self.over_row: Callable[[Tensor], Tensor] = lambda x: x
        """Sums over the ranks that hold parts of a sequence; each has the gradient of its own
        part."""
        self.row_share = 1.0
        """Share of a row's loss that counts on this rank: one divided by the number of these
        ranks."""
        self.counts = True
        """Whether this rank counts; False where another tensor rank holds the same tokens."""
        self._gradient: Tensor | None = None

    def begin(self, num_tokens: int, num_rows: int, gradient: Tensor) -> None:
        """Begin a step whose global batch has `num_tokens` tokens in `num_rows` rows. `gradient`,
        fp32 [], is what the engine's backward pass starts from: that of the objective's loss."""
        self.num_tokens, self._num_rows, self._gradient = num_tokens, num_rows, gradient
        self.mean = gradient.new_zeros(())
        """This rank's part of the loss's mean over the global batch, without `weight`, fp32 []: 0
        where it does not count."""

    @property
    def is_on(self) -> bool:
        """Return whether a loss that is attached now counts."""
        return self._gradient is not None and self.training

    def row_sum(self, x_BT: Tensor) -> Tensor:
        """Sum over the whole sequence of each row, of which this rank may hold a part: [B,T,…] →
        [B,…] fp32."""
        return self.over_row(x_BT.float().sum(1))

    def forward(self, x: Tensor, loss: Tensor) -> Tensor:
        """Return `x` with a loss attached: [B,T] of each token that is here, or [B] of each whole
        row, computed by way of `row_sum`."""
        if not self.is_on:
            return x
        of_rows = loss.dim() == 1
        # By the counts of the GLOBAL batch: the sum over micro-batches and ranks is then the mean.
        mean = loss.float().sum() / (self._num_rows if of_rows else self.num_tokens)
        return _Attach.apply(x, mean, self, self.row_share if of_rows else 1.0)

    def attached(self, mean: Tensor, share: float) -> Tensor:
        """Take note of a micro-batch's loss, of which `share` counts on this rank. Return its
        gradient."""
        assert self._gradient is not None
        if self.counts:
            # Noted in the backward pass and not in the forward, which recomputation would run
            # twice.
            self.mean += mean * share
        # Of the same scale as the objective's: with DeepSpeed it carries the engine's loss scale.
        return self._gradient * self.weight


@dataclass(frozen=True)
class LayerLosses:
    """The losses of the layers that a rank holds."""

    here: Sequence[LayerLoss]
    num_layers: Mapping[str, int]
    """How many layers of the whole model have a loss of each name; alike on all ranks."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Return the names of their metrics."""
        return tuple(f"layer_loss/{name}" for name in self.num_layers)

    def means(self, device: torch.device) -> Tensor:
        """Return this rank's part of the mean of each name over the global batch and the model's
        layers, fp32 [names]; over all ranks they add up."""
        # Names of which this rank has no layer as well: all ranks add the same vector.
        sums = {name: torch.zeros((), device=device) for name in self.num_layers}
        for loss in self.here:
            sums[loss.name] += loss.mean
        return torch.stack([total / self.num_layers[name] for name, total in sums.items()])


class _Attach(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, module: LayerLoss, share: float) -> Tensor:
        ctx.module, ctx.share = module, share
        ctx.save_for_backward(mean)
        # x goes on unchanged; only the graph now leads to `mean` as well.
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (mean,) = ctx.saved_tensors
        return grad, ctx.module.attached(mean, ctx.share), None, None
