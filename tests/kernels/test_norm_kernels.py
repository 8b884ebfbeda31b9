from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exactness import BOUND, DTYPES, check_against_float64, device, needs_kernels  # noqa: F401, device is a fixture
from megalite.kernels.norm import add_rms_norm, rms_norm

EPS = 1e-5
SHAPES = [(1, 5), (3, 7), (5, 64), (2, 3, 100), (129, 512), (4, 1023), (0, 16), (3, 4096)]


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain_rms_norm(x + residual, weight), x + residual


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    inputs = [random(*shape), random(shape[-1], seed=1)]
    check_against_float64(lambda x, w: rms_norm(x, w, EPS), plain_rms_norm, inputs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    inputs = [random(*shape), random(*shape, seed=2), random(shape[-1], seed=1)]
    check_against_float64(lambda x, r, w: add_rms_norm(x, r, w, EPS), plain_add_rms_norm, inputs, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    inputs = [random(40, 6).t(), random(6, 80)[:, ::2], random(80)[::2]]
    check_against_float64(lambda x, r, w: add_rms_norm(x, r, w, EPS), plain_add_rms_norm, inputs, dtype, device)


@needs_kernels
def test_bad_input_is_named(device: torch.device) -> None:  # noqa: F811
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \[7\], but must have \[8\]"):
        torch.ops.megalite.rms_norm(x, torch.ones(7, device=device), EPS)
    with pytest.raises(TypeError, match=r"rms_norm: x is .*Long.* must be float32 or bfloat16"):
        torch.ops.megalite.rms_norm(x.long(), torch.ones(8, device=device).long(), EPS)
    with pytest.raises(TypeError, match=r"rms_norm: weight is .*Float.* must be .*BFloat16"):
        torch.ops.megalite.rms_norm(x.bfloat16(), torch.ones(8, device=device), EPS)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual has shape \[1, 8\], but must have \[2, 8\]"):
        torch.ops.megalite.add_rms_norm(x, x[:1], torch.ones(8, device=device), EPS)


@needs_kernels
def test_operators_are_well_formed(device: torch.device) -> None:  # noqa: F811
    """Schema, autograd and fake kernels agree, so that torch.compile may keep them whole."""
    x, weight = torch.randn(3, 8, device=device).requires_grad_(), torch.randn(8, device=device).requires_grad_()
    torch.library.opcheck(torch.ops.megalite.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.megalite.add_rms_norm, (x, x.detach().clone().requires_grad_(), weight, EPS))
