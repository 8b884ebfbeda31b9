"""Orthogonalise matrices by a Newton-Schulz iteration (Muon, Jordan et al. 2024): all singular
values become about 1, and the singular vectors stay.

A step maps X to a·X + b·(XXᵀ)X + c·(XXᵀ)²X. The coefficients of five quick steps trade accuracy for
speed: the singular values end between 0.68 and 1.13 with the `simple` ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalite.kernels.library import has_matrix_unit, pick

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
        polynomial = symmetric_product(gram, gram, alpha=each[2], beta=each[1])
        x = polynomial_product(polynomial, x, beta=each[0])
    return x.mT if is_tall else x


def symmetric_product(
    x: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
) -> Tensor:
    """Return x xᵀ, or with `add`, which is symmetric, too, alpha · x xᵀ + beta · `add`. `x` is
    [rows, columns] or [N, rows, columns].

    megalite's kernel computes one half of it and copies it to the other."""
    if has_kernel(x):
        return torch.ops.megalite.symmetric_product(x, add, alpha, beta)
    if add is None:
        return x @ x.mT
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    return add_product(add, x, x.mT, beta=beta, alpha=alpha)


def polynomial_product(matrix: Tensor, x: Tensor, beta: float) -> Tensor:
    """Return `matrix` · x + beta · x: [rows, rows] and [rows, columns], or N of both."""
    if has_kernel(x):
        return torch.ops.megalite.polynomial_product(matrix, x, beta)
    return (torch.addmm if x.dim() == 2 else torch.baddbmm)(x, matrix, x, beta=beta)


def has_kernel(x: Tensor) -> bool:
    """Return whether megalite's kernel multiplies `x`: on the CPU, but not where oneDNN has a
    matrix unit for bf16."""
    is_quicker_in_torch = x.dtype == torch.bfloat16 and has_matrix_unit()
    on_cpu = x.device.type == "cpu" and x.dim() == 2
    return on_cpu and not is_quicker_in_torch and pick("optimizer", x) == "megalite"


def iteration_products(rows: int, columns: int) -> tuple[tuple[int, int, int], ...]:
    """Return the matrix products [m, k] × [k, n] of one step for a matrix, as (m, n, k)."""
    # [few, many] is how `_iterate` lays the matrix: G = XXᵀ, G·G, and the polynomial times X.
    few, many = sorted((rows, columns))
    return (few, few, many), (few, few, few), (few, many, few)
