"""Tensor and sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022): the modules that replace linear,
embedding and loss modules, and the conjugate pairs of collectives between them.

Every matrix is cut over the tensor axis: column-parallel (output rows) then row-parallel (input columns), so that a
block communicates once on its way in and once on its way out.

               without sequence parallelism          with: activations between blocks are [B, T/n, D]
    way in     forward nothing, backward all-reduce   forward all-gather, backward reduce-scatter   _Linear
    way out    forward all-reduce, backward nothing   forward reduce-scatter, backward all-gather   leave
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from megalite.comm.mesh import ALONE, Axis
from megalite.kernels.loss import cross_entropy, linear_cross_entropy
from megalite.models.lora import LoraLinear, Updates

SEQUENCE = 1
"""Activations are [batch, sequence, …]."""


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)  # always the fresh output of a product or look-up, which nothing else needs
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScatterSequence(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter(x, axis, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.axis, SEQUENCE), None


class _Enter(Function):
    """The way in by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, sequence: bool) -> Tensor:
        ctx.axis, ctx.sequence = axis, sequence
        return all_gather(x, axis, SEQUENCE) if sequence else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _start_input_gradient(ctx, grad)(), None, None


def enter(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Enter a tensor-parallel region: return whole features of the whole sequence, whose gradient is summed over the
    tensor ranks (Megatron's copy-to-region; gather-from-sequence-region under sequence parallelism)."""
    return x if axis.size == 1 else _Enter.apply(x, axis, sequence)


def leave(x: Tensor, axis: Axis, sequence: bool) -> Tensor:
    """Out of a tensor-parallel region: every rank holds a part of the sum."""
    if axis.size == 1:
        return x
    return (_ScatterSequence if sequence else _Leave).apply(x, axis)


Deliver = Callable[[Tensor, Tensor, Tensor, bool], None]
"""Takes (parameter, grad [T,N], x [T,K], last): adds gradᵀ x to the parameter's gradient; `last` for the last, most
often only, such product of a micro-batch."""


class PutOff:
    """Weight-gradient products that a zero-bubble schedule (Qi et al. 2023) puts off until a pipeline would idle.

    `put` is called in a backward pass; `take`, after it, gives the function that computes what was put since."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []

    def put(self, product: Callable[[], None]) -> None:
        self._waiting.append(product)

    def take(self) -> Callable[[], None]:
        waiting, self._waiting = self._waiting, []

        def run() -> None:
            while waiting:  # what a product has kept is free as soon as it is computed
                with torch.no_grad():
                    waiting.pop(0)()

        return run


class _Linear(Function):
    """The way in and the product after it in one, for three reasons: under sequence parallelism only this rank's slice
    of the input is kept, and gathered again in the backward pass; the gradient of the input travels while that of the
    weight is computed; and that product goes straight to the engine, which sums it in fp32. Of a frozen weight there is
    no such product, and the input is not kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        sequence: bool,
        deliver: Deliver | None,
        later: PutOff | None,
    ) -> Tensor:
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_input else None)
        ctx.axis, ctx.sequence, ctx.of_bias = axis, sequence, bias is not None and of_bias
        ctx.deliver, ctx.later, ctx.parameter = deliver, later, weight
        out = F.linear(all_gather(x, axis, SEQUENCE) if sequence else x, weight, bias)
        # With a bias it comes as a view, in which autograd would let nobody turn positions in place.
        return out if bias is None else torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_rows = grad.flatten(0, -2)
        grad_bias = grad_rows.sum(0) if ctx.of_bias else None
        if x is None:
            grad_x = None if weight is None else _start_input_gradient(ctx, grad @ weight)()
            return grad_x, None, grad_bias, None, None, None, None
        if ctx.later:
            axis, sequence, deliver, parameter = ctx.axis, ctx.sequence, ctx.deliver, ctx.parameter
            ctx.later.put(
                lambda: deliver(
                    parameter, grad_rows, (all_gather(x, axis, SEQUENCE) if sequence else x).flatten(0, -2), True
                )
            )
            grad_x = None if weight is None else _start_input_gradient(ctx, grad @ weight)()
            return grad_x, None, grad_bias, None, None, None, None
        whole_x = start_gather_along(x, ctx.axis, SEQUENCE) if ctx.sequence else None
        input_gradient = None if weight is None else _start_input_gradient(ctx, grad @ weight)
        rows = (whole_x() if whole_x else x).flatten(0, -2)
        if ctx.deliver:
            grad_weight = ctx.deliver(ctx.parameter, grad_rows, rows, True)
        else:
            grad_weight = grad_rows.t() @ rows
        return input_gradient and input_gradient(), grad_weight, grad_bias, None, None, None, None


def _start_input_gradient(ctx: Any, grad_x: Tensor) -> Result:
    if ctx.sequence:
        return start_scatter_along(grad_x, ctx.axis, SEQUENCE)
    return start_reduce_whole(grad_x, ctx.axis)


class _Parallel(nn.Module):
    def __init__(self, axis: Axis, sequence: bool):
        super().__init__()
        self.axis, self.sequence = axis, sequence


class ParallelLinear(_Parallel):
    """An engine that takes products of weight gradients sets `deliver`; without one autograd gets the gradient."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        axis: Axis,
        sequence: bool,
        later: PutOff | None = None,
    ):
        super().__init__(axis, sequence)
        self.weight, self.bias, self.later = weight, bias, later
        self.deliver: Deliver | None = None
        self.updates: Updates | None = None

    def adapt(self, linear: LoraLinear, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take over the adapters of a linear module; `parameters` are this rank's of them."""
        self.updates, self.dropout = linear.updates, linear.dropout
        for name, parameter in parameters.items():
            self.register_parameter(name, parameter)


class ColumnParallelLinear(ParallelLinear):
    """Holds some of the output rows; gives those output features of the whole sequence."""

    def forward(self, x: Tensor) -> Tensor:
        out = _Linear.apply(x, self.weight, self.bias, self.axis, self.sequence, self.deliver, self.later)
        if self.updates is None:
            return out
        # The few features in between are what travels, not the many of `x`.
        return self.updates.add(self, x, out, self.axis.size, self._enter)

    def adapt(self, linear: LoraLinear, parameters: Mapping[str, nn.Parameter]) -> None:
        super().adapt(linear, parameters)
        if self.dropout and self.sequence:
            self.dropout.shard = (self.axis.rank, self.axis.size)

    def _enter(self, low: Tensor) -> Tensor:
        return _Enter.apply(low, self.axis, self.sequence)


class RowParallelLinear(ParallelLinear):
    """Holds some of the input columns; the products are summed over ranks, then the whole bias is added once. So is
    what adapters add to them."""

    def forward(self, x: Tensor) -> Tensor:
        alone = self.axis.size == 1
        product = _Linear.apply(x, self.weight, self.bias if alone else None, ALONE, False, self.deliver, self.later)
        if self.updates:
            product = self.updates.add(self, x, product)
        out = leave(product, self.axis, self.sequence)
        return out if alone or self.bias is None else out + self.bias

    def adapt(self, linear: LoraLinear, parameters: Mapping[str, nn.Parameter]) -> None:
        super().adapt(linear, parameters)
        if self.dropout:
            self.dropout.features = (self.axis.rank, self.axis.size)


class ReplicatedLinear(ParallelLinear):
    """Holds the whole weight, and is given whole features: of its part of the sequence, or of all of it. Nothing is
    communicated; the row of its weight says whether the gradient is summed over the tensor ranks (a router of
    experts)."""

    def forward(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self.weight, self.bias, ALONE, False, self.deliver, self.later)


class VocabParallelEmbedding(_Parallel):
    """Holds some of the vocabulary; tokens of other ranks contribute zero."""

    def __init__(self, weight: nn.Parameter, axis: Axis, sequence: bool):
        super().__init__(axis, sequence)
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.axis.rank * self.weight.shape[0]
        elsewhere = (row < 0) | (row >= self.weight.shape[0])
        found = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return leave(found.masked_fill(elsewhere[..., None], 0.0), self.axis, self.sequence)


class SequenceCutEmbedding(_Parallel):
    """A replicated position embedding that looks up only the positions of this rank's slice of the sequence."""

    def __init__(self, weight: nn.Parameter, axis: Axis):
        super().__init__(axis, sequence=True)
        self.weight = weight

    def forward(self, positions_BT: Tensor) -> Tensor:
        return F.embedding(positions_BT.chunk(self.axis.size, SEQUENCE)[self.axis.rank], self.weight)


class _SumOverRanks(Function):
    """What each rank adds to a sum that all of them go on to use, each for its own features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce(x.clone(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.clone(), ctx.axis), None


class FeatureCutRMSNorm(nn.Module):
    """RMSNorm over features of which each rank holds some, and their weight: one number a token travels (OLMo 2's norms
    over all heads of a token)."""

    def __init__(self, weight: nn.Parameter, eps: float, axis: Axis):
        super().__init__()
        self.weight, self.eps, self.axis = weight, eps, axis

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        squares = _SumOverRanks.apply(wide.square().sum(-1, keepdim=True), self.axis)
        scale = torch.rsqrt(squares / (x.shape[-1] * self.axis.size) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class VocabParallelCrossEntropy(nn.Module):
    """Loss of every token from logits of which each rank holds some columns: three numbers a token travel, no
    logits. The backward pass overwrites the logits."""

    def __init__(self, axis: Axis, vocab_size: int):
        super().__init__()
        self.axis, self.vocab_size = axis, vocab_size

    def forward(self, logits: Tensor, labels_BT: Tensor) -> Tensor:
        columns = _columns(logits.shape[-1], self.axis, self.vocab_size)
        return cross_entropy(logits, labels_BT, *columns, partial(_combine, axis=self.axis))


class ChunkedHead(ParallelLinear):
    """The head, and with labels the loss behind it, for which it never holds the logits of more than `rows` tokens."""

    def __init__(self, weight: nn.Parameter, axis: Axis, sequence: bool, vocab_size: int, rows: int):
        super().__init__(weight, None, axis, sequence)
        self.vocab_size, self.rows = vocab_size, rows

    def forward(self, x: Tensor, labels_BT: Tensor | None = None) -> Tensor:
        """Logits [B,T,V/n], or losses [B,T]."""
        if labels_BT is None:
            return _Linear.apply(x, self.weight, None, self.axis, self.sequence, self.deliver, None)
        columns = _columns(self.weight.shape[0], self.axis, self.vocab_size)
        x = _Enter.apply(x, self.axis, self.sequence)
        combine = partial(_combine, axis=self.axis) if self.axis.size > 1 else None
        deliver = self._in_chunks(self.deliver, labels_BT.numel()) if self.deliver else None
        return linear_cross_entropy(x, self.weight, labels_BT, self.rows, *columns, combine, deliver)

    def _in_chunks(self, whole: Deliver, num_tokens: int) -> Callable[[Tensor, Tensor], None]:
        left = num_tokens

        def deliver(grad: Tensor, x: Tensor) -> None:
            nonlocal left
            left -= len(x)
            whole(self.weight, grad, x, left == 0)

        return deliver


def _columns(held: int, axis: Axis, vocab_size: int) -> tuple[int, int]:
    """(first, number that are not padding) of the columns of a vocabulary that a rank holds."""
    first = axis.rank * held
    return first, min(max(vocab_size - first, 0), held)


def _combine(lse: Tensor, target: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    largest = all_reduce(lse.clone(), axis, dist.ReduceOp.MAX)
    # One message for both sums.
    total, target = all_reduce(torch.stack(((lse - largest).exp(), target)), axis).unbind()
    return largest + total.log(), target
