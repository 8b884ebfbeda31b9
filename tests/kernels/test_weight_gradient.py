from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from exactness import BOUND, DTYPES, device, error, needs_kernels  # noqa: F401, device is a fixture
from megalite.kernels.weight_gradient import accumulate_weight_gradient

# (tokens, rows, columns): less than a tile, tiles and one more, blocks of several parts, nothing at all.
SHAPES = [(1, 1, 1), (3, 5, 7), (64, 96, 64), (65, 97, 65), (130, 200, 33), (4097, 13, 20), (0, 4, 5), (6, 0, 5)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "dtype", "add"), product(SHAPES, DTYPES, [True, False]))
def test_product(shape: tuple[int, int, int], dtype: torch.dtype, add: bool, device: torch.device) -> None:  # noqa: F811
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
    grad, x = random(100, 80).bfloat16().to(device)[:, 8:72], random(100, 60, seed=1).bfloat16().to(device)[:, ::2]
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
    with pytest.raises(ValueError, match=r"weight_gradient_: into has shape \[5, 4\], but must have \[4, 5\]"):
        operator(into.t().contiguous(), grad, x, True)
    with pytest.raises(ValueError, match=r"weight_gradient_: grad has shape \[2, 4\], but must have \[3, 4\]"):
        operator(into, grad[:2], x, True)
    with pytest.raises(TypeError, match=r"weight_gradient_: into is .*BFloat16, but must be float32"):
        operator(into.bfloat16(), grad, x, True)
    with pytest.raises(TypeError, match=r"weight_gradient_: grad is .*BFloat16, but must be .*Float"):
        operator(into, grad.bfloat16(), x, True)
    with pytest.raises(ValueError, match=r"weight_gradient_: x has shape \[3\], but must have two dimensions"):
        operator(into, grad, x[:, 0], True)
