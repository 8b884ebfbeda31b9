"""GPTQ against a plain statement, and schemes at the edges of their numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite.kernels.schemes import Scheme, make_scheme
from megalite.quantization.gptq import DAMPING, gptq
from megalite.quantization.matrices import relative_error


def plain_gptq(weight: Tensor, hessian: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Column after column by the inverse of what is left of H, as the method is derived (Optimal
    Brain Surgeon): no Cholesky factor, no blocks."""
    hessian, rest = hessian.clone(), weight.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1.0
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    numbers = scheme.encode(weight, scale)
    for place, column in enumerate(order.tolist()):
        left = order[place:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        here = slice(column, column + 1)
        numbers[:, here] = scheme.encode(rest[:, here].float(), scale[:, here])
        error = rest[:, here] - scheme.decode(numbers[:, here], scale[:, here])
        rest[:, left] -= error * inverse[0] / inverse[0, 0]
    return numbers


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "fp8", "fp8_block"])
@pytest.mark.parametrize("columns", [48, 192])
def test_it_is_the_plain_statement(name: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    scheme = make_scheme(name, 16)
    weight = torch.randn(32, columns, generator=generator)
    inputs = torch.randn(300, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    inputs[:, 5] = 0.0
    hessian = inputs.double().T @ inputs.double()
    scales = scheme.scales(weight, torch.float32)
    scale = scheme.spread(scales, tuple(weight.shape))
    found = scheme.decode(gptq(weight, hessian, scales, scheme), scale)
    wanted = scheme.decode(plain_gptq(weight, hessian, scale, scheme), scale)
    # A number that lies half way between two is rounded either way, and moves what comes after it.
    assert (found != wanted).float().mean() < 0.02
    errors = [relative_error(weight, x, hessian) for x in (found, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)
    assert errors[0] < 0.8 * relative_error(
        weight, scheme.decode(scheme.encode(weight, scale), scale), hessian
    )


@pytest.mark.parametrize("name", ["w8a8", "w4a16", "fp8", "fp8_block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_stay_within_half_a_step(name: str, dtype: torch.dtype) -> None:
    scheme = make_scheme(name, 16)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(4)).to(dtype)
    weight[3] = 0.0
    scales = scheme.scales(weight, dtype)
    assert torch.equal(scales.to(dtype).float(), scales), "what is stored is what was rounded with"
    scale = scheme.spread(scales, (32, 64))
    off = (scheme.decode(scheme.encode(weight, scale), scale) - weight.float()).abs() / scale
    # Integers: half a step, and at the largest number what a rounded scale leaves out of it. fp8: 3
    # bits of mantissa, so that a number is off by 1/16 of itself, or by half of the smallest one.
    bound = (
        0.55
        if "8a" in name or "4a" in name
        else (weight.float().abs() / scale / 16).clamp(min=2.0**-10) * 1.08
    )
    assert (off <= bound).all()
    assert torch.equal(scheme.decode(scheme.encode(weight, scale), scale)[3], torch.zeros(64))
