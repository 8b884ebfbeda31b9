from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from exactness import BOUND, DTYPES, check_against_float64, error, needs_kernels
from exactness import device_with_amx as device  # noqa: F401, a fixture
from megalite.kernels.linear import (
    ALONE,
    NoCollectives,
    Result,
    WeightGradStore,
    accumulate_weight_gradient,
    linear,
)

# (tokens, rows, columns): less than a tile, tiles and one more, blocks of several parts, nothing at
# all.
SHAPES = [
    (1, 1, 1),
    (3, 5, 7),
    (64, 96, 64),
    (65, 97, 65),
    (130, 200, 33),
    (4097, 13, 20),
    (0, 4, 5),
    (6, 0, 5),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "dtype", "add"), product(SHAPES, DTYPES, [True, False]))
def test_product(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    add: bool,
    device: torch.device,  # noqa: F811
) -> None:
    tokens, rows, columns = shape
    grad, x = random(tokens, rows).to(dtype), random(tokens, columns, seed=1).to(dtype)
    into = random(rows, columns, seed=2) if add else torch.full((rows, columns), torch.nan)
    wanted = grad.double().t() @ x.double() + (into.double() if add else 0)
    into = into.to(device)
    accumulate_weight_gradient(into, grad.to(device), x.to(device), add)
    # bf16 factors, but fp32 sums of exact products.
    assert error(into, wanted) <= BOUND[torch.float32]


@needs_kernels
def test_slices_of_wider_tensors_and_any_number_of_threads(device: torch.device) -> None:  # noqa: F811
    grad, x = (
        random(100, 80).bfloat16().to(device)[:, 8:72],
        random(100, 60, seed=1).bfloat16().to(device)[:, ::2],
    )
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        results.append(torch.zeros(64, 30, device=device))
        accumulate_weight_gradient(results[-1], grad, x, add=True)
    torch.set_num_threads(threads)
    assert error(results[0], grad.double().t() @ x.double()) <= BOUND[torch.float32]
    assert all(torch.equal(result, results[0]) for result in results)


@needs_kernels
def test_bad_input_is_named() -> None:
    operator = torch.ops.megalite.weight_gradient_
    into, grad, x = torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 5)
    with pytest.raises(
        ValueError, match=r"weight_gradient_: into has shape \[5, 4\], but must have \[4, 5\]"
    ):
        operator(into.t().contiguous(), grad, x, True)
    with pytest.raises(
        ValueError, match=r"weight_gradient_: grad has shape \[2, 4\], but must have \[3, 4\]"
    ):
        operator(into, grad[:2], x, True)
    with pytest.raises(
        TypeError, match=r"weight_gradient_: into is .*BFloat16, but must be float32"
    ):
        operator(into.bfloat16(), grad, x, True)
    with pytest.raises(
        TypeError, match=r"weight_gradient_: grad is .*BFloat16, but must be .*Float"
    ):
        operator(into, grad.bfloat16(), x, True)
    with pytest.raises(
        ValueError, match=r"weight_gradient_: x has shape \[3\], but must have two dimensions"
    ):
        operator(into, grad, x[:, 0], True)


class TwoRanks(NoCollectives):
    """Stands for a rank whose neighbour holds a copy of its input, and has as much to add to the
    gradient."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start_gather(self, x: Tensor) -> Result:
        self.calls.append("start gather")
        return lambda: self.calls.append("gathered") or torch.cat((x, x), 1)  # type: ignore[func-returns-value]

    def start_reduce(self, grad_x: Tensor) -> Result:
        self.calls.append("start reduce")
        return lambda: self.calls.append("reduced") or sum(grad_x.chunk(2, 1))  # type: ignore[func-returns-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("two", [False, True])
def test_linear(two: bool, bias: bool, dtype: torch.dtype, device: torch.device) -> None:  # noqa: F811
    """In place, as RoPE rotates; the memory of the result must be its own."""

    def plain(x: Tensor, weight: Tensor, *biases: Tensor) -> Tensor:
        x = torch.cat((x, x), 1) if two else x
        return torch.tanh(sum(biases, x @ weight.t()))

    def ours(*inputs: Tensor) -> Tensor:
        return linear(*inputs, *([] if bias else [None]), TwoRanks() if two else ALONE).tanh_()  # type: ignore[arg-type]

    inputs = [
        random(2, 7, 5).double(),
        random(6, 5, seed=1).double() / 4,
        *[random(6, seed=2).double()][:bias],
    ]
    check_against_float64(ours, plain, inputs, dtype, device)


@pytest.mark.parametrize("deferred", [False, True])
def test_who_computes_the_weight_gradient(deferred: bool) -> None:
    """The callback gets the operands of the GEMM, at once or when the store is emptied, and
    autograd gives the weight nothing. The input's gradient travels beside the GEMM, and does not
    wait for one that is put off."""
    x, weight = random(1, 3, 5).requires_grad_(), random(4, 5, seed=1).requires_grad_()
    ranks, store, gathered = TwoRanks(), WeightGradStore(), ["start gather", "gathered"]
    found: list[Tensor] = []

    def callback(parameter: Tensor, grad: Tensor, rows: Tensor, last: bool) -> None:
        assert parameter is weight
        assert last
        ranks.calls.append("GEMM")
        found.append(grad.t() @ rows)

    linear(x, weight, None, ranks, callback, store if deferred else None).sum().backward()
    if deferred:
        assert ranks.calls == [*gathered, "start reduce", "reduced"]
        assert not found
        store.take()()
        assert ranks.calls[4:] == [*gathered, "GEMM"]
        store.take()()
    else:
        beside = ["start gather", "start reduce", "gathered", "GEMM", "reduced"]
        assert ranks.calls == [*gathered, *beside]
    assert weight.grad is None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * weight.sum(0).expand_as(x))
    assert len(found) == 1
    torch.testing.assert_close(found[0], 2 * x.detach().sum((0, 1)).expand(4, -1))


def test_a_frozen_weight_keeps_no_input_and_has_no_gradient() -> None:
    x, weight = random(2, 3).requires_grad_(), random(4, 3, seed=1)
    out = linear(x, weight)
    assert out.grad_fn is not None
    assert [saved is None for saved in out.grad_fn.saved_tensors] == [True, False]
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))
