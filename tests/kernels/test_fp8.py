"""Rounding to fp8 against a statement of the formats in integers and fractions, that shares no line
and no table with the code."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from megalite.kernels.fp8 import E4M3, E5M2, RECIPES, quantise, round_to_fp8

FORMATS = {"e4m3": (E4M3, 3, 7, 0x7E), "e5m2": (E5M2, 2, 15, 0x7B)}
"""Of each the bits of its mantissa, the bias of its exponent, and the code of its largest number."""


def value_of(code: int, mantissa: int, bias: int) -> Fraction:
    """What the code of a positive number stands for."""
    exponent, low = code >> mantissa, code & ((1 << mantissa) - 1)
    if exponent == 0:
        return Fraction(low, 1 << mantissa) * Fraction(2) ** (1 - bias)
    return (1 + Fraction(low, 1 << mantissa)) * Fraction(2) ** (exponent - bias)


def stated(
    rows: list[list[float]], block: tuple[int, int], format: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and scales of a matrix, by definition: the least power of two, from 2^-126 on, that
    brings the block's largest number within the format; then the nearest number, even codes where
    two are as near."""
    _, mantissa, bias, last = FORMATS[format]
    numbers = [value_of(code, mantissa, bias) for code in range(last + 1)]
    codes = [[0] * len(row) for row in rows]
    scales = []
    for top in range(0, len(rows), block[0]):
        scales.append([])
        for left in range(0, len(rows[0]), block[1]):
            places = [
                (i, j)
                for i in range(top, min(top + block[0], len(rows)))
                for j in range(left, min(left + block[1], len(rows[0])))
            ]
            if not all(math.isfinite(rows[i][j]) for i, j in places):
                scales[-1].append(math.nan)
                for i, j in places:
                    codes[i][j] = 0x7F
                continue
            largest = max(abs(Fraction(rows[i][j])) for i, j in places)
            exponent = -126
            while largest > numbers[-1] * Fraction(2) ** exponent:
                exponent += 1
            scales[-1].append(2.0**exponent)
            for i, j in places:
                wanted = abs(Fraction(rows[i][j])) / Fraction(2) ** exponent
                code = min(range(last + 1), key=lambda c: (abs(numbers[c] - wanted), c & 1))
                codes[i][j] = code | (0x80 if math.copysign(1.0, rows[i][j]) < 0 else 0)
    return codes, scales


def compare(x: Tensor, block: tuple[int, int], format: str) -> None:
    found = quantise(x, block, FORMATS[format][0])
    codes, scales = stated(x.double().tolist(), block, format)
    is_nan = torch.isnan(found.codes.float())
    assert torch.equal(is_nan, torch.tensor(codes) == 0x7F)
    raw = found.codes.view(torch.uint8).int().masked_fill(is_nan, 0x7F)
    assert raw.tolist() == codes
    torch.testing.assert_close(found.scales, torch.tensor(scales), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_halfway_points_and_their_neighbours(format: str) -> None:
    """All codes come back, and what lies between two goes to the nearer; a number of the largest
    magnitude beside them keeps the scale at 1."""
    kind, mantissa, bias, last = FORMATS[format]
    numbers = [value_of(code, mantissa, bias) for code in range(last + 1)]
    ties = [float((a + b) / 2) for a, b in itertools.pairwise(numbers)]
    up, down = torch.tensor(math.inf), torch.tensor(0.0)
    middle = torch.tensor(ties)
    found = torch.cat(
        [
            torch.tensor([float(x) for x in numbers]),
            middle,
            torch.nextafter(middle, up),
            torch.nextafter(middle, down),
        ]
    )
    x = torch.cat([found, -found])[None]
    compare(x, (1, x.shape[1]), format)
    rounded = quantise(torch.tensor([float(x) for x in numbers])[None], (1, len(numbers)), kind)
    assert rounded.codes.view(torch.uint8)[0].tolist() == list(range(last + 1))
    assert rounded.scales.item() == 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", [(1, 8), (8, 1), (4, 4), (5, 24)])
def test_blocks_of_any_range(block: tuple[int, int], format: str) -> None:
    """Over all of fp32's exponents, its subnormals and zeros of both signs among them; blocks at
    the ends are smaller."""
    numbers = random.Random(repr((block, format)))
    rows = [
        [
            math.ldexp(
                numbers.uniform(-1, 1),
                numbers.randint(-148, 127)
                if numbers.random() < 0.2
                else numbers.randint(-6, 6) + 30 * (i // 4 - 1),
            )
            for _ in range(19)
        ]
        for i in range(10)
    ]
    rows[3][2], rows[4][7], rows[9] = 0.0, -0.0, [math.ldexp(1.0, -149 + i) for i in range(19)]
    compare(torch.tensor(rows), block, format)
    compare(torch.tensor(rows).bfloat16(), block, format)


def test_the_largest_number_of_a_block_decides_its_scale_to_the_bit() -> None:
    edge = torch.tensor(448.0)
    for power in (-120, -9, 0, 7, 119):
        for largest in (
            torch.nextafter(edge, torch.tensor(0.0)),
            edge,
            torch.nextafter(edge, torch.tensor(math.inf)),
        ):
            compare((largest * 2.0**power)[None, None], (1, 1), "e4m3")
    assert quantise(torch.tensor([[3.4028234663852886e38]]), (1, 1)).scales.item() == 2.0**120


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(bad: float, dtype: torch.dtype) -> None:
    """A cast alone makes 448 of an infinity, which the guard of bad numbers would not see."""
    x = torch.ones(6, 16, dtype=dtype)
    x[2, 5] = bad
    compare(x, (2, 8), "e4m3")
    rounded = round_to_fp8(x, (2, 8))
    assert rounded.dtype == dtype
    assert rounded[2:4, :8].isnan().all()
    assert rounded.isfinite().sum() == x.numel() - 16
    for recipe in RECIPES.values():
        weight = torch.ones(16, 16, dtype=dtype)
        assert recipe.product(x, weight)[2].isnan().all()
        assert recipe.input_gradient(x, weight)[2].isnan().all()
        grad, rows = recipe.wgrad_operands(x, x)
        assert (grad.t() @ rows)[5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_numbers_are_exact_in_the_dtype_of_products(dtype: torch.dtype) -> None:
    x = (
        torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
        * 10.0 ** torch.arange(-32, 32)[:, None]
    )
    x = x.to(dtype)
    rounded = quantise(x, (1, 128))
    exact = rounded.codes.double().view(64, 2, 128) * rounded.scales.double()[..., None]
    found = round_to_fp8(x, (1, 128))
    assert found.dtype == dtype
    assert torch.equal(found.double(), exact.flatten(1))
    assert torch.equal(round_to_fp8(found, (1, 128)), found)


@pytest.mark.parametrize("name", RECIPES)
def test_blocks_lie_along_the_sum_of_each_product(name: str) -> None:
    """The products of a linear module by matrices that are rounded block by block, in loops."""
    recipe, generator = RECIPES[name], torch.Generator().manual_seed(2)
    block, square = {"blockwise": (128, 128), "mxfp8": (32, 1)}[name]
    size = 2 * block
    x, grad, weight = (
        torch.randn(size, size, generator=generator)
        * 4.0 ** torch.randint(-6, 6, (size, 1), generator=generator)
        for _ in range(3)
    )

    def by_hand(matrix: Tensor, rows: int) -> Tensor:
        """Rounded with blocks along the second dimension."""
        out = torch.empty_like(matrix)
        for i in range(0, size, rows):
            for j in range(0, size, block):
                part = matrix[i : i + rows, j : j + block]
                scale = 2.0 ** math.ceil(math.log2(part.abs().max().item() / 448))
                out[i : i + rows, j : j + block] = (part / scale).to(
                    torch.float8_e4m3fn
                ).float() * scale
        return out

    def same(found: Tensor, a: Tensor, b: Tensor) -> None:
        torch.testing.assert_close(
            found.double(),
            a.double() @ b.double(),
            rtol=1e-5,
            atol=1e-5 * float((a.abs() @ b.abs()).max()),
        )

    same(recipe.product(x, weight), by_hand(x, 1), by_hand(weight, square).t())
    same(recipe.input_gradient(grad, weight), by_hand(grad, 1), by_hand(weight.t(), square).t())
    rounded_grad, rounded_x = recipe.wgrad_operands(grad, x)
    assert torch.equal(rounded_grad, by_hand(grad.t(), 1).t())
    assert torch.equal(rounded_x, by_hand(x.t(), 1).t())
