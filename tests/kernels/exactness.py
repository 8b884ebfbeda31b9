"""An operator against its float64 reference: results and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.kernels import library

BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error, relative to the largest element of the reference. bf16 itself rounds by 2^-9."""

BUILT = library.own() is not None
needs_kernels = pytest.mark.skipif(not BUILT, reason="megalite's kernels are not built here")

DTYPES = list(BOUND)


def devices(with_amx: bool = False) -> list[str]:
    """Where kernels are built for: CPU instruction sets by their number, and CUDA. Few have a use
    for AMX: their tests ask for it."""
    module = library.own()
    if module is None:
        return ["cpu"]
    best = {"avx2": 1, "avx512": 2, "amx": 2 + with_amx}.get(module.isa(), 0)
    return [f"cpu-{isa}" for isa in range(best + 1)] + (
        ["cuda"] if module.has_cuda and torch.cuda.is_available() else []
    )


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device in turn; on the CPU, each set of instructions."""
    yield from _running_on(request.param)


@pytest.fixture(params=devices(with_amx=True))
def device_with_amx(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    yield from _running_on(request.param)


def _running_on(place: str) -> Iterator[torch.device]:
    name, _, isa = place.partition("-")
    if isa:
        module = library.own()
        assert module is not None
        module.set_isa(int(isa))
        yield torch.device(name)
        module.set_isa(99)
    else:
        yield torch.device(name)


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest element wanted."""
    assert found.shape == wanted.shape
    if found.numel() == 0:
        return 0.0
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def check_against_float64(
    operation: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
    bound: float | None = None,
) -> None:
    """`inputs` are float64 on the CPU, rounded to `dtype` before either sees them. Both functions
    give a tensor or a tuple of them; random gradients flow back from each."""
    bound = bound or BOUND[dtype]
    rounded = [x.to(dtype) for x in inputs]
    exact = [x.double().requires_grad_() for x in rounded]
    # .detach() keeps strides: what was not contiguous stays so.
    given = [
        _like_layout(x, original).to(device).requires_grad_()
        for x, original in zip(rounded, inputs, strict=True)
    ]
    wanted, found = (
        x if isinstance(x, tuple) else (x,) for x in (reference(*exact), operation(*given))
    )
    generator = torch.Generator().manual_seed(1)
    grads = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in wanted
    ]
    torch.autograd.backward(wanted, [g.double() for g in grads])
    torch.autograd.backward(found, [g.to(device) for g in grads])
    for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert a.dtype == dtype
        assert error(a, b) <= bound, f"result {index}: {error(a, b):.1e}"
    for index, (x, y) in enumerate(zip(given, exact, strict=True)):
        assert x.grad is not None
        assert y.grad is not None
        assert error(x.grad, y.grad) <= bound, (
            f"gradient of input {index}: {error(x.grad, y.grad):.1e}"
        )


def _like_layout(x: Tensor, original: Tensor) -> Tensor:
    """`x` with the strides of `original`."""
    if original.is_contiguous():
        return x.detach()
    laid = torch.empty_strided(original.shape, original.stride(), dtype=x.dtype)
    return laid.copy_(x)
