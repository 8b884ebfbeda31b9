"""Cross-entropy from logits of which each rank may hold some columns (Shoeybi et al. 2019), without a second tensor of
their size: the gradient overwrites the logits. `linear_cross_entropy` never holds all of them either.

Letters in shapes: N tokens, V the columns at hand, D hidden. The columns are first..first+V of the vocabulary; of them
the first `num_valid` are real and the rest padding, which takes no probability. A label that is none of the real
columns is `IGNORE` or another rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from megalite.kernels.library import own, pick

IGNORE = -100
"""Label of a token that carries no loss."""

Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes (lse, target) of a rank's columns, both [N], to those of the whole vocabulary."""
Deliver = Callable[[Tensor, Tensor], None]
"""Takes (g [n,V], x [n,D]): the weight's gradient is the sum of gᵀ x over all calls."""


def cross_entropy_forward(logits_NV: Tensor, labels_N: Tensor, first: int, num_valid: int) -> tuple[Tensor, Tensor]:
    """(lse, target), both [N] fp32: the logarithm of the sum of e^logit over the columns at hand, and the label's
    logit, 0 where it is not among them."""
    if pick("loss", logits_NV) == "megalite":
        return torch.ops.megalite.cross_entropy_forward(logits_NV, labels_N, first, num_valid)
    column, here = _column(labels_N, first, num_valid)
    target = logits_NV.gather(1, column[:, None])[:, 0].float().masked_fill(~here, 0.0)
    return logits_NV[:, :num_valid].float().logsumexp(1), target


def cross_entropy_backward_(
    logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, grad_N: Tensor, first: int, num_valid: int
) -> None:
    """Overwrite the logits with their gradient. `lse_N` is that of the whole vocabulary, `grad_N` the gradient of the
    losses: where it is 0, the result is 0 whatever the logits are."""
    if pick("loss", logits_NV) == "megalite":
        torch.ops.megalite.cross_entropy_backward_(logits_NV, labels_N, lse_N, grad_N, first, num_valid)
    else:
        column, here = _column(labels_N, first, num_valid)
        grad_logits = logits_NV.float().sub_(lse_N[:, None]).exp_()
        grad_logits.scatter_add_(1, column[:, None], -here[:, None].float())
        grad_logits.mul_(grad_N[:, None]).masked_fill_(grad_N[:, None] == 0, 0.0)
        grad_logits[:, num_valid:] = 0.0
        logits_NV.copy_(grad_logits)
    increment_version(logits_NV)  # so that autograd refuses whoever else has kept them


def _column(labels_N: Tensor, first: int, num_valid: int) -> tuple[Tensor, Tensor]:
    """(column, whether it is here) of each label; 0 where it is not."""
    column = labels_N - first
    here = (column >= 0) & (column < num_valid)
    return column.masked_fill(~here, 0), here


def cross_entropy(
    logits: Tensor, labels: Tensor, first: int = 0, num_valid: int | None = None, combine: Combine | None = None
) -> Tensor:
    """Loss of every token, fp32, 0 where the label is `IGNORE`: [B,T,V] and [B,T] → [B,T].

    The backward pass overwrites the logits with their gradient. They must be the fresh output of a product that nothing
    else reads after the forward pass; a second backward pass is refused. Without `combine` the columns at hand are the
    whole vocabulary."""
    num_valid = logits.shape[-1] if num_valid is None else num_valid
    return _CrossEntropy.apply(logits, labels, first, num_valid, combine)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, num_valid: int, combine: Combine | None
    ) -> Tensor:
        logits, labels_N = logits.contiguous(), labels.flatten()
        lse, target = cross_entropy_forward(logits.flatten(0, -2), labels_N, first, num_valid)
        lse, target = _whole(lse, target, labels_N, first, num_valid, combine)
        ctx.save_for_backward(logits, labels_N, lse)
        ctx.columns = first, num_valid
        return _losses(lse, target, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, labels_N, lse = ctx.saved_tensors
        logits = logits.detach()
        cross_entropy_backward_(logits.flatten(0, -2), labels_N, lse, _counted(grad, labels_N), *ctx.columns)
        return logits, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    rows_per_chunk: int,
    first: int = 0,
    num_valid: int | None = None,
    combine: Combine | None = None,
    deliver: Deliver | None = None,
) -> Tensor:
    """`cross_entropy(x @ weight.T, labels, …)` that holds the logits of `rows_per_chunk` tokens at a time, and computes
    them again in the backward pass: [B,T,D] and [B,T] → [B,T], or [N,D] and [N] → [N].

    The weight's gradient is summed in fp32 over the chunks. With `deliver` each chunk's share of it is handed over
    instead, and the weight gets no gradient from autograd. The gradient of `x` is that of the columns at hand: parallel
    code sums it over ranks."""
    num_valid = weight_VD.shape[0] if num_valid is None else num_valid
    return _LinearCrossEntropy.apply(x, weight_VD, labels, rows_per_chunk, first, num_valid, combine, deliver)


class _LinearCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows_per_chunk: int,
        first: int,
        num_valid: int,
        combine: Combine | None,
        deliver: Deliver | None,
    ) -> Tensor:
        x_ND, labels_N = x.flatten(0, -2), labels.flatten()
        lse = x.new_empty(labels_N.shape, dtype=torch.float32)
        target = torch.empty_like(lse)
        for rows in _chunks(labels_N, rows_per_chunk):
            logits = x_ND[rows] @ weight.t()
            lse[rows], target[rows] = cross_entropy_forward(logits, labels_N[rows], first, num_valid)
            del logits  # before the next chunk's
        lse, target = _whole(lse, target, labels_N, first, num_valid, combine)
        ctx.save_for_backward(x, weight, labels_N, lse)
        ctx.rows_per_chunk, ctx.columns, ctx.deliver = rows_per_chunk, (first, num_valid), deliver
        return _losses(lse, target, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels_N, lse = ctx.saved_tensors
        x_ND, grad_N = x.flatten(0, -2), _counted(grad, labels_N)
        grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        of_weight = _Sum(weight) if ctx.needs_input_grad[1] and not ctx.deliver else None
        deliver = of_weight.add if of_weight else ctx.deliver if ctx.needs_input_grad[1] else None
        for rows in _chunks(labels_N, ctx.rows_per_chunk):
            logits = x_ND[rows] @ weight.t()
            cross_entropy_backward_(logits, labels_N[rows], lse[rows], grad_N[rows], *ctx.columns)
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[rows])
            if deliver:
                deliver(logits, x_ND[rows])
            del logits
        return (
            None if grad_x is None else grad_x.view_as(x), None if of_weight is None else of_weight.result(),
            None, None, None, None, None, None,
        )  # fmt: skip


class _Sum:
    """The gradient of a weight, summed over chunks in fp32."""

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.total = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, grad_rows: Tensor, x_rows: Tensor) -> None:
        if self.dtype == torch.float32:
            self.total.addmm_(grad_rows.t(), x_rows)
        else:
            self.total += grad_rows.t() @ x_rows

    def result(self) -> Tensor:
        return self.total.to(self.dtype)


def _chunks(rows: Tensor, size: int) -> Iterator[slice]:
    return (slice(begin, begin + size) for begin in range(0, len(rows), size))


def _whole(
    lse: Tensor, target: Tensor, labels_N: Tensor, first: int, num_valid: int, combine: Combine | None
) -> tuple[Tensor, Tensor]:
    if combine:
        return combine(lse, target)
    known = (labels_N == IGNORE) | ((labels_N >= first) & (labels_N < first + num_valid))
    # On CUDA, nobody waits for the answer.
    torch._assert_async(known.all(), f"a label is neither {IGNORE} nor from {first} to {first + num_valid - 1}")
    return lse, target


def _losses(lse_N: Tensor, target_N: Tensor, labels: Tensor) -> Tensor:
    return (lse_N - target_N).view_as(labels).masked_fill(labels == IGNORE, 0.0)


def _counted(grad: Tensor, labels_N: Tensor) -> Tensor:
    return grad.flatten().masked_fill(labels_N == IGNORE, 0.0)


def _register() -> None:
    @torch.library.register_fake("megalite::cross_entropy_forward")
    def _(logits: Tensor, labels: Tensor, first: int, num_valid: int) -> tuple[Tensor, Tensor]:
        return logits.new_empty(labels.shape, dtype=torch.float32), logits.new_empty(labels.shape, dtype=torch.float32)

    @torch.library.register_fake("megalite::cross_entropy_backward_")
    def _(logits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor, first: int, num_valid: int) -> None:
        pass


if own():
    _register()
