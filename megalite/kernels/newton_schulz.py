"""Orthogonalise matrices by a Newton-Schulz iteration (Muon, Jordan et al. 2024): all singular values become about 1,
and the singular vectors stay.

A step maps X to a·X + b·(XXᵀ)X + c·(XXᵀ)²X. The coefficients of five quick steps trade accuracy for speed: the singular
values end between 0.68 and 1.13 with the `simple` ones."""

from __future__ import annotations

from collections.abc import Sequence

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
"""Coefficients by name: of Jordan, Moonlight and torch.optim.Muon; of Megatron-LM's default; of Amsel et al. 2025 as
nanochat rounds them; of DeepSeek-V4, whose singular values end at 1.000."""

MARGIN = {"polar_express": 1.01}
"""Factor of the norm that a matrix is divided by first. These coefficients diverge for singular values above 1, which
rounding may cause."""

EPS = 1e-7
"""Lower bound of that norm."""


def orthogonalize(matrices: Tensor, coefficients: str = "simple") -> Tensor:
    """Return `matrices` [N, rows, columns] with singular values of about 1, in their precision.

    What is computed for a matrix on the CPU depends on it alone, to the last bit. `coefficients` names a row of
    `COEFFICIENTS`."""
    if matrices.device.type == "cpu":
        # One by one: a batched product may be computed otherwise than a single one.
        return torch.stack([_iterate(matrix[None], coefficients)[0] for matrix in matrices])
    return _iterate(matrices, coefficients)


def _iterate(x: Tensor, name: str) -> Tensor:
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:  # XXᵀ is the smaller product of a wide matrix
        x = x.mT
    # Frobenius norms, which no singular value exceeds, in fp32.
    norms = torch.linalg.vector_norm(x.float(), dim=(1, 2), keepdim=True) * MARGIN.get(name, 1.0)
    x = x / norms.clamp(min=EPS).to(x.dtype)
    for a, b, c in COEFFICIENTS[name]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def iteration_flops(rows: int, columns: int, coefficients: Sequence[Coefficients] | int = 5) -> float:
    """Return the floating-point operations of orthogonalising a matrix in so many steps."""
    steps = coefficients if isinstance(coefficients, int) else len(coefficients)
    few, many = sorted((rows, columns))
    return 2.0 * steps * few * few * (2 * many + few)
