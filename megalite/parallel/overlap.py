"""Overlap of a tensor-parallel block's collectives with its matrix products (asynchronous tensor
parallelism; Megatron's `--tp-comm-overlap`, Wang et al. 2023).

Under sequence parallelism a block gathers its input in front of a column-parallel product and
scatters the sum behind a row-parallel one. Alone, each waits for all of the other: here both are cut
along the sequence, and a slice travels while the product of another is computed. torch does this
over symmetric memory, which the GPUs of one host read from each other.

The gradients of a column-parallel product need none of this: its two collectives run beside its two
products as it is (`kernels.linear`). What is left, and is overlapped, are three of the six:

    column-parallel, forward     gather x, product
    row-parallel, forward        product, reduce-scatter
    row-parallel, backward       gather the gradient, product

Where there is no symmetric memory, on the CPU and between hosts, the same modules communicate as
without overlap, and give the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from megalite.comm.collectives import all_gather, reduce_scatter
from megalite.comm.mesh import Axis, ranks_on_host
from megalite.kernels.linear import Recipe, WeightGradStore, WgradCallback, to_autograd
from megalite.parallel.tensor import (
    SEQUENCE,
    ColumnParallelLinear,
    RegionInput,
    RowParallelLinear,
)


def has_symmetric_memory(x: Tensor, axis: Axis) -> bool:
    """Return whether the ranks of `axis` can read `x` from each other's memory: they are GPUs of one
    host. Tensor ranks follow each other, so they share a host where its ranks are a multiple."""
    return x.is_cuda and ranks_on_host() % axis.size == 0


def gather_product(x: Tensor, matrix: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the whole x, [B,T/n,K] → [B,T,K], and its product with `matrix` [K,N], [B,T,N]."""
    if not has_symmetric_memory(x, axis):
        whole = all_gather(x, axis, SEQUENCE)
        return whole, torch.matmul(whole, matrix)
    assert axis.group is not None
    fused = torch.ops.symm_mem.fused_all_gather_matmul
    whole, (out,) = fused(x, [matrix], SEQUENCE, axis.group.group_name)
    return whole, out


def product_scatter(x: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    """Return this rank's slice [B,T/n,N] of the sum over ranks of x · `matrix`, [B,T,K] and
    [K,N]."""
    if not has_symmetric_memory(x, axis):
        return reduce_scatter(torch.matmul(x, matrix), axis, SEQUENCE)
    assert axis.group is not None
    fused = torch.ops.symm_mem.fused_matmul_reduce_scatter
    return fused(x, matrix, "sum", SEQUENCE, axis.group.group_name)


class OverlappedRegionInput(RegionInput):
    """Gathers the input of a column-parallel product while slices of it are multiplied."""

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        if not has_symmetric_memory(x, self.axis):
            return super().multiply(x, weight, bias, recipe)
        _, out = gather_product(x, weight.t(), self.axis)
        return out if bias is None else out + bias


class _ProductScatter(Function):
    """Compute a row-parallel product together with the collective on its way out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        axis: Axis,
        wgrad_callback: WgradCallback | None,
        later: WeightGradStore | None,
    ) -> Tensor:
        of_input, of_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_input else None)
        ctx.wgrad_callback, ctx.later, ctx.parameter = wgrad_callback or to_autograd, later, weight
        ctx.axis = axis
        return product_scatter(x, weight.t(), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if weight is None:
            whole, grad_x = all_gather(grad, ctx.axis, SEQUENCE), None
        else:
            whole, grad_x = gather_product(grad, weight, ctx.axis)
        if x is None:
            return grad_x, None, None, None, None
        gemm = partial(ctx.wgrad_callback, ctx.parameter, whole.flatten(0, -2), x.flatten(0, -2))
        if ctx.later:
            ctx.later.put(partial(gemm, True))
            return grad_x, None, None, None, None
        return grad_x, gemm(True), None, None, None


class OverlappedColumnLinear(ColumnParallelLinear):
    """Column-parallel linear whose input is gathered while it is multiplied."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.region = OverlappedRegionInput(self.axis, self.sequence)


class OverlappedRowLinear(RowParallelLinear):
    """Row-parallel linear whose output is summed over the ranks while it is computed."""

    def forward(self, x: Tensor) -> Tensor:
        out = _ProductScatter.apply(x, self.weight, self.axis, self.wgrad_callback, self.later)
        return out if self.bias is None else out + self.bias


OVERLAPPED = {
    "column": OverlappedColumnLinear,
    "vocab": OverlappedColumnLinear,
    "row": OverlappedRowLinear,
}
"""What takes the place of the linears of `parallel.tensor` under `parallel.tensor_overlap`, by how
the weight is cut."""
