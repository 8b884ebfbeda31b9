from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import DTYPES, check_against_float64, device, error, needs_kernels  # noqa: F401, device: a fixture
from megalite.config import KernelsConfig
from megalite.errors import ConfigError
from megalite.kernels import library
from megalite.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

EPS = 1e-5
# The last two are longer than a block of CUDA has threads, in elements and in packs of 16 bytes.
SHAPES = [(1, 5), (3, 7), (5, 64), (2, 3, 100), (129, 512), (0, 16), (4, 1027), (3, 8200)]


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain_rms_norm(x + residual, weight), x + residual


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def plain_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    return plain_layer_norm(x + residual, weight, bias), x + residual


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
    check_against_float64(
        lambda x, r, w: add_rms_norm(x, r, w, EPS), plain_add_rms_norm, inputs, dtype, device
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_added_to_the_weight(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    inputs = [random(*shape), random(*shape, seed=2), random(shape[-1], seed=1)]
    check_against_float64(
        lambda x, r, w: (rms_norm(x, w, EPS, 1.0), *add_rms_norm(x, r, w, EPS, 1.0)),
        lambda x, r, w: (plain_rms_norm(x, 1 + w), *plain_add_rms_norm(x, r, 1 + w)),
        inputs,
        dtype,
        device,
    )


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_nothing_of_the_weight_is_lost_beside_one(
    kernels: str,
    device: torch.device,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """1 + 2⁻⁹ is 1 in bf16."""
    monkeypatch.setattr(library, "_wishes", KernelsConfig(norm=kernels))
    x = random(200, 64).to(device, torch.bfloat16)
    plain, scaled = (
        rms_norm(x, torch.full_like(x[0], weight), EPS, 1.0).double().norm()
        for weight in (0.0, 2.0**-9)
    )
    # Roundings of 12,800 numbers by up to 2⁻⁹ average out far below that.
    assert (scaled / plain).item() == pytest.approx(1 + 2.0**-9, abs=2.0**-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    inputs = [random(*shape), random(shape[-1], seed=1), random(shape[-1], seed=3)]
    check_against_float64(
        lambda x, w, b: layer_norm(x, w, b, EPS), plain_layer_norm, inputs, dtype, device
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    inputs = [
        random(*shape),
        random(*shape, seed=2),
        random(shape[-1], seed=1),
        random(shape[-1], seed=3),
    ]
    check_against_float64(
        lambda *inputs: add_layer_norm(*inputs, EPS), plain_add_layer_norm, inputs, dtype, device
    )


def test_large_mean(device: torch.device) -> None:  # noqa: F811
    """mean(x²) - mean(x)² in fp32 would be wrong by 1e-3 here: 100² · 2^-24 of a variance of 1."""
    inputs = [random(8, 4096) + 100, random(4096, seed=1), random(4096, seed=3)]
    check_against_float64(
        lambda x, w, b: layer_norm(x, w, b, EPS), plain_layer_norm, inputs, torch.float32, device
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    inputs = [random(40, 6).t(), random(6, 80)[:, ::2], random(80)[::2]]
    check_against_float64(
        lambda x, r, w: add_rms_norm(x, r, w, EPS), plain_add_rms_norm, inputs, dtype, device
    )
    inputs.append(random(120)[::3])
    check_against_float64(
        lambda *inputs: add_layer_norm(*inputs, EPS), plain_add_layer_norm, inputs, dtype, device
    )


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whatever_the_threads(dtype: torch.dtype) -> None:
    x, grad, grad_sum = (random(300, 257, seed=seed).to(dtype) for seed in range(3))
    weight, bias = random(257).to(dtype), random(257, seed=1).to(dtype)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        out, total, mean, rstd = torch.ops.megalite.add_layer_norm(x, grad, weight, bias, EPS)
        rms = torch.ops.megalite.rms_norm_backward(grad, None, x, weight, rstd)
        layer = torch.ops.megalite.layer_norm_backward(grad, grad_sum, x, weight, mean, rstd)
        found.append((out, total, mean, rstd, *rms, *layer))
    torch.set_num_threads(before)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@needs_kernels
def test_bad_input_is_named(device: torch.device) -> None:  # noqa: F811
    x, ones = torch.zeros(2, 8, device=device), torch.ones(8, device=device)
    with pytest.raises(ValueError, match=r"rms_norm: weight has shape \[7\], but must have \[8\]"):
        torch.ops.megalite.rms_norm(x, torch.ones(7, device=device), EPS)
    with pytest.raises(TypeError, match=r"rms_norm: x is .*Long.* must be float32 or bfloat16"):
        torch.ops.megalite.rms_norm(x.long(), ones.long(), EPS)
    with pytest.raises(TypeError, match=r"rms_norm: weight is .*Float.* must be .*BFloat16"):
        torch.ops.megalite.rms_norm(x.bfloat16(), ones, EPS)
    with pytest.raises(
        ValueError, match=r"add_rms_norm: residual has shape \[1, 8\], but must have \[2, 8\]"
    ):
        torch.ops.megalite.add_rms_norm(x, x[:1], ones, EPS)
    with pytest.raises(ValueError, match=r"layer_norm: bias has shape \[7\], but must have \[8\]"):
        torch.ops.megalite.layer_norm(x, ones, torch.ones(7, device=device), EPS)
    with pytest.raises(ValueError, match=r"layer_norm: x has no dimension to normalise"):
        torch.ops.megalite.layer_norm(x.sum(), ones, ones, EPS)
    with pytest.raises(
        ValueError, match=r"rms_norm_backward: grad_sum has shape \[1, 8\], but must have \[2, 8\]"
    ):
        torch.ops.megalite.rms_norm_backward(x, x[:1], x, ones, x[:, 0])
    with pytest.raises(
        ValueError, match=r"layer_norm_backward: mean has shape \[1\], but must have \[2\]"
    ):
        torch.ops.megalite.layer_norm_backward(x, None, x, ones, x[:1, 0], x[:, 0])
    with pytest.raises(
        TypeError, match=r"layer_norm_backward: rstd is .*BFloat16.* must be .*Float"
    ):
        torch.ops.megalite.layer_norm_backward(x, None, x, ones, x[:, 0], x[:, 0].bfloat16())


@needs_kernels
def test_operators_are_well_formed(device: torch.device) -> None:  # noqa: F811
    """Schema, autograd and fake kernels agree, so that torch.compile may keep them whole."""
    x, residual = (torch.randn(3, 8, device=device).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(8, device=device).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.megalite.rms_norm, (x, weight, EPS))
    torch.library.opcheck(torch.ops.megalite.add_rms_norm, (x, residual, weight, EPS))
    torch.library.opcheck(torch.ops.megalite.layer_norm, (x, weight, bias, EPS))
    torch.library.opcheck(torch.ops.megalite.add_layer_norm, (x, residual, weight, bias, EPS))


class Apex(ModuleType):
    """Stands in for apex.normalization.fused_layer_norm with its signatures, and notes what is
    called."""

    calls: list[str]

    def fused_rms_norm_affine(
        self,
        input: Tensor,
        weight: Tensor,
        normalized_shape: torch.Size,
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:
        self.calls.append("rms_norm")
        return F.rms_norm(input, normalized_shape, weight, eps)

    def fused_layer_norm_affine(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        normalized_shape: torch.Size,
        eps: float = 1e-6,
        memory_efficient: bool = False,
    ) -> Tensor:
        self.calls.append("layer_norm")
        return F.layer_norm(input, normalized_shape, weight, bias, eps)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[Apex]:
    modules = {name: ModuleType(name) for name in ("apex", "apex.normalization")}
    modules["apex"].__spec__ = importlib.machinery.ModuleSpec("apex", None)
    stand_in = modules["apex.normalization.fused_layer_norm"] = Apex("fused_layer_norm")
    stand_in.calls = []
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield stand_in
    library.use(KernelsConfig())


def test_apex_computes_where_it_is_asked_for(apex: Apex) -> None:
    library.use(KernelsConfig(norm="apex"))
    x, residual, weight, bias = (
        random(4, 8),
        random(4, 8, seed=2),
        random(8, seed=1),
        random(8, seed=3),
    )
    assert error(rms_norm(x, weight, EPS), plain_rms_norm(x, weight)) < 1e-12
    assert error(layer_norm(x, weight, bias, EPS), plain_layer_norm(x, weight, bias)) < 1e-12
    for found, wanted in (
        (add_rms_norm(x, residual, weight, EPS), plain_add_rms_norm(x, residual, weight)),
        (
            add_layer_norm(x, residual, weight, bias, EPS),
            plain_add_layer_norm(x, residual, weight, bias),
        ),
    ):
        assert all(error(a, b) < 1e-12 for a, b in zip(found, wanted, strict=True))
    assert apex.calls == ["rms_norm", "layer_norm"] * 2


def test_apex_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"kernels\.norm is apex, but apex is not installed here"):
        library.use(KernelsConfig(norm="apex"))
