"""The products of a Newton-Schulz step, by megalite's kernel on each set of instructions, and in
torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exactness import BOUND, device, error, needs_kernels  # noqa: F401, device is a fixture
from megalite.config import KernelsConfig
from megalite.kernels import library
from megalite.kernels.newton_schulz import has_kernel, polynomial_product, symmetric_product

# Whole tiles of 6 rows and 64 columns, their ends, an odd depth; and a batch, as on a GPU.
SHAPES = [(1, 1), (5, 3), (64, 64), (71, 33), (130, 201), (256, 300), (2, 40, 50)]


def made(shape: tuple[int, ...], dtype: torch.dtype, where: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(where, dtype) / shape[-1] ** 0.5


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_a_step_against_float64(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernels: str,
    device: torch.device,  # noqa: F811
) -> None:
    x = made(shape, dtype, device)
    library.use(KernelsConfig(optimizer=kernels))
    try:
        gram, is_own = symmetric_product(x), has_kernel(x)
        polynomial = symmetric_product(gram, gram, alpha=0.25, beta=-0.5)
        moved = polynomial_product(gram, x, beta=-2.0)
    finally:
        library.use(KernelsConfig())
    wide, wide_gram = x.double(), gram.double()
    assert error(gram, wide @ wide.mT) <= BOUND[dtype]
    assert error(polynomial, 0.25 * wide_gram @ wide_gram - 0.5 * wide_gram) <= BOUND[dtype]
    assert error(moved, wide_gram @ wide - 2.0 * wide) <= BOUND[dtype]
    if is_own:  # of libraries nobody promises it
        assert torch.equal(gram, gram.mT)
        assert torch.equal(polynomial, polynomial.mT)


@needs_kernels
def test_no_number_of_threads_changes_a_bit() -> None:
    x, threads, found = (
        made((300, 400), torch.float32, torch.device("cpu")),
        torch.get_num_threads(),
        [],
    )
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        gram = symmetric_product(x)
        found.append((gram, polynomial_product(gram, x, beta=0.5)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_kernels
def test_a_wrong_shape_is_refused() -> None:
    ops, x, other = torch.ops.megalite, torch.zeros(4, 6), torch.zeros(4, 5)
    with pytest.raises(ValueError, match=r"symmetric_product: add has shape \[4, 5\].*\[4, 4\]"):
        ops.symmetric_product(x, other, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"polynomial_product: matrix has shape \[4, 5\]"):
        ops.polynomial_product(other, x, 1.0)
    with pytest.raises(TypeError, match="polynomial_product: matrix is BFloat16"):
        ops.polynomial_product(torch.zeros(4, 4, dtype=torch.bfloat16), x, 1.0)
    with pytest.raises(ValueError, match=r"symmetric_product: x has shape .*two dimensions"):
        ops.symmetric_product(torch.zeros(4), None, 1.0, 1.0)
