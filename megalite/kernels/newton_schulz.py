"""Orthogonalise matrices by a Newton-Schulz iteration (Muon, Jordan et al. 2024): all singular
values become about 1, and the singular vectors stay.

A step maps X to a·X + b·(XXᵀ)X + c·(XXᵀ)²X. The coefficients of five quick steps trade accuracy for
speed: the singular values end between 0.68 and 1.13 with the `simple` ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalite.kernels.library import pick

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
    by_kernel, is_tall = has_kernel(x), x.shape[-2] > x.shape[-1]
    # A wide matrix for megalite's kernel, a tall one for torch, whose products are quicker then.
    is_turned = by_kernel == is_tall and x.shape[-2] != x.shape[-1]
    if is_turned:
        x = x.mT.contiguous()
    # Frobenius norms, which no singular value exceeds, in fp32.
    norms = torch.linalg.vector_norm(
        x, dim=(-2, -1), keepdim=True, dtype=torch.float32
    ) * MARGIN.get(name, 1.0)
    # Divided by a bound of the largest singular value, so that all of them are in (0, 1], where the
    # iteration converges.
    x = x / norms.clamp(min=EPS).to(x.dtype)
    step = _wide_step if by_kernel else _tall_step
    # The wanted scale goes into the last step's polynomial, which is linear in it: a pass saved.
    *steps, (a, b, c) = COEFFICIENTS[name]
    for each in (*steps, (a * scale, b * scale, c * scale)):
        x = step(x, each)
    return x.mT if is_turned else x


def _wide_step(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Return a·X + (b·G + c·G²)·X with G = XXᵀ. The kernel computes one half of what is symmetric
    and copies it to the other."""
    a, b, c = coefficients
    ops = torch.ops.megalite
    gram = ops.symmetric_product(x, None, 1.0, 0.0)
    polynomial = ops.symmetric_product(gram, gram, c, b)
    return ops.polynomial_product(polynomial, x, a)


def _tall_step(x: Tensor, coefficients: Coefficients) -> Tensor:
    """Return a·X + X·(b·G + c·G²) with G = XᵀX, of one matrix or of a batch of them."""
    a, b, c = coefficients
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    gram = x.mT @ x
    polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
    return add_product(x, x, polynomial, beta=a)


def has_kernel(x: Tensor) -> bool:
    """Return whether megalite's kernel multiplies `x`: on the CPU, one matrix."""
    return x.device.type == "cpu" and x.dim() == 2 and pick("optimizer", x) == "megalite"


def iteration_products(rows: int, columns: int) -> tuple[tuple[int, int, int], ...]:
    """Return the matrix products [m, k] × [k, n] of one step for a matrix, as (m, n, k)."""
    # Of [few, many], or turned, of [many, few]: G = XXᵀ, G·G, and the polynomial times X.
    few, many = sorted((rows, columns))
    return (few, few, many), (few, few, few), (few, many, few)
