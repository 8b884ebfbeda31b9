"""What a mixture of experts computes: which experts a token visits, tokens brought together by
expert and back, and a product for each expert. Beside the reference in plain torch are megalite's
own kernels, and on GPUs torch's grouped product; with these the host waits for nothing in a forward
pass.

All sums have a fixed order, that of the experts: a token's result does not depend on which tokens
it is grouped with, nor on where its experts are. Letters in shapes: T tokens (or B,T), D hidden, E
experts, K experts that a token visits, N = T·K rows, each a token at one of its experts, sorted by
expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megalite.kernels.library import own, pick
from megalite.kernels.linear import (
    AS_GIVEN,
    Recipe,
    WeightGradStore,
    accumulate_weight_gradient,
    input_gradient,
    product,
    weight_gradient,
)


class RowCounts:
    """How many rows each expert has. Some may have none, one may have all."""

    def __init__(self, on_device: Tensor, on_host: list[int] | None = None):
        """`on_device` is int64 [E]; `on_host` the same, where it is known. From a GPU it is on its
        way from here on, and there long before the backward pass asks for it."""
        self.on_device = on_device
        if on_host is not None:
            self.on_host = on_host
        elif on_device.is_cuda:
            self._copy = torch.empty(on_device.shape, dtype=torch.int64, pin_memory=True)
            self._copy.copy_(on_device, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @cached_property
    def on_host(self) -> list[int]:
        """Return the counts on the host."""
        if self.on_device.is_cuda:
            self._copied.synchronize()
            return self._copy.tolist()
        return self.on_device.tolist()


GroupedWgradCallback = Callable[[Tensor, Tensor, Tensor, RowCounts], None]
"""Callback for the weight-gradient GEMMs of a stack of matrices: takes (parameter, grad [N,O], rows
[N,I], counts) and adds each matrix's gradᵀ rows to the parameter's gradient. See
`kernels.linear.WgradCallback`."""

FEWEST_ROWS = 16
"""Rows of a product, below which BLAS adds up in another order: a lone token would be routed by
other bits, and have other results at an expert than among many."""


def router_logits(x: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Return `x` [… ,D] and the router's logits of it in fp32, whatever the dtypes: [… ,E].

    What the experts visit is the `x` that is returned: its gradient and that of the logits are
    added up in one pass."""
    return _RouterLogits.apply(x, weight_ED)


class _RouterLogits(Function):
    """Keep the input as it is, not in fp32. In bf16 two experts could swap places by rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight_ED)
        x_TD = x.flatten(0, -2)
        if _routes(x_TD, weight_ED):
            logits_TE = torch.ops.megalite.router_logits(x_TD, weight_ED)
        else:
            logits_TE = product(_enough(x_TD.float()), weight_ED.float())[: len(x_TD)]
        return x.view_as(x), logits_TE.view(*x.shape[:-1], len(weight_ED))

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_ED = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        x_TD, grad_TE, before_TD = (y.flatten(0, -2) for y in (x, grad, grad_x))
        own_kernel = _routes(x_TD, weight_ED)
        grad_weight = None
        if of_weight and own_kernel:
            grad_weight = torch.ops.megalite.router_weight_gradient(grad_TE, x_TD)
        elif of_weight:
            grad_weight = weight_gradient(grad_TE, x_TD.float())
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_ED.dtype)
        if not of_x:
            return None, grad_weight
        if own_kernel:
            sum_TD = torch.ops.megalite.router_input_gradient(grad_TE, weight_ED, before_TD)
        else:
            sum_TD = (before_TD.float() + input_gradient(grad_TE, weight_ED.float())).to(x.dtype)
        return sum_TD.view_as(x), grad_weight


def _routes(x: Tensor, weight: Tensor) -> bool:
    """Return whether the router's own kernels take these."""
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype
    return on_cpu and pick("experts", x) == "megalite"


def _enough(rows: Tensor) -> Tensor:
    """Return `rows` with zeros below where they are fewer than FEWEST_ROWS."""
    few = FEWEST_ROWS - len(rows)
    return F.pad(rows, (0, 0, 0, few)) if few > 0 else rows


def top_k(scores: Tensor, k: int) -> Tensor:
    """Return the experts of the `k` largest scores of each token, int64 in ascending order: [… ,E]
    → [… ,K]. Among equal scores the lower index is chosen, which torch.topk does not promise."""
    if scores.dtype == torch.float32 and pick("experts", scores) == "megalite":
        return torch.ops.megalite.top_k(scores, k)
    # The order of experts, not that of scores: sums over a token's experts then have one order.
    largest = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return largest.sort(dim=-1).values


class Groups(NamedTuple):
    """Rows of tokens sorted by expert, and by token within an expert."""

    token_N: Tensor
    """Token of each row, int64."""
    row_TK: Tensor
    """Row of each token at each of its experts, int64."""
    counts: RowCounts
    """Rows of each expert."""


def group_by_expert(index: Tensor, num_experts: int) -> Groups:
    """Group tokens by the experts `index` [… ,K] that they visit."""
    counts_E = count_rows(index, num_experts)
    return Groups(*sort_by_expert(index, counts_E), RowCounts(counts_E))


def sort_by_expert(index: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first two fields of `Groups` for the experts `index` [… ,K] of each token, of
    which each expert has `counts_E`."""
    if pick("experts", index) == "megalite":
        return torch.ops.megalite.sort_by_expert(index, counts_E)
    # order[n] is which visit (token · K + slot) became row n; stable, so that within an expert rows
    # are in the order of the tokens.
    order = index.flatten().argsort(stable=True)
    row = torch.empty_like(order)
    # The inverse permutation: at which row each visit ended up.
    row[order] = torch.arange(len(order), device=order.device)
    return order // index.shape[-1], row.view(-1, index.shape[-1])


def count_rows(index: Tensor, num_experts: int) -> Tensor:
    """Return how many of the visits `index` each expert has: [num_experts] int64."""
    if pick("experts", index) == "megalite":
        return torch.ops.megalite.count_rows(index, num_experts)
    return index.flatten().bincount(minlength=num_experts)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    groups: Groups,
    gather: bool = False,
    wgrad_callback: GroupedWgradCallback | None = None,
    later: WeightGradStore | None = None,
    recipe: Recipe = AS_GIVEN,
) -> Tensor:
    """Return each expert's product of its rows: [N,I] and [E,O,I] → [N,O]. With `gather`, `x` has
    tokens [… ,I], whose rows are gathered (permuted) here, and once more in the backward pass: they
    are K times as many.

    `wgrad_callback` and `later` do what they do in `kernels.linear.linear`; `recipe` rounds the
    operands of the product and of the input's gradient."""
    return _GroupedLinear.apply(x, weight, groups, gather, wgrad_callback, later, recipe)


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
        recipe: Recipe,
    ) -> Tensor:
        of_x, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        # With `gather` the tokens are kept and not their rows, which are K times as many.
        ctx.groups, ctx.gather, ctx.shape = groups, gather, x.shape
        ctx.wgrad_callback, ctx.later, ctx.parameter = wgrad_callback, later, weight
        ctx.recipe = recipe
        # Each token once, and not each of its rows.
        x, weight = recipe.grouped_operands(x, weight, "input")
        # One GEMM an expert, over a contiguous run of rows: that is why rows are sorted by
        # expert.
        return grouped_product(_rows(x, groups, gather), weight, groups.counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        groups, gather, callback, parameter = (
            ctx.groups,
            ctx.gather,
            ctx.wgrad_callback,
            ctx.parameter,
        )
        grad = grad.contiguous()
        grad_weight = None
        # The same three ways as in `kernels.linear._Linear.backward`: put off, handed to the
        # engine, or computed here.
        if x is not None and ctx.later:
            ctx.later.put(
                lambda: callback(parameter, grad, _rows(x, groups, gather), groups.counts)
            )
        elif x is not None and callback:
            callback(parameter, grad, _rows(x, groups, gather), groups.counts)
        elif x is not None:
            grad_weight = grouped_weight_gradient(grad, _rows(x, groups, gather), groups.counts)
        if weight is None:
            return None, grad_weight, None, None, None, None, None
        # Every row is written below, as each belongs to an expert that has rows.
        # Under other names: what is put off has `grad` as it is.
        rounded, operand = ctx.recipe.grouped_operands(grad, weight, "output")
        grad_x = grouped_input_gradient(rounded, operand, groups.counts)
        if gather:
            # A token that was copied to K rows gets the sum of their gradients.
            grad_x = _sum_rows(grad_x, groups.row_TK, None, ctx.shape[:-1])
        return grad_x, grad_weight, None, None, None, None, None


def grouped_product(rows_NI: Tensor, weight_EOI: Tensor, counts: RowCounts) -> Tensor:
    """Return each expert's product of its rows: [N,O]."""
    if _torch_groups(rows_NI, weight_EOI):
        return torch._grouped_mm(rows_NI, weight_EOI.transpose(1, 2), offs=_ends(counts))
    if rows_NI.device.type == "cpu" and pick("experts", rows_NI) == "megalite":
        return torch.ops.megalite.grouped_product(rows_NI, weight_EOI, counts.on_device, False)
    out_NO = rows_NI.new_empty(len(rows_NI), weight_EOI.shape[1])
    for expert, span in _spans(counts):
        out_NO[span] = product(_enough(rows_NI[span]), weight_EOI[expert])[: span.stop - span.start]
    return out_NO


def grouped_input_gradient(grad_NO: Tensor, weight_EOI: Tensor, counts: RowCounts) -> Tensor:
    """Return the gradient of each expert's rows: [N,I]."""
    if _torch_groups(grad_NO, weight_EOI):
        return torch._grouped_mm(grad_NO, weight_EOI, offs=_ends(counts))
    if grad_NO.device.type == "cpu" and pick("experts", grad_NO) == "megalite":
        return torch.ops.megalite.grouped_product(grad_NO, weight_EOI, counts.on_device, True)
    out_NI = grad_NO.new_empty(len(grad_NO), weight_EOI.shape[2])
    for expert, span in _spans(counts):
        out_NI[span] = input_gradient(_enough(grad_NO[span]), weight_EOI[expert])[
            : span.stop - span.start
        ]
    return out_NI


def grouped_weight_gradient(grad_NO: Tensor, rows_NI: Tensor, counts: RowCounts) -> Tensor:
    """Return each expert's gradᵀ rows, in their dtype: [E,O,I]; 0 for an expert without rows."""
    if _torch_groups(grad_NO, rows_NI):
        return torch._grouped_mm(grad_NO.t(), rows_NI, offs=_ends(counts))
    out_EOI = grad_NO.new_zeros(len(counts.on_device), grad_NO.shape[1], rows_NI.shape[1])
    for expert, span in _spans(counts):
        out_EOI[expert] = weight_gradient(grad_NO[span], rows_NI[span])
    return out_EOI


def _torch_groups(*operands: Tensor) -> bool:
    """Return whether torch has a grouped product for these, which takes rows of 16 bytes."""
    x = operands[0]
    if (
        x.device.type != "cuda"
        or x.dtype != torch.bfloat16
        or not len(x)
        or not hasattr(torch, "_grouped_mm")
    ):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and all(
        y.shape[-1] % 8 == 0 for y in operands
    )


def _ends(counts: RowCounts) -> Tensor:
    """Return where the rows of each expert end, int32 [E]."""
    return counts.on_device.cumsum(0, dtype=torch.int32)


def _spans(counts: RowCounts) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, with these rows."""
    stops = [*accumulate(counts.on_host)]
    for expert, (count, stop) in enumerate(zip(counts.on_host, stops, strict=True)):
        if count:
            yield expert, slice(stop - count, stop)


def _rows(x: Tensor, groups: Groups, gather: bool) -> Tensor:
    return _gather_rows(x.flatten(0, -2), groups.token_N) if gather else x


def _gather_rows(x_TD: Tensor, token_N: Tensor) -> Tensor:
    if pick("experts", x_TD) == "megalite":
        return torch.ops.megalite.gather_rows(x_TD, token_N)
    return x_TD[token_N]


def add_biases(x_NO: Tensor, bias: Tensor, counts: RowCounts, first: int = 0) -> Tensor:
    """Add to each row its expert's bias, in place: [N,O] and [E,P], which are features `first` to
    `first` + P."""
    return _AddBiases.apply(x_NO, bias, counts, first)


class _AddBiases(Function):
    @staticmethod
    def forward(ctx: Any, x_NO: Tensor, bias_EP: Tensor, counts: RowCounts, first: int) -> Tensor:
        ctx.mark_dirty(x_NO)
        ctx.counts, ctx.features, ctx.shape = (
            counts,
            slice(first, first + bias_EP.shape[1]),
            bias_EP.shape,
        )
        x_NO[:, ctx.features] += bias_EP[_expert_of_each(counts, len(x_NO))]
        return x_NO

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # A product with ones in the places of an expert's rows sums these, and no host waits for
        # their number.
        experts = torch.arange(ctx.shape[0], device=grad.device)
        is_own_EN = (experts[:, None] == _expert_of_each(ctx.counts, len(grad))).to(grad.dtype)
        return grad, is_own_EN @ grad[:, ctx.features], None, None


def _expert_of_each(counts: RowCounts, num_rows: int) -> Tensor:
    """Return the expert of each row, int64 [N]."""
    experts = torch.arange(len(counts.on_device), device=counts.on_device.device)
    return experts.repeat_interleave(counts.on_device, output_size=num_rows)


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
    """Return each token's sum of its experts' rows, weighted by `weight` [… ,K]: [N,D] → [… ,D]. It
    is computed in fp32 in the order of the experts."""
    return _Unpermute.apply(rows_ND, weight, groups)


def _sum_rows(
    rows_ND: Tensor, row_TK: Tensor, weight_TK: Tensor | None, shape: Sequence[int]
) -> Tensor:
    """Return the (weighted) sum of each token's rows, one expert after another, as [*shape,D] in
    the dtype of the rows."""
    # A plain permutation: nothing is added, so nothing need be done in fp32.
    if weight_TK is None and row_TK.shape[1] == 1:
        return _gather_rows(rows_ND, row_TK[:, 0]).view(*shape, rows_ND.shape[1])
    if pick("experts", rows_ND) == "megalite":
        # Not a view, on which autograd forbids the in-place sum over tensor ranks.
        total_TD = torch.ops.megalite.sum_rows(rows_ND, row_TK, weight_TK)
        return torch.ops.aten._unsafe_view(total_TD, (*shape, rows_ND.shape[1]))
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
        weight_TK = weight.flatten(0, -2)
        if pick("experts", rows_ND) == "megalite":
            operands = grad.flatten(0, -2), rows_ND, ctx.row_TK, weight_TK
            grad_rows, grad_weight = torch.ops.megalite.sum_rows_backward(*operands)
            return grad_rows, grad_weight.view(weight.shape), None
        grad_TD = grad.flatten(0, -2).float()
        grad_rows, grad_weight = torch.empty_like(rows_ND), torch.empty_like(weight_TK)
        for slot, row_T in enumerate(ctx.row_TK.unbind(1)):
            # This is why the experts' outputs [N, D] are saved: a weight's gradient is a product
            # with them.
            grad_weight[:, slot] = (grad_TD * rows_ND[row_T]).sum(-1)
            grad_rows[row_T] = (grad_TD * weight_TK[:, slot, None]).to(rows_ND.dtype)
        return grad_rows, grad_weight.view(weight.shape), None


def accumulate_grouped_weight_gradient(
    into: Tensor, grad: Tensor, rows: Tensor, counts: RowCounts, add: bool
) -> None:
    """Write each expert's gradᵀ rows to `into`, the fp32 gradient [E,O,I], or accumulate it there
    with `add`. An expert without rows has a gradient of 0."""
    if pick("weight_gradient", rows) == "megalite":
        torch.ops.megalite.grouped_weight_gradient_(into, grad, rows, counts.on_device, add)
        return
    # Spans leave out experts without rows, whose old gradient would otherwise stay.
    if not add:
        for expert, count in enumerate(counts.on_host):
            if not count:
                into[expert] = 0.0
    for expert, span in _spans(counts):
        accumulate_weight_gradient(into[expert], grad[span], rows[span], add)


def _register() -> None:
    # Fake kernels give the shapes and dtypes of the results without computing them.

    @torch.library.register_fake("megalite::top_k")
    def _(scores: Tensor, k: int) -> Tensor:
        return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)

    @torch.library.register_fake("megalite::count_rows")
    def _(index: Tensor, num_experts: int) -> Tensor:
        return index.new_empty(num_experts)

    @torch.library.register_fake("megalite::sort_by_expert")
    def _(index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return index.new_empty(index.numel()), index.new_empty(index.shape).flatten(0, -2)

    @torch.library.register_fake("megalite::gather_rows")
    def _(x: Tensor, token: Tensor) -> Tensor:
        return x.new_empty(len(token), x.shape[1])

    @torch.library.register_fake("megalite::sum_rows")
    def _(rows: Tensor, row: Tensor, weight: Tensor | None) -> Tensor:
        return rows.new_empty(len(row), rows.shape[1])

    @torch.library.register_fake("megalite::sum_rows_backward")
    def _(grad: Tensor, rows: Tensor, row: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(rows), torch.empty_like(weight)

    @torch.library.register_fake("megalite::router_logits")
    def _(x: Tensor, weight: Tensor) -> Tensor:
        return x.new_empty(len(x), len(weight), dtype=torch.float32)

    @torch.library.register_fake("megalite::router_input_gradient")
    def _(grad: Tensor, weight: Tensor, before: Tensor) -> Tensor:
        return torch.empty_like(before)

    @torch.library.register_fake("megalite::router_weight_gradient")
    def _(grad: Tensor, x: Tensor) -> Tensor:
        return grad.new_empty(grad.shape[1], x.shape[1])

    @torch.library.register_fake("megalite::grouped_product")
    def _(rows: Tensor, weight: Tensor, counts: Tensor, transpose: bool) -> Tensor:
        return rows.new_empty(len(rows), weight.shape[2 if transpose else 1])


if own():
    _register()
