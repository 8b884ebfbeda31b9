"""One new token's attention to a cache: megalite's kernel against the scores written out in
float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
        module.set_isa(2)
    expected = wanted(q, keys, values, SCALE, softcap)
    assert found.dtype == dtype
    assert ((found.double() - expected).norm() / expected.norm()).item() <= bound
    assert torch.equal(found[1:2], alone), "what a row gets does not depend on other rows"


def test_impossible_cells_are_refused() -> None:
    q, keys, values = inputs(torch.float32)
    for first, last in ((FIRST, LAST + 1), (LAST + 1, LAST), (FIRST - 1, LAST)):
        with pytest.raises(ValueError, match="has cells"):
            torch.ops.megalite.decode_attention(q, keys, values, first, last, 1.0, 0.0)
