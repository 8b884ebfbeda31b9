"""DoRA (Liu et al. 2024): the rows of an adapted weight W + s·BA keep only their direction, and each has
a magnitude of its own that is trained beside A and B: m · (W + s·BA) / ‖W + s·BA‖.

The norms are constants to the gradient, as in the paper's section 4.3 and in PEFT. A linear's output,
without its bias, is multiplied by m / ‖W + s·BA‖, feature by feature. Letters in shapes: O output
features, I input features, R the rank of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.quantised import QuantisedWeight

Total = Callable[[Tensor], Tensor]
"""Sums over the ranks that have the other input features of a weight, in place."""


@torch.no_grad()
def squared_norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Return ‖w + scale · b A‖² of each row w of a weight and b of B, fp32 [O]. BA is not made: its
    products with W and itself are those of matrices with R rows or columns."""
    a, b = a_RI.float(), b_OR.float()
    found = torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.float32).square()
    found += 2 * scale * (F.linear(weight_OI, a_RI.to(weight_OI.dtype)).float() * b).sum(1)
    return found + scale**2 * ((b @ (a @ a.t())) * b).sum(1)


def factors(
    weight: Tensor,
    slices: Sequence[slice],
    updates: Sequence[tuple[Tensor, Tensor, Tensor]],
    scale: float,
    total: Total | None = None,
) -> Tensor:
    """Return what each output feature at hand is multiplied by, [O]: 1 where it is in none of the
    ascending `slices`, of which each has an update (A, B, m). `weight` is this rank's part; `total`
    sums over ranks that have other input features."""
    dtype = updates[0][2].dtype
    dense = weight.dequantise(dtype) if isinstance(weight, QuantisedWeight) else weight
    pairs = list(zip(slices, updates, strict=True))
    squares = torch.cat([squared_norms(dense[rows], a, b, scale) for rows, (a, b, _) in pairs])
    if total is not None:
        squares = total(squares)
    # Rounded as m is: where nothing is learned yet the factor is 1.
    norms = squares.sqrt().to(dtype).split([len(m) for _, (_, _, m) in pairs])
    found, end = [], 0
    for (rows, (_, _, m)), norm in zip(pairs, norms, strict=True):
        found += [m.new_ones(rows.start - end), m / norm]
        end = rows.stop
    return torch.cat([*found, updates[0][2].new_ones(len(dense) - end)])
