"""Tensor and sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022): the modules that
replace linear, embedding and loss modules, and the conjugate pairs of collectives between them.

Every matrix is cut over the tensor axis: column-parallel (output rows) then row-parallel (input
columns), so that a block communicates once on its way in and once on its way out.

               without sequence parallelism          with: activations between blocks are [B, T/n, D]
    way in     forward nothing, backward all-reduce   forward all-gather, backward reduce-scatter   RegionInput
    way out    forward all-reduce, backward nothing   forward reduce-scatter, backward all-gather   leave
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megalite.comm.collectives import (
    Result,
    all_gather,
    all_reduce,
    reduce_scatter,
    start_gather_along,
    start_reduce_whole,
    start_scatter_along,
)
from megalite.comm.mesh import Axis
from megalite.kernels.linear import (
    ALONE,
    AS_GIVEN,
    InputCollectives,
    Recipe,
    WeightGradStore,
    WgradCallback,
    linear,
)
from megalite.kernels.loss import LossTerms, cross_entropy, linear_cross_entropy
from megalite.models.lora import LoraLinear, Updates

SEQUENCE = 1
"""Activations are [batch, sequence, …]."""


class _Leave(Function):
    """All-reduce in the forward pass, identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        # X is always the fresh output of a product or look-up, which nothing else needs.
        ctx.mark_dirty(x)
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScatterSequence(Function):
    """Reduce-scatter along the sequence in the forward pass, all-gather in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis, SEQUENCE), None


@dataclass(frozen=True)
class RegionInput(InputCollectives):
    """The collectives on the way into a tensor-parallel region, as `kernels.linear` asks for
    them."""

    axis: Axis
    sequence: bool

    def start_gather(self, x: Tensor) -> Result:
        return start_gather_along(x, self.axis, SEQUENCE) if self.sequence else lambda: x

    def start_reduce(self, grad_x: Tensor) -> Result:
        """Start summing the input's gradient over the tensor ranks; under sequence parallelism each
        rank keeps its slice."""
        if self.sequence:
            return start_scatter_along(grad_x, self.axis, SEQUENCE)
        return start_reduce_whole(grad_x, self.axis)


class _Enter(Function):
    """Enter a tensor-parallel region apart from the linear layer that usually does it
    (`kernels.linear`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, region: RegionInput) -> Tensor:
        ctx.region = region
        # Without `sequence` every rank has all of x already: a new tensor on the same memory.
        return region.start_gather(x)() if region.sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.region.start_reduce(grad)(), None


def enter(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Enter a tensor-parallel region: return whole features of the whole sequence, whose gradient
    is summed over the tensor ranks (Megatron's copy-to-region; gather-from-sequence-region under
    sequence parallelism)."""
    return x if axis.size == 1 else _Enter.apply(x, RegionInput(axis, sequence))


def leave(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Sum partial outputs `x` over the tensor ranks (Megatron's reduce-from-region; reduce-scatter
    under sequence parallelism, where each rank keeps [B, T/n, D]). Without `sequence`, the sum
    overwrites `x`."""
    if axis.size == 1:
        return x
    return (_ScatterSequence if sequence else _Leave).apply(x, axis)


class _Parallel(nn.Module):
    """Keep what every tensor-parallel module knows: its axis, and whether sequence parallelism is
    on."""

    def __init__(self, axis: Axis, sequence: bool):
        super().__init__()
        self.axis, self.sequence = axis, sequence


class ParallelLinear(_Parallel):
    """Hold this rank's part of a linear layer's weight.

    An engine that takes weight-gradient GEMMs sets `wgrad_callback`; without it, autograd computes
    the gradient. `later` defers the GEMMs for a zero-bubble schedule. `apply_fp8` sets
    `recipe`."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        axis: Axis,
        sequence: bool,
        later: WeightGradStore | None = None,
    ):
        super().__init__(axis, sequence)
        self.weight, self.bias, self.later = weight, bias, later
        self.region = RegionInput(axis, sequence)
        self.wgrad_callback: WgradCallback | None = None
        self.updates: Updates | None = None
        self.recipe: Recipe = AS_GIVEN

    def multiply(
        self, x: Tensor, bias: Tensor | None, collectives: InputCollectives = ALONE
    ) -> Tensor:
        """Return x · Wᵀ + `bias`; `collectives` communicate x."""
        return linear(
            x, self.weight, bias, collectives, self.wgrad_callback, self.later, self.recipe
        )

    def adapt(self, linear: LoraLinear, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take over the LoRA adapters of `linear`; `parameters` holds this rank's part of their
        weights, by name."""
        self.updates, self.dropout = linear.updates, linear.dropout
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


class ColumnParallelLinear(ParallelLinear):
    """Hold some of the output rows (column-parallel); return those output features of the whole
    sequence."""

    def forward(self, x: Tensor) -> Tensor:
        if self.updates is None:
            return self.multiply(x, self.bias, self.region)
        out = self.multiply(x, self.updates.product_bias(self.bias), self.region)
        # The low-rank features are communicated, which are few, and not those of `x`.
        # `out` came out of a region input of its own: `x` here is what each rank had before it.
        return self.updates.add(self, x, out, self.axis.size, self._enter, self.bias)

    def adapt(self, linear: LoraLinear, parameters: Mapping[str, nn.Parameter]) -> None:
        super().adapt(linear, parameters)
        if self.dropout and self.sequence:
            # Masks follow from a token's place in the whole sequence, of which this rank has a
            # slice.
            self.dropout.shard = (self.axis.rank, self.axis.size)

    def _enter(self, low: Tensor) -> Tensor:
        return _Enter.apply(low, self.region)


class RowParallelLinear(ParallelLinear):
    """Hold some of the input columns (row-parallel). The partial outputs are summed over the tensor
    ranks, with what adapters add to them; then the whole bias is added once."""

    def forward(self, x: Tensor) -> Tensor:
        # Added on each rank, the bias would be in the sum as many times as there are ranks.
        partial_out = self.multiply(x, None)
        if self.updates:
            # A row's norm is over all its columns, of which this rank has some.
            total = partial(all_reduce, axis=self.axis)
            partial_out = self.updates.add(self, x, partial_out, total=total)
        out = leave(partial_out, self.axis, self.sequence)
        return out if self.bias is None else out + self.bias

    def adapt(self, linear: LoraLinear, parameters: Mapping[str, nn.Parameter]) -> None:
        super().adapt(linear, parameters)
        if self.dropout:
            # Likewise from a feature's place among all input features, of which this rank has some
            # columns.
            self.dropout.features = (self.axis.rank, self.axis.size)


class ReplicatedLinear(ParallelLinear):
    """Hold the whole weight and take whole features, of this rank's slice of the sequence or of all
    of it: each linear on one tensor rank, and on several those that are not cut (a router of
    experts). Nothing is communicated; the row of the weight says whether its gradient is summed
    over the tensor ranks."""

    def forward(self, x: Tensor) -> Tensor:
        if self.updates is None:
            return self.multiply(x, self.bias)
        out = self.multiply(x, self.updates.product_bias(self.bias))
        return self.updates.add(self, x, out, bias=self.bias)


class VocabParallelEmbedding(_Parallel):
    """Hold some rows of the vocabulary; tokens of other ranks contribute zero to the sum over the
    tensor ranks."""

    def __init__(self, weight: nn.Parameter, axis: Axis, sequence: bool):
        super().__init__(axis, sequence)
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens [B,T]. Returns [B,T,D], or [B,T/n,D] under sequence parallelism."""
        # Rank r has rows [r · V/n, (r + 1) · V/n). Tokens of other ranks look up row 0 and are
        # zeroed, so that every shape is known without asking which tokens came.
        row = tokens - self.axis.rank * self.weight.shape[0]
        elsewhere = (row < 0) | (row >= self.weight.shape[0])
        found = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return leave(found.masked_fill(elsewhere[..., None], 0.0), self.axis, self.sequence)


class SequenceCutEmbedding(_Parallel):
    """Replicated position embedding that looks up only the positions of this rank's slice of the
    sequence."""

    def __init__(self, weight: nn.Parameter, axis: Axis):
        super().__init__(axis, sequence=True)
        self.weight = weight

    def forward(self, positions_BT: Tensor) -> Tensor:
        return F.embedding(
            positions_BT.chunk(self.axis.size, SEQUENCE)[self.axis.rank], self.weight
        )


class _SumOverRanks(Function):
    """Sum over ranks, all of which use the result for features of their own: so its gradient is
    summed over ranks, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Unlike in `_Leave`: there the sum is used alike by every rank, here each uses it for other
        # features and holds only its share of the gradient.
        return all_reduce(grad.clone(), ctx.axis), None


class FeatureCutRMSNorm(nn.Module):
    """Apply RMSNorm over features, and a weight, that are cut over the tensor ranks (OLMo 2
    normalises all heads of a token together). One number per token is communicated."""

    def __init__(self, weight: nn.Parameter, eps: float, axis: Axis):
        super().__init__()
        self.weight, self.eps, self.axis = weight, eps, axis

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), self.axis)
        # The mean is over features of all ranks.
        scale = torch.rsqrt(squares / (x.shape[-1] * self.axis.size) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class VocabParallelCrossEntropy(nn.Module):
    """Compute every token's loss from logits of which each rank holds some columns. Three numbers
    per token are communicated, no logits. The backward pass overwrites the logits."""

    def __init__(self, axis: Axis, vocab_size: int):
        super().__init__()
        self.axis, self.vocab_size = axis, vocab_size

    def forward(self, logits: Tensor, labels_BT: Tensor, terms: LossTerms | None = None) -> Tensor:
        columns = vocab_columns(logits.shape[-1], self.axis, self.vocab_size)
        return cross_entropy(logits, labels_BT, *columns, partial(combine, axis=self.axis), terms)


class ChunkedHead(ParallelLinear):
    """The output head and, with labels, the loss behind it: it never holds the logits of more than
    `rows` tokens."""

    def __init__(
        self, weight: nn.Parameter, axis: Axis, sequence: bool, vocab_size: int, rows: int
    ):
        super().__init__(weight, None, axis, sequence)
        self.vocab_size, self.rows = vocab_size, rows

    def forward(
        self, x: Tensor, labels_BT: Tensor | None = None, terms: LossTerms | None = None
    ) -> Tensor:
        """Return logits [B,T,V/n], or with labels the losses [B,T]; with `terms` as well
        [B,T,2]."""
        if labels_BT is None:
            return self.multiply(x, None, self.region)
        columns = vocab_columns(self.weight.shape[0], self.axis, self.vocab_size)
        # Once for the whole sequence, and not for each chunk: one collective.
        x = _Enter.apply(x, self.region)
        both = partial(combine, axis=self.axis) if self.axis.size > 1 else None
        return linear_cross_entropy(
            x, self.weight, labels_BT, self.rows, *columns, both, self.wgrad_callback, terms
        )


def vocab_columns(held: int, axis: Axis, vocab_size: int) -> tuple[int, int]:
    """Return (first column, number that are not padding) of the `held` columns of the vocabulary on
    this rank."""
    # The vocabulary is padded to equal parts: the last ranks may have fewer columns that count, or
    # none.
    first = axis.rank * held
    return first, min(max(vocab_size - first, 0), held)


def combine(lse: Tensor, target: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Combine each rank's log-sum-exp and target logit into those over the whole vocabulary."""
    # Shifted by the largest, no exponential overflows.
    largest = all_reduce(lse.clone(), axis, dist.ReduceOp.MAX)
    # One message for all sums.
    sums = all_reduce(torch.cat(((lse - largest).exp()[None], target.view(-1, len(lse)))), axis)
    return largest + sums[0].log(), sums[1:].view_as(target)
