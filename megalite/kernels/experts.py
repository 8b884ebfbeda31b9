"""What a mixture of experts computes beside products: which experts a token visits, tokens brought together by expert
and back, and a product for each expert. This is the reference, in plain torch, with one host synchronisation.

All sums have a fixed order, that of the experts: a token's result does not depend on which tokens it is grouped with,
nor on where its experts are. Letters in shapes: T tokens (or B,T), D hidden, E experts, K experts that a token visits,
N = T·K rows, each a token at one of its experts, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megalite.kernels.linear import (
    WeightGradStore,
    accumulate_weight_gradient,
    input_gradient,
    product,
    weight_gradient,
)

GroupedWgradCallback = Callable[[Tensor, Tensor, Tensor, Sequence[int]], None]
"""Callback for the weight-gradient GEMMs of a stack of matrices: takes (parameter, grad [N,O], rows [N,I], counts) and
adds each matrix's gradᵀ rows to the parameter's gradient. See `kernels.linear.WgradCallback`."""

FEWEST_ROWS = 16
"""Rows of a product, below which BLAS adds up in another order: a lone token would be routed by other bits, and have
other results at an expert than among many."""


def router_logits(x: Tensor, weight_ED: Tensor) -> Tensor:
    """Return the router's logits in fp32, whatever the dtypes: [… ,D] → [… ,E]."""
    return _RouterLogits.apply(x, weight_ED)


class _RouterLogits(Function):
    """Keep the input as it is, not in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_ED)
        rows = x.flatten(0, -2).float()
        # fp32 copies of x and the weight live in here only. In bf16 two experts could swap places
        # by rounding.
        return product(_enough(rows), weight_ED.float())[: len(rows)].reshape(*x.shape[:-1], len(weight_ED))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_ED = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        grad_x = input_gradient(grad, weight_ED.float()).to(x.dtype) if of_x else None
        if not of_weight:
            return grad_x, None
        return grad_x, weight_gradient(grad.flatten(0, -2), x.flatten(0, -2).float()).to(weight_ED.dtype)


def _enough(rows: Tensor) -> Tensor:
    """Return `rows` with zeros below where they are fewer than FEWEST_ROWS."""
    few = FEWEST_ROWS - len(rows)
    return F.pad(rows, (0, 0, 0, few)) if few > 0 else rows


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the experts of the `k` largest scores of each token, int64 in ascending order: [… ,E] → [… ,K]. Among
    equal scores the lower index is chosen, which torch.topk does not promise."""
    # The order of experts, not that of scores: sums over a token's experts then have one order.
    largest = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return largest.sort(dim=-1).values


class Groups(NamedTuple):
    """Rows of tokens sorted by expert, and by token within an expert."""

    token_N: Tensor
    """Token of each row, int64."""
    row_TK: Tensor
    """Row of each token at each of its experts, int64."""
    counts: list[int]
    """Rows of each expert. Some may have none, one may have all."""


def group_by_expert(index: Tensor, num_experts: int) -> Groups:
    """Group tokens by the experts `index` [… ,K] that they visit."""
    return Groups(*sort_by_expert(index), count_rows(index, num_experts).tolist())


def sort_by_expert(index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first two fields of `Groups` for the experts `index` [… ,K] of each token."""
    # order[n] is which visit (token · K + slot) became row n; stable, so that within an expert rows
    # are in the order of the tokens.
    order = index.flatten().argsort(stable=True)
    row = torch.empty_like(order)
    # The inverse permutation: at which row each visit ended up.
    row[order] = torch.arange(len(order), device=order.device)
    return order // index.shape[-1], row.view(-1, index.shape[-1])


def count_rows(index: Tensor, num_experts: int) -> Tensor:
    """Return how many of the visits `index` each expert has: [num_experts] int64."""
    return index.flatten().bincount(minlength=num_experts)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    gather: bool = False,
    wgrad_callback: GroupedWgradCallback | None = None,
    later: WeightGradStore | None = None,
) -> Tensor:
    """Return each expert's product of its rows: [N,I] and [E,O,I] → [N,O]. With `gather`, `x` has tokens [… ,I], whose
    rows are gathered (permuted) here, and once more in the backward pass: they are K times as many.

    `wgrad_callback` and `later` do what they do in `kernels.linear.linear`."""
    return _GroupedLinear.apply(x, weight, groups, gather, wgrad_callback, later)


def _spans(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with these rows."""
    stops = [*accumulate(counts)]
    for expert, (count, stop) in enumerate(zip(counts, stops, strict=True)):
        if count:
            yield expert, slice(stop - count, stop)


class _GroupedLinear(Function):
    """Compute one product an expert, as `kernels.linear` computes one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        groups: Groups,
        gather: bool,
        wgrad_callback: GroupedWgradCallback | None,
        later: WeightGradStore | None,
    ) -> Tensor:
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        # With `gather` the tokens are kept and not their rows, which are K times as many.
        ctx.groups, ctx.gather, ctx.shape = groups, gather, x.shape
        ctx.wgrad_callback, ctx.later, ctx.parameter = wgrad_callback, later, weight
        rows = _rows(x, groups, gather)
        out = rows.new_empty(len(rows), weight.shape[1])
        for expert, span in _spans(groups.counts):
            # One GEMM an expert, over a contiguous run of rows: that is why rows are sorted by
            # expert.
            out[span] = product(_enough(rows[span]), weight[expert])[: span.stop - span.start]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        groups, gather, callback, parameter = ctx.groups, ctx.gather, ctx.wgrad_callback, ctx.parameter
        grad = grad.contiguous()
        grad_weight = None
        # The same three ways as in `kernels.linear._Linear.backward`: put off, handed to the
        # engine, or computed here.
        if x is not None and ctx.later:
            ctx.later.put(lambda: callback(parameter, grad, _rows(x, groups, gather), groups.counts))
        elif x is not None and callback:
            callback(parameter, grad, _rows(x, groups, gather), groups.counts)
        elif x is not None:
            rows, grad_weight = _rows(x, groups, gather), torch.zeros_like(parameter)
            for expert, span in _spans(groups.counts):
                grad_weight[expert] = weight_gradient(grad[span], rows[span])
            del rows
        if weight is None:
            return None, grad_weight, None, None, None, None
        # Every row is written below, as each belongs to an expert that has rows.
        grad_x = grad.new_empty(len(grad), weight.shape[2])
        for expert, span in _spans(groups.counts):
            if span.stop - span.start < FEWEST_ROWS:
                few = _enough(grad[span])
                grad_x[span] = input_gradient(few, weight[expert])[: span.stop - span.start]
            else:
                input_gradient(grad[span], weight[expert], out=grad_x[span])
        if gather:
            # A token that was copied to K rows gets the sum of their gradients.
            grad_x = _sum_rows(grad_x, groups.row_TK, None, ctx.shape[:-1])
        return grad_x, grad_weight, None, None, None, None


def _rows(x: Tensor, groups: Groups, gather: bool) -> Tensor:
    return x.flatten(0, -2)[groups.token_N] if gather else x


def permute(x: Tensor, groups: Groups) -> Tensor:
    """Return a row for each token at each of its experts: [… ,D] → [N,D]."""
    return _Permute.apply(x, groups)


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Groups) -> Tensor:
        ctx.row_TK, ctx.shape = groups.row_TK, x.shape
        return _rows(x, groups, gather=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grad, ctx.row_TK, None, ctx.shape[:-1]), None


def unpermute(rows_ND: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Return each token's sum of its experts' rows, weighted by `weight` [… ,K]: [N,D] → [… ,D]. It is computed in fp32
    in the order of the experts."""
    return _Unpermute.apply(rows_ND, weight, groups)


def _sum_rows(rows_ND: Tensor, row_TK: Tensor, weight_TK: Tensor | None, shape: Sequence[int]) -> Tensor:
    """Return the (weighted) sum of each token's rows, one expert after another, as [*shape,D] in the dtype of the
    rows."""
    # A plain permutation: nothing is added, so nothing need be done in fp32.
    if weight_TK is None and row_TK.shape[1] == 1:
        return rows_ND[row_TK[:, 0]].view(*shape, rows_ND.shape[1])
    total = torch.zeros(*shape, rows_ND.shape[1], device=rows_ND.device)
    total_TD = total.flatten(0, -2)
    for slot, row_T in enumerate(row_TK.unbind(1)):
        part = rows_ND[row_T].float()
        # Slot by slot, hence in ascending order of experts. A scatter-add (index_add_) would add in
        # an order of its own on a GPU, another one in every run.
        total_TD += part if weight_TK is None else part * weight_TK[:, slot, None]
    return total.to(rows_ND.dtype)


class _Unpermute(Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(rows_ND, weight)
        ctx.row_TK = groups.row_TK
        return _sum_rows(rows_ND, groups.row_TK, weight.flatten(0, -2), weight.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rows_ND, weight = ctx.saved_tensors
        grad_TD, weight_TK = grad.flatten(0, -2).float(), weight.flatten(0, -2)
        grad_rows, grad_weight = torch.empty_like(rows_ND), torch.empty_like(weight_TK)
        for slot, row_T in enumerate(ctx.row_TK.unbind(1)):
            # This is why the experts' outputs [N, D] are saved: a weight's gradient is a product
            # with them.
            grad_weight[:, slot] = (grad_TD * rows_ND[row_T]).sum(-1)
            grad_rows[row_T] = (grad_TD * weight_TK[:, slot, None]).to(rows_ND.dtype)
        return grad_rows, grad_weight.view(weight.shape), None


def accumulate_grouped_weight_gradient(
    into: Tensor, grad: Tensor, rows: Tensor, counts: Sequence[int], add: bool
) -> None:
    """Write each expert's gradᵀ rows to `into`, the fp32 gradient [E,O,I], or accumulate it there with `add`. An expert
    without rows has a gradient of 0."""
    # Spans leave out experts without rows, whose old gradient would otherwise stay.
    if not add:
        for expert, count in enumerate(counts):
            if not count:
                into[expert] = 0.0
    for expert, span in _spans(counts):
        accumulate_weight_gradient(into[expert], grad[span], rows[span], add)
