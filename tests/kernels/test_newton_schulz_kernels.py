"""The products of a Newton-Schulz step, by megalite's kernel on each set of instructions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exactness import BOUND, error, needs_kernels
from exactness import device_with_amx as device  # noqa: F401, a fixture: the set of instructions

# Whole tiles of 6 rows and 64 columns, their ends, an odd depth; what fits AMX.
SHAPES = [(1, 1), (5, 3), (64, 64), (71, 33), (130, 201), (160, 96), (256, 300)]
OPS = torch.ops.megalite


def made(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype) / shape[-1] ** 0.5


@needs_kernels
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_a_step_against_float64(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    x = made(shape, dtype)
    gram = OPS.symmetric_product(x, None, 1.0, 0.0)
    polynomial = OPS.symmetric_product(gram, gram, 0.25, -0.5)
    moved = OPS.polynomial_product(gram, x, -2.0)
    wide, wide_gram = x.double(), gram.double()
    assert error(gram, wide @ wide.mT) <= BOUND[dtype]
    assert error(polynomial, 0.25 * wide_gram @ wide_gram - 0.5 * wide_gram) <= BOUND[dtype]
    assert error(moved, wide_gram @ wide - 2.0 * wide) <= BOUND[dtype]
    assert torch.equal(gram, gram.mT)
    assert torch.equal(polynomial, polynomial.mT)


@needs_kernels
def test_no_number_of_threads_changes_a_bit() -> None:
    x, threads, found = (
        made((300, 400), torch.float32),
        torch.get_num_threads(),
        [],
    )
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        gram = OPS.symmetric_product(x, None, 1.0, 0.0)
        found.append((gram, OPS.polynomial_product(gram, x, 0.5)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_kernels
def test_a_wrong_shape_is_refused() -> None:
    x, other = torch.zeros(4, 6), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"symmetric_product: add has shape \[4, 5\].*\[4, 4\]"):
        OPS.symmetric_product(x, other, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"polynomial_product: matrix has shape \[4, 5\]"):
        OPS.polynomial_product(other, x, 1.0)
    with pytest.raises(TypeError, match="polynomial_product: matrix is BFloat16"):
        OPS.polynomial_product(torch.zeros(4, 4, dtype=torch.bfloat16), x, 1.0)
    with pytest.raises(ValueError, match=r"symmetric_product: x has shape .*two dimensions"):
        OPS.symmetric_product(torch.zeros(4), None, 1.0, 1.0)
