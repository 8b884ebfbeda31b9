"""Products of fp8 codes as GPUs take them: a stand-in for torch's scaled product holds operands to
the rules of cuBLAS, finds each scale where it would look, and multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import error
from megalite.kernels import fp8
from megalite.kernels.fp8 import E5M2, Name, Rounded, quantise
from megalite.kernels.linear import accumulate_weight_gradient, linear
from megalite.kernels.recipes import RECIPES
from megalite.kernels.scaled_product import scaled_product, takes


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def read_scales(scale: Tensor, kind: Any, size: int, length: int, second: bool) -> Tensor:
    """The scale of each element [size,length] of an operand, as torch's CUDA code documents what it
    takes (aten/src/ATen/native/cuda/ScaledBlas.cpp)."""
    if kind == F.ScalingType.TensorWise:
        assert scale.numel() == 1
        return scale.expand(size, length)
    if kind == F.ScalingType.RowWise:
        assert scale.shape == ((1, size) if second else (size, 1))
        assert scale.is_contiguous()
        return scale.reshape(size, 1).expand(size, length)
    if kind == F.ScalingType.BlockWise1x32:
        across = up(-(-length // 32), 4)
        assert scale.dtype == torch.float8_e8m0fnu
        assert scale.is_contiguous()
        assert scale.numel() == up(size, 128) * across
        row, block = torch.arange(size)[:, None], torch.arange(length)[None] // 32
        tile = row // 128 * (across // 4) + block // 4
        return scale.float()[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4]
    blocks = -(-length // 128)
    assert scale.dtype == torch.float32
    if kind == F.ScalingType.BlockWise1x128:
        assert scale.shape == (size, blocks)
        assert scale.stride() == (1, size if blocks > 1 else 1)
        return scale[:, torch.arange(length) // 128]
    assert kind == F.ScalingType.BlockWise128x128
    assert scale.shape == (up(blocks, 4), size // 128)
    assert scale.stride() == (1, up(blocks, 4))
    return scale[torch.arange(length)[None] // 128, torch.arange(size)[:, None] // 128]


def stand_in(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    kind_a: Any,
    scale_b: Tensor,
    kind_b: Any,
    swizzle_a: Any = None,
    swizzle_b: Any = None,
    bias: Tensor | None = None,
    output_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    (rows, length), columns = a.shape, b.shape[1]
    assert a.stride() == (length, 1)
    assert b.stride() == (1, length)
    assert length % 16 == columns % 16 == 0
    assert not (a.dtype == b.dtype == torch.float8_e5m2)
    assert bias is None or (bias.dtype == output_dtype == torch.bfloat16)
    in_tiles = kind_a == F.ScalingType.BlockWise1x32
    wanted = F.SwizzleType.SWIZZLE_32_4_4 if in_tiles else None
    assert swizzle_a == swizzle_b == wanted
    left = a.double() * read_scales(scale_a, kind_a, rows, length, False).double()
    right = b.t().double() * read_scales(scale_b, kind_b, columns, length, True).double()
    out = left @ right.t()
    return (out if bias is None else out + bias.double()).to(output_dtype)


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies codes."""
    monkeypatch.setattr(F, "scaled_mm", stand_in)
    monkeypatch.setattr(fp8, "takes", lambda name, x: True)


def numbers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 4.0 ** torch.randint(
        -6, 6, (shape[-1],), generator=generator
    )


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "nvfp4"])
@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_codes_give_the_products_of_what_they_stand_for(
    name: Name, kernels: bool, bias: bool, chip: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three of a linear layer, of which a chip has other layouts; 5 rows are padded to a group
    of 16."""
    recipe = RECIPES[name]
    if not kernels:
        monkeypatch.setattr(fp8, "pick", lambda operation, x: "torch")
    weight = numbers(384, 640, seed=1).bfloat16()
    offset = numbers(384, seed=2).bfloat16() if bias else None
    few = numbers(1, 5, 640, seed=3).bfloat16()
    x, grad = numbers(2, 128, 640, seed=4).bfloat16(), numbers(2, 128, 384, seed=5).bfloat16()
    found = [recipe.product(few, weight, offset), recipe.product(x, weight, offset)]
    found.append(recipe.input_gradient(grad, weight))
    operands = recipe.wgrad_operands(grad.flatten(0, 1), x.flatten(0, 1))
    assert all(isinstance(operand, Rounded) for operand in operands)
    into = torch.full((384, 640), torch.nan)
    accumulate_weight_gradient(into, *operands, add=False)
    accumulate_weight_gradient(into, *operands, add=True)
    monkeypatch.setattr(fp8, "takes", takes)
    wide = None if offset is None else offset.float()
    wanted = [recipe.product(each.float(), weight.float(), wide) for each in (few, x)]
    wanted.append(recipe.input_gradient(grad.float(), weight.float()))
    rounded_grad, rounded_x = recipe.wgrad_operands(
        grad.flatten(0, 1).float(), x.flatten(0, 1).float()
    )
    assert isinstance(rounded_grad, Tensor)
    assert isinstance(rounded_x, Tensor)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        # bf16 rounds once, by 2^-9.
        assert error(ours, theirs) <= 2**-8
    assert error(into, 2 * rounded_grad.t() @ rounded_x) <= 1e-5


def test_a_layer_without_an_engine_gets_its_gradient(chip: None) -> None:
    x, weight = numbers(128, 256, seed=6).bfloat16(), numbers(128, 256, seed=7).bfloat16()
    weight.requires_grad_()
    linear(x, weight, recipe=RECIPES["blockwise"]).sum().backward()
    assert weight.grad is not None
    assert weight.grad.shape == weight.shape


def test_torchs_own_products_agree_where_a_cpu_has_them() -> None:
    a, b = numbers(32, 64, seed=8), numbers(48, 64, seed=9)
    for name, blocks in (("current", ((32, 64), (48, 64))), ("rowwise", ((1, 64), (1, 64)))):
        left, right = (
            quantise(x, block)._replace(recipe=name)
            for x, block in zip((a, b), blocks, strict=True)
        )
        wanted = left.dequantise(torch.float32) @ right.dequantise(torch.float32).t()
        assert error(scaled_product(left, right, torch.bfloat16), wanted) <= 2**-8


REFUSED = {
    r"a has 40 columns, which must be a multiple of 16": ((32, 40), (32, 40), {}),
    r"b has 24 rows, which must be a multiple of 16": ((32, 32), (24, 32), {}),
    r"32 and 64 columns": ((32, 32), (32, 64), {}),
    r"one of the operands must be e4m3": ((32, 32), (32, 32), {"format": E5M2}),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_a_gpu_would_refuse_is_refused_here(said: str) -> None:
    a, b, options = REFUSED[said]
    left, right = (
        quantise(torch.ones(shape), (1, 128), **options)._replace(recipe="rowwise")
        for shape in (a, b)
    )
    with pytest.raises(ValueError, match=said):
        scaled_product(left, right, torch.bfloat16)


def test_codes_must_lie_row_by_row() -> None:
    x = quantise(torch.ones(32, 32), (1, 128))
    with pytest.raises(ValueError, match=r"b has strides \(1, 32\), but must lie row by row"):
        scaled_product(x, x._replace(codes=x.codes.t()), torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "capability", "cuda", "is_taken"),
    [
        ("blockwise", (9, 0), "12.9", True), ("blockwise", (9, 0), "13.0", True), ("blockwise", (9, 0), "12.8", False),
        ("blockwise", (10, 0), "13.0", False), ("mxfp8", (10, 0), "12.8", True), ("mxfp8", (9, 0), "13.0", False),
        ("rowwise", (8, 9), "12.8", True), ("current", (8, 0), "12.8", False), ("current", (12, 0), "12.8", True),
    ],
)  # fmt: skip
def test_which_chips_take_what(
    name: Name,
    capability: tuple[int, int],
    cuda: str,
    is_taken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    on_gpu: Any = OnGpu()
    assert takes(name, on_gpu) == is_taken
    assert not takes(name, torch.ones(1, dtype=torch.bfloat16))
    on_gpu.dtype = torch.float32
    assert not takes(name, on_gpu)
