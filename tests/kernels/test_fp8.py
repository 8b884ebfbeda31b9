"""Rounding to fp8 against a statement of the formats in integers and fractions, that shares no line
and no table with the code."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from exactness import BUILT, device, needs_kernels  # noqa: F401
from megalite.kernels import fp8
from megalite.kernels.experts import group_by_expert, grouped_linear
from megalite.kernels.fp8 import E4M3, E5M2, quantise, round_to_fp8, spread
from megalite.kernels.linear import WeightGradStore
from megalite.kernels.recipes import RECIPES

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


Case = tuple[Tensor, tuple[int, int], str]


def around_every_code(format: str) -> Iterator[Case]:
    """All codes, the middle between two and its neighbours on both sides. With the largest number
    beside them the scale is 1."""
    _, mantissa, bias, last = FORMATS[format]
    numbers = [value_of(code, mantissa, bias) for code in range(last + 1)]
    middle = torch.tensor([float((a + b) / 2) for a, b in itertools.pairwise(numbers)])
    up, down = (torch.nextafter(middle, torch.tensor(end)) for end in (math.inf, 0.0))
    found = torch.cat([torch.tensor([float(x) for x in numbers]), middle, up, down])
    yield torch.cat([found, -found])[None], (1, 2 * len(found)), format
    yield torch.cat([found, -found])[:, None], (2 * len(found), 1), format


def of_any_range(format: str) -> Iterator[Case]:
    """All of fp32's exponents, its subnormals and zeros of both signs among them; blocks at the ends
    are smaller."""
    numbers = random.Random(format)

    def exponent(row: int) -> int:
        anywhere = numbers.random() < 0.2
        return (
            numbers.randint(-148, 127)
            if anywhere
            else numbers.randint(24, 36) + 30 * (row // 4 - 2)
        )

    rows = [
        [math.ldexp(numbers.uniform(-1, 1), exponent(row)) for _ in range(39)] for row in range(10)
    ]
    rows[3][2], rows[4][7], rows[9] = 0.0, -0.0, [math.ldexp(1.0, i - 149) for i in range(39)]
    for block in ((1, 8), (8, 1), (4, 4), (5, 40)):
        yield torch.tensor(rows), block, format
        yield torch.tensor(rows).bfloat16(), block, format


def around_the_largest(format: str) -> Iterator[Case]:
    """The largest number of a block decides its scale to the last bit."""
    largest = torch.tensor(448.0 if format == "e4m3" else 57344.0)
    around = [largest, *(torch.nextafter(largest, torch.tensor(end)) for end in (0.0, math.inf))]
    powers = 2.0 ** torch.tensor([-119, -9, 0, 7, 110])
    yield torch.stack(around)[:, None] * powers, (1, 1), format
    yield torch.full((3, 2), torch.finfo(torch.float32).max), (2, 2), format


def not_finite(format: str) -> Iterator[Case]:
    for bad, dtype in itertools.product(
        (math.inf, -math.inf, math.nan), (torch.float32, torch.bfloat16)
    ):
        x = torch.ones(6, 16, dtype=dtype)
        x[2, 5] = bad
        for block in ((2, 8), (1, 16), (6, 1)):
            yield x, block, format


CASES = (around_every_code, of_any_range, around_the_largest, not_finite)


@cache
def cases(make: Callable[[str], Iterator[Case]], format: str) -> list[tuple[Case, Tensor, Tensor]]:
    """Cases with their codes, int, and scales."""
    found = [(case, *stated(case[0].double().tolist(), *case[1:])) for case in make(format)]
    return [(case, torch.tensor(codes), torch.tensor(scales)) for case, codes, scales in found]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", CASES)
def test_codes_and_scales_are_those_of_the_definition(
    make: Callable[[str], Iterator[Case]],
    format: str,
    device: torch.device,  # noqa: F811
) -> None:
    """Of the reference and of each kernel, which also writes them transposed, and what they stand
    for in the dtype of the matrix."""
    is_e5m2 = format == "e5m2"
    for (x, block, _), codes, scales in cases(make, format):
        rounded = quantise(x, block, FORMATS[format][0])
        found = [(rounded.codes, rounded.scales)]
        dense = [rounded.dequantise(x.dtype)]
        if BUILT:
            ours = torch.ops.megalite
            found.append(ours.fp8_quantise(x.to(device), *block, is_e5m2, False))
            turned = ours.fp8_quantise(x.to(device), *block, is_e5m2, True)
            found.append((turned[0].t(), turned[1].t()))
            dense.append(ours.fp8_round(x.to(device), *block, is_e5m2))
        for its_codes, its_scales in found:
            raw = its_codes.cpu().contiguous().view(torch.uint8).int()
            is_nan = its_codes.cpu().float().isnan()
            assert torch.equal(raw.masked_fill(is_nan, 0x7F), codes.int())
            torch.testing.assert_close(its_scales.cpu(), scales, rtol=0, atol=0, equal_nan=True)
        values = found[0][0].double() * spread(scales.double(), block, x.shape)
        for each in dense:
            assert each.dtype == x.dtype
            # The least numbers of all are subnormal in bf16, too.
            torch.testing.assert_close(
                each.cpu().double(), values.to(x.dtype).double(), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_what_is_not_finite_are_not(bad: float, dtype: torch.dtype) -> None:
    """A cast alone makes 448 of an infinity, which the guard of bad numbers would not see."""
    x, weight = torch.ones(6, 16, dtype=dtype), torch.ones(16, 16, dtype=dtype)
    x[2, 5] = bad
    # Of NVFP4 a whole matrix is NaN (tests/kernels/test_nvfp4.py).
    for recipe in (recipe for name, recipe in RECIPES.items() if name != "nvfp4"):
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


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "nvfp4"])
def test_blocks_lie_along_the_sum_of_each_product(name: str) -> None:
    """The products of a linear module by matrices that are rounded block by block, in loops."""
    recipe, generator = RECIPES[name], torch.Generator().manual_seed(2)
    size = 2 * 128
    block, rows, weight_rows = {
        "blockwise": (128, 1, 128), "mxfp8": (32, 1, 1), "rowwise": (size, 1, 1), "current": (size, size, size),
    }[name]  # fmt: skip
    x, grad, weight = (
        torch.randn(size, size, generator=generator)
        * 4.0 ** torch.randint(-6, 6, (size, 1), generator=generator)
        for _ in range(3)
    )

    def by_hand(matrix: Tensor, rows: int, gradient: bool = False) -> Tensor:
        """Rounded with blocks along the second dimension."""
        out = torch.empty_like(matrix)
        is_e5m2 = gradient and name == "current"
        kind, top = (torch.float8_e5m2, 57344) if is_e5m2 else (torch.float8_e4m3fn, 448)
        for i in range(0, size, rows):
            for j in range(0, size, block):
                part = matrix[i : i + rows, j : j + block]
                scale = 2.0 ** math.ceil(math.log2(part.abs().max().item() / top))
                out[i : i + rows, j : j + block] = (part / scale).to(kind).float() * scale
        return out

    def same(found: Tensor, a: Tensor, b: Tensor) -> None:
        atol = 1e-5 * float((a.abs() @ b.abs()).max())
        torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=atol)

    same(recipe.product(x, weight), by_hand(x, rows), by_hand(weight, weight_rows).t())
    same(
        recipe.input_gradient(grad, weight),
        by_hand(grad, rows, True),
        by_hand(weight.t(), weight_rows).t(),
    )
    rounded_grad, rounded_x = recipe.wgrad_operands(grad, x)
    assert torch.equal(rounded_grad, by_hand(grad.t(), rows, True).t())
    assert torch.equal(rounded_x, by_hand(x.t(), rows).t())


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_experts_products_are_those_of_each(gather: bool, deferred: bool) -> None:
    """A product and the input's gradient take rounded operands, the weight's gradient those that
    were given, also where it is put off."""
    generator, recipe = torch.Generator().manual_seed(4), RECIPES["blockwise"]
    weight = torch.randn(3, 128, 256, generator=generator, requires_grad=True)
    index = torch.tensor([[0, 2], [0, 1], [0, 2], [0, 2], [0, 2]])
    groups = group_by_expert(index, 3)
    tokens = torch.randn(len(index), 256, generator=generator)
    x = (tokens if gather else tokens[groups.token_N]).requires_grad_()
    rows, grad = tokens[groups.token_N], torch.randn(10, 128, generator=generator)
    store, found = WeightGradStore() if deferred else None, []
    callback = None if not deferred else lambda *operands: found.append(operands)
    out = grouped_linear(x, weight, groups, gather, callback, store, recipe)
    out.backward(grad)
    if store:
        store.take()()
        ((_, given, its_rows, _),) = found
        assert torch.equal(given, grad)
        assert torch.equal(its_rows, rows)
    wanted, grad_rows = torch.empty(10, 128), torch.empty(10, 256)
    stops = [0, *itertools.accumulate(groups.counts.on_host)]
    for expert, (start, stop) in enumerate(itertools.pairwise(stops)):
        matrix, part = weight.detach()[expert], slice(start, stop)
        wanted[part] = recipe.product(rows[part], matrix)
        grad_rows[part] = recipe.input_gradient(grad[part], matrix)
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad[expert], grad[part].t() @ rows[part])
    torch.testing.assert_close(out.detach(), wanted)
    wanted_x = torch.zeros(5, 256).index_add_(0, groups.token_N, grad_rows) if gather else grad_rows
    assert x.grad is not None
    torch.testing.assert_close(x.grad, wanted_x)
    assert (weight.grad is None) == deferred


@needs_kernels
def test_bad_input_is_named() -> None:
    quantise = torch.ops.megalite.fp8_quantise
    with pytest.raises(
        ValueError, match=r"fp8_quantise: x has shape \[4\], but must have two dimensions"
    ):
        quantise(torch.zeros(4), 1, 4, False, False)
    with pytest.raises(
        ValueError, match=r"fp8_quantise: blocks of 0 x 4 numbers, which must be positive"
    ):
        quantise(torch.zeros(4, 4), 0, 4, False, False)
    with pytest.raises(TypeError, match=r"fp8_round: x is Half, but must be float32 or bfloat16"):
        torch.ops.megalite.fp8_round(torch.zeros(4, 4, dtype=torch.float16), 1, 4, False)


@needs_kernels
def test_any_number_of_threads_gives_the_same() -> None:
    x = torch.randn(700, 300, generator=torch.Generator().manual_seed(3))
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append([round_to_fp8(x, block) for block in ((1, 128), (128, 1), (128, 128))])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_gpu_does_not_get_a_whole_matrix_as_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of threads would round all of it."""

    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(fp8, "pick", lambda operation, x: "megalite")
    on_gpu: Any = OnGpu()
    assert fp8._in_one_pass(on_gpu, (128, 128), None)
    assert fp8._in_one_pass(on_gpu, (1, 8192), None)
    assert not fp8._in_one_pass(on_gpu, (4096, 4096), None)
    assert fp8._in_one_pass(torch.ones(2, 2), (4096, 4096), None)
    assert not fp8._in_one_pass(torch.ones(2, 2), (1, 128), lambda x: x)
