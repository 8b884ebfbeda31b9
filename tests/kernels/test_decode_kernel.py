"""One new token's attention to a cache: megalite's kernel against the scores written out in
float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite.infer.cells import CacheKind, quantise
from megalite.kernels.library import own

pytestmark = pytest.mark.skipif(own() is None, reason="megalite's kernels are not built")
BATCH, CELLS, HEADS, GROUPS = 3, 150, 6, 2
FIRST, LAST = torch.tensor([0, 17, 4]), torch.tensor([149, 17, 130])
SCALE = 0.3


def inputs(dtype: torch.dtype, size: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values as a part of a larger cache; what no row attends to is not a number."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, size, generator=generator).to(dtype)
    cache = torch.randn(2, 5, GROUPS, CELLS + 10, size, generator=generator).to(dtype)
    keys, values = cache[:, 1:4, :, 7 : 7 + CELLS]
    for row in range(BATCH):
        for x in (keys, values):
            x[row, :, : FIRST[row]] = x[row, :, LAST[row] + 1 :] = torch.nan
    return q, keys, values


def wanted(q: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float) -> Tensor:
    rows = []
    for row in range(BATCH):
        cells = slice(int(FIRST[row]), int(LAST[row]) + 1)
        k, v = (
            x[row, :, cells].double().repeat_interleave(HEADS // GROUPS, dim=0)
            for x in (keys, values)
        )
        scores = torch.einsum("hk,hck->hc", q[row].double(), k) * scale
        scores = (scores / softcap).tanh() * softcap if softcap else scores
        rows.append(torch.einsum("hc,hck->hk", scores.softmax(-1), v))
    return torch.stack(rows)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
# fp32 sums of up to 150 terms; bf16 rounds the result to 8 bits.
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("size", [20, 32, 64, 128, 256])
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_against_float64(
    isa: int, size: int, dtype: torch.dtype, bound: float, softcap: float
) -> None:
    module = own()
    assert module is not None
    q, keys, values = inputs(dtype, size)
    module.set_isa(isa)
    try:
        found = torch.ops.megalite.decode_attention(q, keys, values, FIRST, LAST, SCALE, softcap)
        alone = torch.ops.megalite.decode_attention(
            q[1:2], keys[1:2], values[1:2], FIRST[1:2], LAST[1:2], SCALE, softcap
        )
    finally:
        module.set_isa(99)
    expected = wanted(q, keys, values, SCALE, softcap)
    assert found.dtype == dtype
    assert ((found.double() - expected).norm() / expected.norm()).item() <= bound
    assert torch.equal(found[1:2], alone), "what a row gets does not depend on other rows"


def test_impossible_cells_are_refused() -> None:
    q, keys, values = inputs(torch.float32)
    for first, last in ((FIRST, LAST + 1), (LAST + 1, LAST), (FIRST - 1, LAST)):
        with pytest.raises(ValueError, match="has cells"):
            torch.ops.megalite.decode_attention(q, keys, values, first, last, 1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [20, 32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("isa", [0, 1, 2])
def test_cells_of_8_bits_are_what_they_stand_for(
    isa: int, kind: CacheKind, size: int, dtype: torch.dtype
) -> None:
    module = own()
    assert module is not None
    q, keys, values = (x.nan_to_num() for x in inputs(dtype, size))
    keys[:, 1] *= 20  # scales differ between heads, and between keys and values
    found = [quantise(x, kind) for x in (keys, values)]
    # Every code is met: rows of zeros, and fp8's subnormals.
    found[1].numbers[0, 0, 100] = (
        torch.arange(size).remainder(127).to(torch.uint8).view(found[1].numbers.dtype)
    )
    module.set_isa(isa)
    try:
        out = torch.ops.megalite.decode_quantised(
            q, found[0].numbers, found[1].numbers, found[0].scales, found[1].scales, FIRST, LAST, SCALE, 1.5
        )  # fmt: skip
    finally:
        module.set_isa(99)
    whole = [x.numbers.double() * x.scales.double()[..., None] for x in found]
    expected = wanted(q, *whole, SCALE, 1.5)
    # As above: fp32 sums, and bf16's rounding of the result.
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    assert ((out.double() - expected).norm() / expected.norm()).item() <= bound


def test_scales_that_lie_elsewhere_are_refused() -> None:
    q, keys, values = inputs(torch.float32)
    (k, of_k), (v, of_v) = (quantise(x.nan_to_num(), "int8") for x in (keys, values))
    rest = FIRST, LAST, 1.0, 0.0
    with pytest.raises(ValueError, match="value_scales has shape"):
        torch.ops.megalite.decode_quantised(q, k, v, of_k, of_v[..., :-1], *rest)
    apart = of_k.new_empty(*of_k.shape[:2], CELLS * 2)[..., ::2]
    with pytest.raises(ValueError, match="key_scales must lie as the cells do"):
        torch.ops.megalite.decode_quantised(q, k, v, apart, of_v, *rest)
    with pytest.raises(TypeError, match="must be int8 or float8_e4m3fn"):
        torch.ops.megalite.decode_quantised(q, keys, values, of_k, of_v, *rest)
