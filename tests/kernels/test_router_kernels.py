"""A router's logits and their gradients against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exactness import BOUND, DTYPES, device, error, needs_kernels  # noqa: F401
from megalite.config import KernelsConfig
from megalite.kernels import library
from megalite.kernels.experts import router_logits

CASES = [(1, 1, 2), (7, 70, 130), (300, 96, 61), (13, 64, 16), (0, 8, 4)]  # tokens, hidden, experts


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "size", "experts"), CASES)
def test_logits_and_gradients(
    tokens: int,
    size: int,
    experts: int,
    dtype: torch.dtype,
    kernels: str,
    device: torch.device,  # noqa: F811
) -> None:
    x, weight = (
        random(tokens, size, seed=0, dtype=dtype),
        random(experts, size, seed=1, dtype=dtype),
    )
    through, grad = (
        random(tokens, size, seed=2, dtype=dtype),
        random(tokens, experts, seed=3, dtype=torch.float32),
    )
    library.use(KernelsConfig(experts=kernels))
    try:
        mine, matrix = (y.clone().to(device).requires_grad_() for y in (x, weight))
        same, logits = router_logits(mine[:, None], matrix)
        assert torch.equal(same[:, 0], mine)
        assert logits.shape == (tokens, 1, experts)
        torch.autograd.backward(
            (same, logits), (through[:, None].to(device), grad[:, None].to(device))
        )
    finally:
        library.use(KernelsConfig())
    x, weight, grad = x.double(), weight.double(), grad.double()
    # The logits are fp32, whatever the dtype; gradients are rounded to it, and no sum before that.
    assert error(logits[:, 0], x @ weight.T) <= BOUND[torch.float32]
    assert mine.grad is not None
    assert matrix.grad is not None
    assert error(mine.grad, through.double() + grad @ weight) <= BOUND[dtype]
    assert error(matrix.grad, grad.T @ x) <= BOUND[dtype]


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tokens_logits_do_not_depend_on_others(dtype: torch.dtype, kernels: str) -> None:
    """Or it would visit other experts in a batch than in the answer to one request."""
    x, weight = random(300, 96, seed=0, dtype=dtype), random(61, 96, seed=1, dtype=dtype)
    library.use(KernelsConfig(experts=kernels))
    try:
        together = router_logits(x, weight)[1]
        for count in (1, 2, 15, 17):
            assert torch.equal(router_logits(x[:count], weight)[1], together[:count]), count
    finally:
        library.use(KernelsConfig())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    x, weight = random(700, 200, seed=0, dtype=dtype), random(16, 200, seed=1, dtype=dtype)
    grad, ops = random(700, 16, seed=3, dtype=torch.float32), torch.ops.megalite
    threads, found = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(
            (
                ops.router_logits(x, weight),
                ops.router_input_gradient(grad, weight, x),
                ops.router_weight_gradient(grad, x),
            )
        )
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_kernels
def test_bad_input_is_named() -> None:
    ops, x, weight, grad = torch.ops.megalite, *(torch.zeros(*s) for s in ((3, 8), (4, 8), (3, 4)))
    with pytest.raises(ValueError, match=r"router_logits: x has shape \[8\], but must have two"):
        ops.router_logits(x[0], weight)
    with pytest.raises(TypeError, match=r"router_logits: weight is .*BFloat16, but must be Float"):
        ops.router_logits(x, weight.bfloat16())
    with pytest.raises(
        ValueError, match=r"router_logits: weight has shape \[4, 7\], but must have \[4, 8\]"
    ):
        ops.router_logits(x, weight[:, 1:])
    with pytest.raises(
        ValueError,
        match=r"router_input_gradient: before has shape \[4, 8\], but must have \[3, 8\]",
    ):
        ops.router_input_gradient(grad, weight, weight)
    with pytest.raises(TypeError, match=r"router_weight_gradient: grad is .*, but must be float32"):
        ops.router_weight_gradient(grad.bfloat16(), x)
    with pytest.raises(
        ValueError, match=r"router_weight_gradient: grad has shape \[2, 4\], but must have \[3, 4\]"
    ):
        ops.router_weight_gradient(grad[1:], x)


@needs_kernels
def test_operators_are_well_formed() -> None:
    ops, check = torch.ops.megalite, torch.library.opcheck
    x, weight, grad = torch.randn(3, 8), torch.randn(4, 8), torch.randn(3, 4)
    check(ops.router_logits, (x, weight))
    check(ops.router_input_gradient, (grad, weight, x))
    check(ops.router_weight_gradient, (grad, x))
