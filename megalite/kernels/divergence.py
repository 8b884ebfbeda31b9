"""Divergence of a student's distributions from a teacher's (Hinton et al. 2015) over vocabulary
shards, with the cross-entropy beside it. No rank has a whole row of logits, and only a few rows at
a time are widened to fp32.

Letters in shapes: N tokens, V vocabulary columns of this rank, D hidden size of the student, E of
the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from megalite.kernels.linear import WgradCallback, product
from megalite.kernels.loss import (
    IGNORE,
    Combine,
    chunked_gradients,
    chunks,
    cross_entropy_backward_,
    cross_entropy_forward,
)

ROWS = 1024
"""Rows that are widened to fp32 at a time, where all logits exist."""


class Divergence(NamedTuple):
    """What training minimises: weight · T² · D + (1 - weight) · cross-entropy, where D compares
    distributions at the temperature T, whose square keeps the gradient's size (Hinton et al. 2015).
    With s the student's distribution, t the teacher's and m their mean, D is KL(t, s), KL(s, t), or
    (KL(t, m) + KL(s, m)) / 2."""

    kind: Literal["forward_kl", "reverse_kl", "jsd"]
    temperature: float
    weight: float


class Columns(NamedTuple):
    """This rank's columns of the vocabulary, and how it reduces over the ranks that hold the
    others."""

    first: int
    num_valid: int
    """Columns of the student that are not padding."""
    num_common: int
    """Of these, those that the teacher has as well. Distributions are compared over them."""
    combine: Combine | None
    """That of `cross_entropy`. None: these columns are the whole vocabulary."""
    sum: Callable[[Tensor], Tensor]
    """Sums over the ranks."""


class Comparison(Protocol):
    """Compares some rows of a student's logits with what a teacher says of the same tokens."""

    @property
    def wanted(self) -> Divergence:
        """Return what training minimises."""

    def compare(self, student_NV: Tensor, labels_N: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Return what the forward pass finds of the tokens `rows`, whose logits and labels are
        given: [N] fp32 each, the first four those of `Found`. As many on every call."""

    def gradient_(
        self, student_NV: Tensor, labels_N: Tensor, rows: slice, found: tuple[Tensor, ...]
    ) -> None:
        """Overwrite the student's logits of some rows with the gradient of each row's loss, given
        what `compare` found of them."""


class Found(NamedTuple):
    """What every comparison finds of each token, [N] fp32 each, over the whole vocabulary."""

    lse: Tensor
    """Log-sum-exp of the student's logits, as the cross-entropy takes it."""
    target: Tensor
    """The student's logit of the label."""
    own: Tensor
    """Part of the divergence that is a mean over the student's distribution."""
    other: Tensor
    """Part that is a mean over the teacher's."""
    student: Tensor
    """Log-sum-exp of the student's logits at the temperature, over the common columns."""
    teacher: Tensor
    """That of the teacher's logits; or, where only its likeliest tokens are known, that of the
    student's logits of all others."""


NUM_FOUND = len(Found._fields)


def divergence(
    student: Tensor, teacher: Tensor, labels: Tensor, columns: Columns, wanted: Divergence
) -> Tensor:
    """Return [B,T,3] fp32: the loss to minimise of every token, its cross-entropy and D, which have
    no gradients of their own. All are 0 where the label is `IGNORE`. `student` and `teacher` are
    logits [B,T,V], `labels` [B,T].

    The gradient, of the student alone, overwrites its logits in the forward pass: they must be the
    fresh output of a product that nothing else reads. The teacher's are not kept."""
    teacher_NV = teacher.flatten(0, -2)
    return compared(student, labels, _Whole(lambda rows: teacher_NV[rows], columns, wanted))


def linear_divergence(
    x: Tensor,
    weight_VD: Tensor,
    x_teacher: Tensor,
    weight_VE: Tensor,
    labels: Tensor,
    rows_per_chunk: int,
    columns: Columns,
    wanted: Divergence,
    wgrad_callback: WgradCallback | None = None,
) -> Tensor:
    """Compute `divergence` of the two heads' logits, `x` [B,T,D] and `x_teacher` [B,T,E] times the
    weights, of `rows_per_chunk` tokens at a time: [B,T,3]. The backward pass computes them again.

    Gradients are those of `linear_cross_entropy`; the teacher has none."""
    x_NE = x_teacher.flatten(0, -2)
    comparison = _Whole(lambda rows: product(x_NE[rows], weight_VE), columns, wanted)
    return linear_compared(x, weight_VD, labels, rows_per_chunk, comparison, wgrad_callback)


def compared(student: Tensor, labels: Tensor, comparison: Comparison) -> Tensor:
    """Return what `divergence` does of another comparison with a teacher."""
    return _Divergence.apply(student, labels, comparison)


def linear_compared(
    x: Tensor,
    weight_VD: Tensor,
    labels: Tensor,
    rows_per_chunk: int,
    comparison: Comparison,
    wgrad_callback: WgradCallback | None = None,
) -> Tensor:
    """Return what `linear_divergence` does of another comparison with a teacher."""
    return _LinearDivergence.apply(x, weight_VD, labels, rows_per_chunk, comparison, wgrad_callback)


class _Divergence(Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, labels: Tensor, comparison: Comparison) -> Tensor:
        # `flatten` below must be a view, for the gradient to be written into it.
        student = student.contiguous()
        student_NV, labels_N = student.flatten(0, -2), labels.flatten()
        found = student.new_empty(NUM_FOUND, len(labels_N), dtype=torch.float32)
        for rows in chunks(labels_N, ROWS):
            part = student_NV[rows], labels_N[rows], rows
            of_rows = comparison.compare(*part)
            found[:, rows] = torch.stack(of_rows)
            if ctx.needs_input_grad[0]:
                comparison.gradient_(*part, of_rows)
        increment_version(student)
        ctx.save_for_backward(student, labels_N)
        return _losses(Found(*found), labels, comparison.wanted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, labels_N = ctx.saved_tensors
        # The same memory, which holds each token's gradient and is scaled by the loss's.
        student = student.detach()
        _scale_(student.flatten(0, -2), grad, labels_N)
        increment_version(student)
        return student, None, None


class _LinearDivergence(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        rows_per_chunk: int,
        comparison: Comparison,
        wgrad_callback: WgradCallback | None,
    ) -> Tensor:
        x_ND, labels_N = x.flatten(0, -2), labels.flatten()
        found = x.new_empty(NUM_FOUND, len(labels_N), dtype=torch.float32)
        for rows in chunks(labels_N, rows_per_chunk):
            student = product(x_ND[rows], weight)
            found[:, rows] = torch.stack(comparison.compare(student, labels_N[rows], rows))
            del student  # or two chunks of logits would be alive at once
        ctx.save_for_backward(x, weight, labels_N, found)
        ctx.rows_per_chunk, ctx.comparison = rows_per_chunk, comparison
        ctx.wgrad_callback, ctx.parameter = wgrad_callback, weight
        return _losses(Found(*found), labels, comparison.wanted)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels_N, found = ctx.saved_tensors
        x_ND, grad_NV3 = x.flatten(0, -2), grad.flatten(0, -2)

        def gradient(rows: slice) -> Tensor:
            student = product(x_ND[rows], weight)
            of_rows = tuple(found[:, rows])
            ctx.comparison.gradient_(student, labels_N[rows], rows, of_rows)
            _scale_(student, grad_NV3[rows], labels_N[rows])
            return student

        grad_x, grad_weight = chunked_gradients(ctx, x, weight, ctx.rows_per_chunk, gradient)
        return grad_x, grad_weight, None, None, None, None


class _Whole(NamedTuple):
    """Compares with whole distributions of a teacher."""

    teacher: Callable[[slice], Tensor]
    """Gives the teacher's logits of some rows, [N,V]."""
    columns: Columns
    wanted: Divergence

    def compare(self, student_NV: Tensor, labels_N: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Return what is found of some rows; see `Comparison`."""
        return _compare(student_NV, self.teacher(rows), labels_N, self.columns, self.wanted)

    def gradient_(
        self, student_NV: Tensor, labels_N: Tensor, rows: slice, found: tuple[Tensor, ...]
    ) -> None:
        """Overwrite logits with their gradient; see `Comparison`."""
        teacher_NV = self.teacher(rows)
        _gradient_(student_NV, teacher_NV, labels_N, Found(*found), self.columns, self.wanted)


def _log_softmax(logits_NV: Tensor, lse_N: Tensor, columns: Columns, wanted: Divergence) -> Tensor:
    """Return the log-probabilities of the common columns at the temperature, fp32."""
    return (logits_NV[:, : columns.num_common].float() / wanted.temperature).sub_(lse_N[:, None])


def _log_sum_exp(
    logits_NV: Tensor, labels_N: Tensor, columns: Columns, wanted: Divergence
) -> Tensor:
    """Return the log-sum-exp of the common columns on this rank at the temperature."""
    scaled = logits_NV if wanted.temperature == 1 else logits_NV.float() / wanted.temperature
    return cross_entropy_forward(scaled, labels_N, columns.first, columns.num_common)[0]


def _compare(
    student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, columns: Columns, wanted: Divergence
) -> Found:
    """Return what is found of some rows. Two messages of a few numbers a token are sent, no
    logits."""
    lse_N, target_N = cross_entropy_forward(student_NV, labels_N, columns.first, columns.num_valid)
    lse = torch.cat(
        (lse_N, *(_log_sum_exp(x, labels_N, columns, wanted) for x in (student_NV, teacher_NV)))
    )
    if columns.combine:
        lse, target = columns.combine(
            lse, torch.cat((target_N, target_N.new_zeros(2 * len(target_N))))
        )
        target_N = target[: len(target_N)]
    lse_N, of_student, of_teacher = lse.view(3, -1)
    ls = _log_softmax(student_NV, of_student, columns, wanted)
    lt = _log_softmax(teacher_NV, of_teacher, columns, wanted)
    if wanted.kind == "forward_kl":
        other = (lt.exp() * (lt - ls)).sum(1)
        own = torch.zeros_like(other)
    else:
        own = (ls.exp() * score(ls, lt, wanted)).sum(1)
        other = torch.zeros_like(own)
        if wanted.kind == "jsd":
            other = (lt.exp() * score(lt, ls, wanted)).sum(1)
    own, other = columns.sum(torch.stack((own, other))).unbind()
    return Found(lse_N, target_N, own, other, of_student, of_teacher)


def score(log_p: Tensor, log_q: Tensor, wanted: Divergence) -> Tensor:
    """Return what a part of the divergence is the mean of over p: log p/q, or half of log p/m with
    m their mean."""
    if wanted.kind == "jsd":
        return 0.5 * (log_p - torch.logaddexp(log_p, log_q) + math.log(2))
    return log_p - log_q


def _gradient_(
    student_NV: Tensor,
    teacher_NV: Tensor,
    labels_N: Tensor,
    found: Found,
    columns: Columns,
    wanted: Divergence,
) -> None:
    """Overwrite the student's logits of some rows with the gradient of each row's loss."""
    ls = _log_softmax(student_NV, found.student, columns, wanted)
    lt = _log_softmax(teacher_NV, found.teacher, columns, wanted)
    if wanted.kind == "forward_kl":
        grad = ls.exp() - lt.exp()
    else:
        # Both for KL(s, t) and for half of KL(s, m): what the logarithms themselves change cancels
        # out.
        grad = ls.exp() * (score(ls, lt, wanted) - found.own[:, None])
    grad *= wanted.weight * wanted.temperature  # T² of the loss, 1/T of the logits
    plain = torch.full_like(found.lse, 1 - wanted.weight)
    cross_entropy_backward_(
        student_NV, labels_N, found.lse, plain, columns.first, columns.num_valid
    )
    student_NV[:, : columns.num_common] += grad


def _scale_(grad_NV: Tensor, grad: Tensor, labels_N: Tensor) -> None:
    """Multiply each token's gradient by `grad` [… ,3] of the losses, of which the first is
    minimised; with 0 where the token has no label."""
    grad_N1 = grad[..., 0].flatten().masked_fill(labels_N == IGNORE, 0.0)[:, None]
    grad_NV.mul_(grad_N1).masked_fill_(grad_N1 == 0, 0.0)  # the fill: 0 · inf would be NaN


def _losses(found: Found, labels: Tensor, wanted: Divergence) -> Tensor:
    cross_entropy = found.lse - found.target
    diverged = found.own + found.other
    of_divergence = wanted.weight * wanted.temperature**2
    loss = of_divergence * diverged + (1 - wanted.weight) * cross_entropy
    losses = torch.stack((loss, cross_entropy, diverged), -1).view(*labels.shape, 3)
    return losses.masked_fill((labels == IGNORE)[..., None], 0.0)
