"""Vocabulary-parallel cross-entropy (Shoeybi et al. 2019) without a second tensor of the logits'
size: the gradient overwrites the logits. `linear_cross_entropy` fuses the output head and never
holds all logits at once. Label smoothing and a z-loss (`LossTerms`) need no further tensor of that
size.

Letters in shapes: N tokens, V vocabulary columns of this rank, D hidden size. The columns are
first..first+V of the vocabulary. The first `num_valid` of them are real; the rest is padding, which
takes no probability. A label outside the real columns is `IGNORE` or another rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from megalite.kernels.library import added, own, pick
from megalite.kernels.linear import (
    Operand,
    WgradCallback,
    accumulate_weight_gradient,
    input_gradient,
    product,
)

IGNORE = -100
"""Label of a token without loss."""

Combine = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Reduces (lse, target) of this rank's columns, [N] and [N] or [2,N], over the ranks to those of
the whole vocabulary."""


class LossTerms(NamedTuple):
    """What training minimises beside the cross-entropy, by weights: (1 - s) · cross-entropy + s ·
    its mean over all classes as the label + z · lse², with s = `label_smoothing` (Szegedy et al.
    2016), z = `z_loss` (Chowdhery et al. 2022) and lse the log-sum-exp of a token's logits."""

    z_loss: float
    label_smoothing: float
    num_classes: int
    """Columns of the whole vocabulary, without padding."""


def cross_entropy_forward(
    logits_NV: Tensor,
    labels_N: Tensor,
    first: int,
    num_valid: int,
) -> tuple[Tensor, Tensor]:
    """Return (lse, target), both [N] fp32, of this rank's columns `logits_NV`.

    lse is the log-sum-exp over the columns; target is the logit of `labels_N`, 0 where the label is
    not among the `num_valid` real columns from `first`."""
    if function := added.get("cross_entropy_forward"):
        return function(logits_NV, labels_N, first, num_valid)
    if pick("loss", logits_NV) == "megalite":
        return torch.ops.megalite.cross_entropy_forward(logits_NV, labels_N, first, num_valid)
    column, here = _column(labels_N, first, num_valid)
    # Column 0 stands for labels of other ranks, whose target is then set to 0: over the ranks
    # targets add up, since exactly one has each label.
    target = logits_NV.gather(1, column[:, None])[:, 0]
    target = target.float().masked_fill(~here, 0.0)
    lse = logits_NV[:, :num_valid].float().logsumexp(1)
    return lse, target


def cross_entropy_backward_(
    logits_NV: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    grad_N: Tensor,
    first: int,
    num_valid: int,
) -> None:
    """Overwrite `logits_NV` with its gradient.

    `lse_N` is the log-sum-exp over the whole vocabulary and `grad_N` the gradient of the losses.
    Where `grad_N` is 0 the result is 0, even for logits that are not finite. `labels_N`, `first`
    and `num_valid` are those of `cross_entropy_forward`."""
    if function := added.get("cross_entropy_backward_"):
        function(logits_NV, labels_N, lse_N, grad_N, first, num_valid)
    elif pick("loss", logits_NV) == "megalite":
        torch.ops.megalite.cross_entropy_backward_(
            logits_NV, labels_N, lse_N, grad_N, first, num_valid
        )
    else:
        # softmax − one_hot(label), times the gradient of the loss
        column, here = _column(labels_N, first, num_valid)
        grad_logits = logits_NV.float().sub_(lse_N[:, None]).exp_()
        # Where another rank has the label, `here` is 0 and nothing is subtracted from column 0.
        grad_logits.scatter_add_(1, column[:, None], -here[:, None].float())
        grad_N1 = grad_N[:, None]
        grad_logits.mul_(grad_N1).masked_fill_(grad_N1 == 0, 0.0)  # the fill: 0 · inf would be NaN
        grad_logits[:, num_valid:] = 0.0
        logits_NV.copy_(grad_logits)
    # Autograd then refuses whatever else has saved the logits and would read the gradient instead.
    increment_version(logits_NV)


def _column(labels_N: Tensor, first: int, num_valid: int) -> tuple[Tensor, Tensor]:
    """Return (column, whether this rank has it) of each label, both [N]. The column is 0 where
    another rank has it."""
    column = labels_N - first
    here = (column >= 0) & (column < num_valid)
    return column.masked_fill(~here, 0), here


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    first: int = 0,
    num_valid: int | None = None,
    combine: Combine | None = None,
    terms: LossTerms | None = None,
) -> Tensor:
    """Return the fp32 loss of every token, 0 where the label is `IGNORE`: [B,T,V] and [B,T] →
    [B,T]; with `terms` [B,T,2], the loss to minimise and the cross-entropy in it, which has no
    gradient of its own.

    `logits` are the columns from `first` of the vocabulary, `num_valid` of them real (default:
    all). `combine` reduces over the ranks that hold the others; without it these columns are the
    whole vocabulary and `labels` must lie in them.

    The backward pass overwrites `logits` with their gradient: they must be the fresh output of a
    product that nothing else reads after the forward pass. A second backward pass is refused."""
    num_valid = logits.shape[-1] if num_valid is None else num_valid
    return _CrossEntropy.apply(logits, labels, first, num_valid, combine, terms)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        first: int,
        num_valid: int,
        combine: Combine | None,
        terms: LossTerms | None,
    ) -> Tensor:
        # `flatten` below must be a view, for the backward pass to write into it.
        logits = logits.contiguous()
        logits_NV, labels_N = logits.flatten(0, -2), labels.flatten()
        lse, target = cross_entropy_forward(logits_NV, labels_N, first, num_valid)
        if terms and terms.label_smoothing:
            target = _with_smoothed(target, logits_NV, num_valid, terms)
        ctx.columns, ctx.terms = (first, num_valid), terms
        lse, losses = _whole_losses(lse, target, labels, ctx.columns, combine, terms)
        ctx.save_for_backward(logits, labels_N, lse)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, labels_N, lse = ctx.saved_tensors
        logits = logits.detach()  # the same memory, which becomes the gradient
        grad_N = _counted(grad, labels_N, ctx.terms)
        _backward_(logits.flatten(0, -2), labels_N, lse, grad_N, ctx.columns, ctx.terms)
        return logits, None, None, None, None, None


def linear_cross_entropy(
    x: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    rows_per_chunk: int,
    first: int = 0,
    num_valid: int | None = None,
    combine: Combine | None = None,
    wgrad_callback: WgradCallback | None = None,
    terms: LossTerms | None = None,
) -> Tensor:
    """Compute `cross_entropy(x @ weight.T, labels, …)` over chunks of tokens: [B,T,D] and [B,T] →
    [B,T], or [N,D] and [N] → [N]; with `terms`, a last dimension of 2.

    Only the logits of `rows_per_chunk` tokens exist at a time; the backward pass computes them
    again. `weight_VD` holds this rank's rows of the head. `first`, `num_valid`, `combine` and
    `terms` are those of `cross_entropy`.

    The weight's gradient is accumulated in fp32 over the chunks. With `wgrad_callback` each chunk's
    operands are handed over instead, and autograd gives the weight no gradient. The gradient of `x`
    covers this rank's columns only: the caller sums it over the tensor ranks."""
    num_valid = weight_VD.shape[0] if num_valid is None else num_valid
    return _LinearCrossEntropy.apply(
        x, weight_VD, labels, rows_per_chunk, first, num_valid, combine, wgrad_callback, terms
    )


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
        wgrad_callback: WgradCallback | None,
        terms: LossTerms | None,
    ) -> Tensor:
        x_ND = x.flatten(0, -2)
        labels_N = labels.flatten()
        lse = x.new_empty(labels_N.shape, dtype=torch.float32)
        # [2, N]: the label's logit, and the mean of all logits, which label smoothing asks for.
        target = lse.new_empty((2, len(lse)) if terms and terms.label_smoothing else lse.shape)
        # Only a few numbers a token are kept of its logits: what the backward pass needs beside the
        # logits themselves.
        for rows in chunks(labels_N, rows_per_chunk):
            logits = product(x_ND[rows], weight)
            lse[rows], found = cross_entropy_forward(logits, labels_N[rows], first, num_valid)
            if terms and terms.label_smoothing:
                found = _with_smoothed(found, logits, num_valid, terms)
            target[..., rows] = found
            del logits  # or two chunks of logits would be alive at once
        ctx.columns, ctx.terms = (first, num_valid), terms
        lse, losses = _whole_losses(lse, target, labels, ctx.columns, combine, terms)
        ctx.save_for_backward(x, weight, labels_N, lse)
        ctx.rows_per_chunk = rows_per_chunk
        ctx.wgrad_callback, ctx.parameter = wgrad_callback, weight
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels_N, lse = ctx.saved_tensors
        x_ND = x.flatten(0, -2)
        grad_N = _counted(grad, labels_N, ctx.terms)

        def gradient(rows: slice) -> Tensor:
            logits = product(x_ND[rows], weight)
            _backward_(logits, labels_N[rows], lse[rows], grad_N[rows], ctx.columns, ctx.terms)
            return logits  # which hold their gradient by now

        grad_x, grad_weight = chunked_gradients(ctx, x, weight, ctx.rows_per_chunk, gradient)
        return grad_x, grad_weight, None, None, None, None, None, None, None


def chunked_gradients(
    ctx: Any, x: Tensor, weight: Tensor, rows_per_chunk: int, gradient: Callable[[slice], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `x` [… ,D] and `weight` [V,D], whose product a loss takes in chunks
    of rows; None for one that needs none, or that went to `ctx.wgrad_callback`. `gradient` makes
    that of the logits of some rows."""
    x_ND = x.flatten(0, -2)
    needs_x, needs_weight, *_ = ctx.needs_input_grad
    grad_x = torch.empty_like(x_ND) if needs_x else None
    grad_weight: Tensor | None = None
    wgrad_callback: WgradCallback | None = None  # stays None where the weight is frozen
    if needs_weight and ctx.wgrad_callback:
        wgrad_callback = ctx.wgrad_callback
    elif needs_weight:
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        wgrad_callback = _accumulate_into(grad_weight)
    for rows in chunks(x_ND, rows_per_chunk):
        logits = gradient(rows)
        if grad_x is not None:
            input_gradient(logits, weight, out=grad_x[rows])
        if wgrad_callback:
            # `last` tells an engine that counts one event a weight.
            wgrad_callback(ctx.parameter, logits, x_ND[rows], rows.stop >= len(x_ND))
        del logits
    if grad_x is not None:
        grad_x = grad_x.view_as(x)
    if grad_weight is not None:
        # Accumulated in fp32 over the chunks, and rounded once.
        grad_weight = grad_weight.to(weight.dtype)
    return grad_x, grad_weight


def _accumulate_into(total: Tensor) -> WgradCallback:
    """Return a callback that adds each chunk's weight-gradient GEMM to `total`, fp32."""

    def add(parameter: Tensor, grad: Operand, x: Operand, last: bool) -> None:
        accumulate_weight_gradient(total, grad, x, add=True)

    return add


def chunks(rows: Tensor, size: int) -> Iterator[slice]:
    """Return the slices of at most `size` rows."""
    return (slice(begin, begin + size) for begin in range(0, len(rows), size))


def _with_smoothed(target_N: Tensor, logits_NV: Tensor, num_valid: int, terms: LossTerms) -> Tensor:
    """Return [2,N]: the labels' logits `target_N`, and the mean logits under the smoothed labels,
    of which `num_valid` of the columns `logits_NV` are this rank's part."""
    share = terms.label_smoothing
    # Divided by all classes and not by this rank's columns: over the ranks these add up to the
    # mean.
    mean = logits_NV[:, :num_valid].sum(1, dtype=torch.float32) / terms.num_classes
    smoothed = (1 - share) * target_N + share * mean
    return torch.stack((target_N, smoothed))


def _backward_(
    logits_NV: Tensor,
    labels_N: Tensor,
    lse_N: Tensor,
    grad_N: Tensor,
    columns: tuple[int, int],
    terms: LossTerms | None,
) -> None:
    """Overwrite `logits_NV` with their gradient, as `cross_entropy_backward_` does, that of `terms`
    included. `columns` are its `first` and `num_valid`."""
    first, num_valid = columns
    if not terms:
        cross_entropy_backward_(logits_NV, labels_N, lse_N, grad_N, first, num_valid)
        return
    # d(lse)/d(logits) = softmax, and so d(z · lse²) = 2 · z · lse · softmax. The fill: 0 · inf
    # would be NaN.
    of_softmax = (grad_N * (1 + 2 * terms.z_loss * lse_N)).masked_fill(grad_N == 0, 0.0)
    cross_entropy_backward_(logits_NV, labels_N, lse_N, of_softmax, first, num_valid)
    # That took as much of the label's logit as it gave of the softmax, where the loss takes 1 -
    # label_smoothing.
    column, here = _column(labels_N, first, num_valid)
    excess = (of_softmax - (1 - terms.label_smoothing) * grad_N).masked_fill(~here, 0.0)
    logits_NV.scatter_add_(1, column[:, None], excess[:, None].to(logits_NV.dtype))
    if terms.label_smoothing:
        logits_NV[:, :num_valid] -= (terms.label_smoothing / terms.num_classes) * grad_N[:, None]


def _whole_losses(
    lse_N: Tensor,
    target: Tensor,
    labels: Tensor,
    columns: tuple[int, int],
    combine: Combine | None,
    terms: LossTerms | None,
) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp [N] over the whole vocabulary, with which each rank computes its
    columns' softmax in the backward pass without a further message, and the losses. `target` is [N]
    or, smoothed, [2,N]. Without `combine`, assert that all labels are in `columns`."""
    ignored = labels == IGNORE
    if combine:
        lse_N, target = combine(lse_N, target)
    else:
        first, last = columns[0], sum(columns) - 1
        known = ignored | ((labels >= first) & (labels <= last))
        # The host must not wait for a GPU's answer in the middle of a step.
        torch._assert_async(known.all(), f"a label is neither {IGNORE} nor from {first} to {last}")
    losses = lse_N - target
    if not terms:
        return lse_N, losses.view_as(labels).masked_fill(ignored, 0.0)
    # One row without label smoothing (then both are it), else two.
    plain, smoothed = losses.view(-1, len(lse_N))[[0, -1]]
    to_minimise = smoothed + terms.z_loss * lse_N.square()
    both = torch.stack((to_minimise, plain), -1).view(*labels.shape, 2)
    return lse_N, both.masked_fill(ignored[..., None], 0.0)


def _counted(grad: Tensor, labels_N: Tensor, terms: LossTerms | None) -> Tensor:
    """Return the gradient [N] of the losses to minimise, 0 for tokens without a label."""
    # [..., 1] is the cross-entropy that is only reported.
    grad = grad[..., 0] if terms else grad
    return grad.flatten().masked_fill(labels_N == IGNORE, 0.0)


def _register() -> None:
    # Fake kernels give torch.compile the shapes and dtypes of the results without computing them.

    @torch.library.register_fake("megalite::cross_entropy_forward")
    def _(logits: Tensor, labels: Tensor, first: int, num_valid: int) -> tuple[Tensor, Tensor]:
        lse = logits.new_empty(labels.shape, dtype=torch.float32)
        return lse, torch.empty_like(lse)

    @torch.library.register_fake("megalite::cross_entropy_backward_")
    def _(
        logits: Tensor,
        labels: Tensor,
        lse: Tensor,
        grad: Tensor,
        first: int,
        num_valid: int,
    ) -> None:
        pass


if own():
    _register()
