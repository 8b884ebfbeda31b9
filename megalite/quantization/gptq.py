"""GPTQ (Frantar et al. 2023): rounds the columns of a matrix one after another, and after each
moves what is left so that the products with the inputs stay near. Column order by the inputs' size
(act-order) with scales found before (static groups), the one kind that compressed-tensors takes
without an index of groups."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.kernels.schemes import Scheme

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it."""
BLOCK = 128
"""Columns that are done before the ones behind them are moved: one large product in place of many
small ones."""


def gptq(weight: Tensor, hessian: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Return the numbers of `weight` [N, K] under `scheme` with `scales`.

    `hessian` [K, K], fp64, is the sum of x xᵀ over the inputs x; its scale does not matter."""
    # Columns of large inputs first, while many are left to make up for their errors. One without
    # any input counts as 1, as `inverse_factor` has it.
    diagonal = hessian.diagonal()
    order = torch.where(diagonal == 0, 1.0, diagonal).argsort(descending=True, stable=True)
    rest = weight.float()[:, order].clone()
    scale = scheme.spread(scales, tuple(weight.shape))[:, order]
    numbers = scheme.encode(rest, scale)  # for its shape and dtype: each column is written anew

    def round_column(column: int) -> Tensor:
        # The same numbers as slices of one column: a scheme encodes element by element.
        here = slice(column, column + 1)
        numbers[:, here] = scheme.encode(rest[:, here], scale[:, here])
        return scheme.decode(numbers[:, here], scale[:, here])

    column_by_column(rest, inverse_factor(hessian[order][:, order]), round_column)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return numbers[:, back]


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of H⁻¹, fp32 [K, K]: row c says how the error of column c is
    made up for by those after it."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    # An input that was always 0 says nothing: its column moves no other.
    diagonal[diagonal == 0] = 1.0
    diagonal.add_(DAMPING * diagonal.mean())
    # In fp64: the inverse of a nearly singular matrix has no correct digit in fp32.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True).float()


def column_by_column(rest: Tensor, factor: Tensor, settle: Callable[[int], Tensor]) -> None:
    """Change the columns of a matrix one after another, and after each move those that are left in
    `rest` [N, K], so that the products with the inputs stay near. `settle` is given the number of
    a column and returns what becomes of it, [N, 1]; from the first of each `BLOCK` columns on, all
    of these are moved already."""
    columns = rest.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty(len(rest), stop - start)
        for column in range(start, stop):
            error = (rest[:, column : column + 1] - settle(column)) / factor[column, column]
            # At once within the block; behind it all errors together, below.
            rest[:, column:stop] -= error * factor[column, column:stop]
            errors[:, column - start] = error[:, 0]
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
