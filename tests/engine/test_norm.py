"""The gradient norm is exact to rounding, however many gradients there are."""

from __future__ import annotations

import pytest
import torch

from megalite.kernels.optimizer import sum_of_squares


@pytest.mark.parametrize("numel", [1, 255, 256, 1000, 3_000_001])
def test_sum_of_squares_is_exact_to_rounding(numel: int) -> None:
    """Squares of an fp32 norm over 256 elements round at about 1e-7; torch's norm of 3 million is
    off by 1e-4."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(numel, generator=generator) * torch.exp(
        2 * torch.randn(numel, generator=generator)
    )
    wanted = x.double().square().sum().item()
    assert sum_of_squares(x).item() == pytest.approx(wanted, rel=5e-7)
    assert sum_of_squares(x).dtype == torch.float64
