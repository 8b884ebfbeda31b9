from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from exactness import BOUND, DTYPES, check_against_float64, device, error, needs_kernels  # noqa: F401, device is a fixture
from megalite.config import KernelsConfig
from megalite.kernels import library
from megalite.kernels.activation import clamped_glu, gelu, swiglu

SHAPES = [(1, 2), (3, 14), (5, 64), (2, 3, 100), (129, 512), (4, 2046), (0, 16), (3, 0), (3, 8192)]


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def plain_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def plain_clamped_glu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2].clamp(max=2.0), gate_up[..., 1::2].clamp(-2.0, 2.0)
    return gate * torch.sigmoid(1.7 * gate) * (up + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 100), (0, 16)])
def test_clamped_glu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Of a size that is clamped, too; bf16 rounds what lies between.
    check_against_float64(
        lambda x: clamped_glu(x, 1.7, 2.0), plain_clamped_glu, [random(*shape)], dtype, torch.device("cpu"),
        2 * BOUND[dtype],
    )  # fmt: skip


def random(*shape: int, seed: int = 0) -> Tensor:
    """Of a size at which the nonlinearities bend, and a few far out."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.view(-1)[::17] *= 10
    return 2 * x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    check_against_float64(swiglu, plain_swiglu, [random(*shape)], dtype, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    check_against_float64(gelu, plain_gelu, [random(*shape)], dtype, device)
    check_against_float64(
        gelu, plain_gelu, [random(*shape), random(shape[-1], seed=1)], dtype, device
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_contiguous(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    check_against_float64(swiglu, plain_swiglu, [random(40, 6).t()], dtype, device)
    check_against_float64(gelu, plain_gelu, [random(6, 80)[:, ::2], random(80)[::2]], dtype, device)


@pytest.mark.parametrize("operation", [swiglu, gelu])
def test_far_out(operation: Callable[[Tensor], Tensor], device: torch.device) -> None:  # noqa: F811
    """Where e^x overflows or vanishes, results and gradients are finite, and a NaN stays one."""
    x = torch.tensor([-1e15, -1e4, -90.0, -88.0, -20.0, 0.0, 20.0, 88.0, 90.0, 1e4], device=device)
    x = torch.stack((x, torch.ones_like(x)), 1).requires_grad_()
    operation(x).sum().backward()
    wanted = x.detach().double().cpu().requires_grad_()
    (plain_swiglu if operation is swiglu else plain_gelu)(wanted).sum().backward()
    assert x.grad is not None
    assert wanted.grad is not None
    torch.testing.assert_close(x.grad.double().cpu(), wanted.grad, rtol=1e-5, atol=1e-6)
    assert operation(torch.full((3, 2), torch.nan, device=device)).isnan().all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    x, bias = random(300, 1000).to(device, dtype), random(1000).to(device, dtype)
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append((torch.ops.megalite.swiglu(x), *torch.ops.megalite.gelu_backward(x, x, bias)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernels
def test_bad_input_is_named(device: torch.device) -> None:  # noqa: F811
    ops, x = torch.ops.megalite, torch.zeros(2, 8, device=device)
    with pytest.raises(ValueError, match="swiglu: gate_up's last dimension is 7, but must be even"):
        ops.swiglu(x[:, :7])
    with pytest.raises(ValueError, match="swiglu: gate_up has no dimension"):
        ops.swiglu(x[0, 0])
    with pytest.raises(TypeError, match=r"swiglu: gate_up is .*Half.* must be float32 or bfloat16"):
        ops.swiglu(x.half())
    with pytest.raises(
        ValueError, match=r"swiglu_backward: grad has shape \[2, 8\], but must have \[2, 4\]"
    ):
        ops.swiglu_backward(x, x)
    with pytest.raises(ValueError, match=r"gelu: bias has shape \[2, 8\], but must have \[8\]"):
        ops.gelu(x, x)
    with pytest.raises(TypeError, match=r"gelu: bias is .*BFloat16.* must be .*Float"):
        ops.gelu(x, x[0].bfloat16())
    with pytest.raises(
        ValueError, match=r"gelu_backward: grad has shape \[1, 8\], but must have \[2, 8\]"
    ):
        ops.gelu_backward(x[:1], x, None)


def test_torch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_wishes", KernelsConfig())
    library.use(KernelsConfig(activation="torch"))
    x, bias = random(3, 8).float(), random(8).float()
    assert torch.equal(swiglu(x), plain_swiglu(x))
    assert torch.equal(gelu(x, bias), plain_gelu(x, bias))
    assert library.explain("activation", "cpu") == ("torch", "kernels.activation asks for it")


@needs_kernels
def test_operators_are_well_formed(device: torch.device) -> None:  # noqa: F811
    """Schema, autograd and fake kernels agree, so that torch.compile may keep them whole."""
    x, bias = (
        torch.randn(6, 8, device=device).requires_grad_(),
        torch.randn(8, device=device).requires_grad_(),
    )
    across = x.detach().t().clone(memory_format=torch.preserve_format).requires_grad_()
    for gate_up in (x, across):
        torch.library.opcheck(torch.ops.megalite.swiglu, (gate_up,))
        torch.library.opcheck(torch.ops.megalite.gelu, (gate_up, None))
    torch.library.opcheck(torch.ops.megalite.gelu, (x, bias))
