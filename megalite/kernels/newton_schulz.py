"""Orthogonalise matrices by a Newton-Schulz iteration (Muon, Jordan et al. 2024): all singular
values become about 1, and the singular vectors stay.

A step maps X to a·X + b·(XXᵀ)X + c·(XXᵀ)²X. The coefficients of five quick steps trade accuracy for
speed: the singular values end between 0.68 and 1.13 with the `simple` ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

SIMPLE: Coefficients = (3.4445, -4.7750, 2.0315)

COEFFICIENTS: dict[str, tuple[Coefficients, ...]] = {
    "simple": (SIMPLE,) * 5,
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        (8.1566, -22.4833, 15.8788),
        (4.0429, -2.8089, 0.5000),
        (3.8917, -2.7725, 0.5061),
        (3.2858, -2.3681, 0.4645),
        (2.3465, -1.7098, 0.4232),
    ),
    "deepseek_v4": (SIMPLE,) * 8 + ((2.0, -1.5, 0.5),) * 2,
}
"""Coefficients by name: of Jordan, Moonlight and torch.optim.Muon; of Megatron-LM's default; of
Amsel et al. 2025 as nanochat rounds them; of DeepSeek-V4, whose singular values end at 1.000."""

MARGIN = {"polar_express": 1.01}
"""Factor of the norm that a matrix is divided by first. These coefficients diverge for singular
values above 1, which rounding may cause."""

EPS = 1e-7
"""Lower bound of that norm."""


WORTH_CUTTING = 256
"""Rows from which on a product with its own transpose is computed in quarters."""


def orthogonalize(
    matrices: Sequence[Tensor],
    coefficients: str = "simple",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> Iterator[Tensor]:
    """Yield `matrices` of one shape [rows, columns] with singular values of about `scale`, computed
    in `dtype`.

    What is computed for a matrix on the CPU depends on it alone, to the last bit. `coefficients`
    names a row of `COEFFICIENTS`."""
    if matrices[0].device.type == "cpu":
        # One by one: a batched product may be computed otherwise than a single one, and is slower
        # here.
        for matrix in matrices:
            yield _iterate(matrix.to(dtype), coefficients, scale)
    else:
        yield from _iterate(
            torch.stack([matrix.to(dtype) for matrix in matrices]), coefficients, scale
        )


def _iterate(x: Tensor, name: str, scale: float) -> Tensor:
    """Iterate on `x` [rows, columns], or [N, rows, columns]."""
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # XXᵀ is the smaller product of a wide matrix
        x = x.mT.contiguous()
    # Frobenius norms, which no singular value exceeds, in fp32.
    norms = torch.linalg.vector_norm(
        x, dim=(-2, -1), keepdim=True, dtype=torch.float32
    ) * MARGIN.get(name, 1.0)
    # Divided by a bound of the largest singular value, so that all of them are in (0, 1], where the
    # iteration converges.
    x = x / norms.clamp(min=EPS).to(x.dtype)
    # The wanted scale goes into the last step's polynomial, which is linear in it: a pass saved.
    *steps, (a, b, c) = COEFFICIENTS[name]
    # a·X + (b·G + c·G²)·X with G = XXᵀ: three products a step.
    for each in (*steps, (a * scale, b * scale, c * scale)):
        gram = symmetric_product(x)
        polynomial = symmetric_product(gram, gram, beta=each[1], alpha=each[2])
        x = add_product(x, polynomial, x, beta=each[0])
    return x.mT if is_tall else x


def symmetric_product(
    x: Tensor, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """Return alpha · x xᵀ, plus beta · `add`, which is symmetric, too. `x` is [rows, columns] or
    [N, rows, columns].

    On the CPU the upper right quarter of a large one is copied from the lower left: a quarter less
    work."""
    rows = x.shape[-2]
    if x.dim() == 3 or rows < WORTH_CUTTING or rows % 2:
        if add is None:
            return x @ x.mT
        return (torch.addmm if x.dim() == 2 else torch.baddbmm)(
            add, x, x.mT, beta=beta, alpha=alpha
        )
    half = rows // 2
    out = x.new_empty(rows, rows)
    upper, lower = slice(None, half), slice(half, None)
    for a, b in ((upper, upper), (lower, upper), (lower, lower)):
        if add is None:
            torch.mm(x[a], x[b].mT, out=out[a, b])
        else:
            torch.addmm(add[a, b], x[a], x[b].mT, beta=beta, alpha=alpha, out=out[a, b])
    out[upper, lower] = out[lower, upper].mT
    return out


def iteration_products(rows: int, columns: int) -> tuple[tuple[int, int, int], ...]:
    """Return the matrix products [m, k] × [k, n] of one step for a matrix, as (m, n, k)."""
    # [few, many] is how `_iterate` lays the matrix: G = XXᵀ, G·G, and the polynomial times X.
    few, many = sorted((rows, columns))
    return (few, few, many), (few, few, few), (few, many, few)
