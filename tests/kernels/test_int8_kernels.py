"""Rows rounded to int8, by megalite's kernel on each set of instructions and in torch."""

from __future__ import annotations

import pytest
import torch

from exactness import DTYPES, device, needs_kernels  # noqa: F401, device is a fixture
from megalite.kernels import int8
from megalite.kernels.int8 import round_rows


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (8, 768), (0, 5)])
def test_the_kernel_rounds_as_torch_does(
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if len(x) > 2:
        x[0] = 0.0
        x[1] = torch.arange(shape[1]) % 256 - 127.5  # halves, and a step of 1
        x[2] *= 1e-38
    numbers, scales = round_rows(x)
    monkeypatch.setattr(int8, "own", lambda: None)
    wanted_numbers, wanted_scales = round_rows(x)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(numbers, wanted_numbers)
    assert numbers.dtype == torch.uint8


@needs_kernels
def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"int8_rows: x has shape \[3\], but must have two"):
        torch.ops.megalite.int8_rows(torch.zeros(3))
    with pytest.raises(TypeError, match=r"int8_rows: x is .*Half"):
        torch.ops.megalite.int8_rows(torch.zeros(3, 4).half())
    torch.library.opcheck(torch.ops.megalite.int8_rows, (torch.randn(3, 40),))
