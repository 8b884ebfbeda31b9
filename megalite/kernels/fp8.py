"""Products in fp8: their operands are rounded to 8 bits, with a scale for each block.

Scales are powers of two. So a scale costs no precision, the number that a code stands for has four
bits (three in e5m2) and is exact in bf16 and fp32, and a product of rounded operands computed in
these is the product of the codes, with its sums in fp32. That is what is computed here wherever no
chip takes the codes themselves.

    recipe      activations, gradients    weights           formats
    blockwise   1 × 128                   128 × 128         e4m3 (DeepSeek-V3, section 3.3)
    mxfp8       1 × 32                    1 × 32            e4m3 (OCP microscaling, e8m0 scales)
    rowwise     one row                   one row           e4m3 (torchao)
    current     the whole matrix          the whole matrix  e4m3, gradients e5m2 (TransformerEngine)

A row is along the sum of the product at hand, as 1 × 128 is: along features for x · Wᵀ and grad · W,
along tokens for gradᵀ · x, so that each operand of the last is rounded once more.

Letters in shapes: T tokens, K input features, N output features; R, C rows and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.library import own, pick
from megalite.kernels.scaled_product import scaled_product, takes


class Format(NamedTuple):
    """A format of 8 bits."""

    dtype: torch.dtype
    exponent: int
    """Of its largest number, which is 1.75 · 2^exponent in both formats."""


E4M3 = Format(torch.float8_e4m3fn, 8)
E5M2 = Format(torch.float8_e5m2, 15)
LOWEST = -126
"""Least exponent of a scale: its inverse is a normal number of fp32, and so is the scale."""
INFINITY = 0x7F800000
"""Bits of fp32's infinity. Without the sign, those of a NaN are larger, all others smaller."""
MANTISSA = 0x7FFFFF
WITHOUT_SIGN = 0x7FFFFFFF

Name = Literal["current", "rowwise", "blockwise", "mxfp8", "nvfp4"]
Block = tuple[int, int]
"""Rows and columns that share a scale."""

Agree = Callable[[Tensor], Tensor]
"""Returns the largest over the ranks that hold parts of the same blocks, of integers on each."""


class Rounded(NamedTuple):
    """A matrix in fp8."""

    codes: Tensor
    """[R,C] in a dtype of 8 bits."""
    scales: Tensor
    """What a code of 1 stands for in each block, fp32 [R/r,C/c], rounded up."""
    block: Block
    recipe: Name = "blockwise"
    """Which it was made by."""

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the numbers that it stands for, [R,C]."""
        return spread(self.scales, self.block, self.codes.shape).mul_(self.codes.float()).to(dtype)


class CodedWeight(nn.Parameter):
    """The weight of a linear module, or of a stack of them, of which a rank has no more than codes
    and the scales of squares. As a tensor it is NaN everywhere: only products in fp8 read it."""

    rounded: Rounded

    def __new__(cls, rounded: Rounded, shape: torch.Size, dtype: torch.dtype) -> Self:
        """Make the weight of this `shape`, whose rows are those of `rounded`, for products in
        `dtype`."""
        # One number stands for all: no memory.
        nothing = torch.full((), torch.nan, dtype=dtype, device=rounded.codes.device)
        self = super().__new__(cls, nothing.expand(shape))
        self.rounded = rounded
        return self

    def dequantise(self) -> Tensor:
        """Return what it stands for, in the dtype and shape of the weight."""
        codes, scales, (rows, columns), _ = self.rounded
        blocks = codes.to(self.dtype).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        return blocks.mul_(scales.to(self.dtype)[:, None, :, None]).view(self.shape)


def spread(scales: Tensor, block: Block, shape: torch.Size) -> Tensor:
    """Return the scale of each element of a matrix of this `shape`, as a tensor of its own."""
    rows, columns = shape
    wide = scales.repeat_interleave(block[0], 0)[:rows]
    return wide.repeat_interleave(block[1], 1)[:, :columns]


def scale_exponents(largest: Tensor, format: Format) -> Tensor:
    """Return the exponents of the least powers of two by which blocks fit into `format`, int32, but
    at least LOWEST. `largest` has the bits of each block's largest absolute value in fp32, int32;
    what is not finite has the exponent 128."""
    exponent = (largest >> 23) - 127
    # 1.75 · 2^e is the format's largest: one bit more of mantissa needs the next power.
    exponent = exponent - format.exponent + ((largest & MANTISSA) > 0x600000).int()
    return torch.where(largest < INFINITY, exponent.clamp(min=LOWEST), 128)


def quantise(x: Tensor, block: Block, format: Format = E4M3, agree: Agree | None = None) -> Rounded:
    """Round a matrix [R,C] to `format`, to the nearest number and, of two as near, the one with the
    even code. Blocks begin at the first row and column; the last ones may be smaller.

    A block with an infinity or a NaN becomes NaN as a whole, its scale too: an infinity that became
    the largest number of `format`, as a cast makes it, would hide from the guard of bad numbers."""
    rows, columns = x.shape
    padding = (0, -columns % block[1], 0, -rows % block[0])
    blocks = F.pad(x.float(), padding).unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    # As integers, bits without the sign are in the order of absolute values, NaN above infinity.
    largest = (blocks.contiguous().view(torch.int32) & WITHOUT_SIGN).amax((1, 3))
    scales, inverse = scales_of(agree(largest) if agree else largest, format)
    scaled = blocks * inverse[:, None, :, None]
    codes = scaled.flatten(2, 3).flatten(0, 1)[:rows, :columns].to(format.dtype)
    return Rounded(codes, scales, block)


def scales_of(largest: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Return the scales of blocks, and what their numbers are multiplied by, fp32: NaN where a block
    has an infinity or a NaN. `largest` is as in `scale_exponents`."""
    exponent = scale_exponents(largest, format)
    finite = exponent < 128
    inverse = power_of_two(torch.where(finite, -exponent, 0)).masked_fill(~finite, torch.nan)
    scales = power_of_two(torch.where(finite, exponent, 0)).masked_fill(~finite, torch.nan)
    return scales, inverse


def _turned(x: Rounded) -> Rounded:
    """Return the transposed matrix, whose rows lie in one piece."""
    return Rounded(x.codes.t().contiguous(), x.scales.t().contiguous(), x.block[::-1], x.recipe)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent, fp32, for int32 exponents from -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def _in_one_pass(x: Tensor, block: Block, agree: Agree | None) -> bool:
    """Return whether megalite's kernels round `x`, which find the largest number and round in one
    pass."""
    # Ranks cannot agree in between, nor can thread blocks of a GPU, which have a block each.
    fits = agree is None and (x.device.type == "cpu" or min(block) <= 128)
    return fits and pick("fp8", x) == "megalite"


def round_to_fp8(
    x: Tensor, block: Block, format: Format = E4M3, agree: Agree | None = None
) -> Tensor:
    """Return the numbers in `x`'s dtype that `quantise` makes of its rows: [… ,C], of which all but
    the last dimension are rows."""
    rows = x.flatten(0, -2)
    if _in_one_pass(x, block, agree):
        return torch.ops.megalite.fp8_round(rows, *block, format is E5M2).view(x.shape)
    return quantise(rows, block, format, agree).dequantise(x.dtype).view(x.shape)


Operand = Literal["x", "weight", "grad"]
Sum = Literal["input", "output", "tokens"]
"""What a product sums over: input features in x · Wᵀ, output features in grad · W, tokens in gradᵀ · x."""


@dataclass(frozen=True)
class Recipe:
    """How the operands of a linear module's products are rounded."""

    name: Name
    length: int | None
    """Numbers along a product's sum that share a scale. None: all of them."""
    rows: int | None = 1
    """Rows of activations and gradients that do, side by side. None: all of them."""
    weight_rows: int | None = 1
    """The same of weights."""
    gradients: Format = E4M3
    multiple: int = 16
    """Of which the features must be multiples, on each rank: blocks, and what chips multiply."""
    cut: str | None = None
    """How tensor ranks share the weight: "column", by output features, or "row", by input features.
    None: they do not, or it is no matter."""
    agree: Agree | None = None
    """Finds the largest number over them."""

    @property
    def spans_ranks(self) -> bool:
        """Return whether a block may have numbers of several tensor ranks, and of any tokens of a
        micro-batch."""
        return self.length is None

    def on(self, cut: str | None, agree: Agree | None) -> Recipe:
        """Return the recipe of a linear module whose weight tensor ranks share by `cut`."""
        return replace(self, cut=cut, agree=agree) if self.spans_ranks else self

    def _block(self, shape: torch.Size, operand: Operand, over: Sum) -> tuple[Block, bool]:
        """Return the rows and columns of an operand that share a scale, and whether a product's sum
        is along its rows, and not its columns."""
        rows, columns = shape
        by_row = over == "input" or (over == "output" and operand == "grad")
        along, beside = (columns, rows) if by_row else (rows, columns)
        share = self.weight_rows if operand == "weight" else self.rows
        # An empty matrix has no block; 1 stands for its size.
        length, side = self.length or max(along, 1), share or max(beside, 1)
        return ((side, length) if by_row else (length, side)), by_row

    def _round(self, x: Tensor, operand: Operand, over: Sum) -> Tensor:
        """Return the numbers that an operand stands for once it is rounded."""
        if isinstance(x, CodedWeight):
            return x.dequantise()
        block, _ = self._block(x.flatten(0, -2).shape, operand, over)
        return round_to_fp8(x, block, self._format(operand), self._agree(operand, over))

    def rounded(self, x: Tensor, operand: Literal["x", "grad"]) -> Tensor:
        """Return what an input, or the gradient of an output, is rounded to in the product that
        sums over its features."""
        return self._round(x, operand, "input" if operand == "x" else "output")

    def _codes(self, x: Tensor, operand: Operand, over: Sum) -> Rounded:
        """Return an operand's codes and scales, transposed where that is what lays the product's
        sum along rows."""
        if isinstance(x, CodedWeight):
            return x.rounded if over == "input" else _turned(x.rounded)
        rows = x.flatten(0, -2)
        if operand != "weight" and over != "tokens":
            # Chips take whole groups of tokens; what is more is cut off from the product.
            rows = F.pad(rows, (0, 0, 0, -len(rows) % 16))
        block, by_row = self._block(rows.shape, operand, over)
        format, agree = self._format(operand), self._agree(operand, over)
        if _in_one_pass(x, block, agree):
            quantised = torch.ops.megalite.fp8_quantise
            codes, scales = quantised(rows, *block, format is E5M2, not by_row)
        else:
            turned = rows if by_row else rows.t()
            codes, scales, *_ = quantise(turned, block if by_row else block[::-1], format, agree)
        return Rounded(codes.contiguous(), scales, block if by_row else block[::-1], self.name)

    def _format(self, operand: Operand) -> Format:
        return self.gradients if operand == "grad" else E4M3

    def _agree(self, operand: Operand, over: Sum) -> Agree | None:
        return self.agree if self._is_cut(operand, over) else None

    def _is_cut(self, operand: Operand, over: Sum) -> bool:
        """Return whether other tensor ranks have parts of this operand's blocks."""
        if self.rows is None and over != "tokens" and operand == "weight":
            return self.cut is not None
        features = {"x": "row", "grad": "column", "weight": "row" if over == "input" else "column"}
        return self.cut == features[operand] and (self.rows is None or over != "tokens")

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x · Wᵀ + bias: [… ,K] and [N,K] → [… ,N]."""
        if takes(self.name, x):
            return self._multiply(x, "x", weight, "input", bias)
        rounded = self._round(x, "x", "input")
        return F.linear(rounded, self._round(weight, "weight", "input"), bias)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the input, grad · W: [… ,N] and [N,K] → [… ,K]."""
        if takes(self.name, grad):
            return self._multiply(grad, "grad", weight, "output")
        return self._round(grad, "grad", "output") @ self._round(weight, "weight", "output")

    def _multiply(
        self, x: Tensor, operand: Operand, weight: Tensor, over: Sum, bias: Tensor | None = None
    ) -> Tensor:
        """Return one of these products, of codes."""
        a, b = self._codes(x, operand, over), self._codes(weight, "weight", over)
        out = scaled_product(a, b, x.dtype, bias)
        return out[: x.numel() // x.shape[-1]].view(*x.shape[:-1], out.shape[1])

    def wgrad_operands(self, grad: Tensor, x: Tensor) -> tuple[Tensor | Rounded, Tensor | Rounded]:
        """Return the operands of the weight's gradient gradᵀ · x, [T,N] and [T,K], rounded along
        tokens; where the chip multiplies codes these, transposed."""
        if takes(self.name, x):
            return self._codes(grad, "grad", "tokens"), self._codes(x, "x", "tokens")
        return self._round(grad, "grad", "tokens"), self._round(x, "x", "tokens")

    def grouped_operands(
        self, rows: Tensor, weight: Tensor, over: Literal["input", "output"]
    ) -> tuple[Tensor, Tensor]:
        """Return the operands of experts' products, whose stack of matrices [E,O,I] is rounded as
        one [E·O,I]: no block has rows of two, as O is a multiple of it."""
        operand: Operand = "x" if over == "input" else "grad"
        return self._round(rows, operand, over), self._round(weight, "weight", over)


def _register() -> None:
    # Fake kernels give the shapes and dtypes of the results without computing them.

    @torch.library.register_fake("megalite::fp8_round")
    def _(x: Tensor, block_rows: int, block_columns: int, e5m2: bool) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.register_fake("megalite::fp8_quantise")
    def _(
        x: Tensor, block_rows: int, block_columns: int, e5m2: bool, transposed: bool
    ) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape
        blocks = -(-rows // block_rows), -(-columns // block_columns)
        (rows, columns), blocks = (
            ((columns, rows), blocks[::-1]) if transposed else ((rows, columns), blocks)
        )
        format = E5M2 if e5m2 else E4M3
        return x.new_empty(rows, columns, dtype=format.dtype), x.new_empty(
            *blocks, dtype=torch.float32
        )


if own():
    _register()
