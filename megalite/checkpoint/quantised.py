"""Tensors that are stored as small numbers with scales, read as what they stand for: fp8 in blocks
(DeepSeek-V3's files on the hub), MXFP4 (gpt-oss's), what `quantization` writes (compressed-tensors),
GPTQ's and AWQ's own files, and bitsandbytes' NF4. They look like slices of safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.errors import ConfigError
from megalite.models.hf import check_packed
from megalite.utils.outside import read_json

BLOCK = 128
"""Rows and columns of a block of fp8 that share a scale."""
GROUP = 32
"""Numbers of MXFP4 that share a scale."""
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 numbers of E2M1 stand for."""


class Fp8Blocks:
    """A matrix [out, in] in fp8 (E4M3), of which each block of 128 × 128 has a scale, fp32."""

    ENDS = ("", "_scale_inv")
    """What the names of the numbers and of the scales end in."""

    def __init__(self, numbers: Any, scales: Any):
        """Take slices of safetensors. Raises ValueError where they do not go together."""
        self._numbers, self._scales = numbers, scales
        shape, given = tuple(numbers.get_shape()), tuple(scales.get_shape())
        if len(shape) != 2 or given != tuple(-(-size // BLOCK) for size in shape):
            raise ValueError(
                f"numbers of shape {list(shape)} and scales of {list(given)} are no blocks of {BLOCK}"
            )
        self._shape = shape

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        """Read and scale a slice of two dimensions, fp32."""
        bounds = [part.indices(size)[:2] for part, size in zip(where, self._shape, strict=True)]
        scales = self._scales[
            tuple(slice(low // BLOCK, -(-high // BLOCK)) for low, high in bounds)
        ].float()
        for dim, (low, high) in enumerate(bounds):
            first = low - low // BLOCK * BLOCK
            scales = scales.repeat_interleave(BLOCK, dim).narrow(dim, first, high - low)
        return self._numbers[where].float() * scales


class Mxfp4:
    """Matrices [experts, in, out] in MXFP4, stored as [experts, out, groups, 16] pairs of numbers
    along the input and a power of 2 for each group of 32."""

    ENDS = ("_blocks", "_scales")

    def __init__(self, numbers: Any, scales: Any):
        """As in `Fp8Blocks`."""
        self._numbers, self._scales = numbers, scales
        shape, given = tuple(numbers.get_shape()), tuple(scales.get_shape())
        if len(shape) != 4 or shape[3] != GROUP // 2 or given != shape[:3]:
            raise ValueError(
                f"numbers of shape {list(shape)} and scales of {list(given)} are no groups of {GROUP}"
            )
        self._shape = (shape[0], shape[2] * GROUP, shape[1])

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        return "F32"

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        """Read and scale a slice of three dimensions, fp32."""
        experts, inputs, outputs = where
        low, high, _ = inputs.indices(self._shape[1])
        groups = slice(low // GROUP, -(-high // GROUP))
        pairs, powers = (
            self._numbers[experts, outputs, groups, :],
            self._scales[experts, outputs, groups],
        )
        halves = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
        values = torch.tensor(FP4)[halves.int()].ldexp(powers[..., None].int() - 127)
        return values.flatten(-2).narrow(-1, low % GROUP, high - low).transpose(-1, -2)


class Scaled:
    """A matrix [out, in] of int8 or fp8 (compressed-tensors), with a scale for each row, for each
    group of columns of a row, or for each block of rows and columns: whatever shape the scales have
    cuts the matrix evenly."""

    ENDS = ("", "_scale")

    def __init__(self, numbers: Any, scales: Any):
        """As in `Fp8Blocks`."""
        self._numbers, self._scales = numbers, scales
        self._shape = self._size(tuple(numbers.get_shape()))
        given = tuple(scales.get_shape())
        if (
            len(self._shape) != 2
            or len(given) != 2
            or any(
                not parts or size % parts for size, parts in zip(self._shape, given, strict=True)
            )
        ):
            raise ValueError(
                f"scales of shape {list(given)} do not cut a matrix of {list(self._shape)} evenly"
            )
        self._block = tuple(size // parts for size, parts in zip(self._shape, given, strict=True))

    def _size(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return stored

    def _stored_numbers(self, rows: slice, columns: slice) -> Tensor:
        numbers: Tensor = self._numbers[rows, columns]
        return numbers

    def numbers(self) -> Tensor:
        """Return the numbers as they are stored, int8 [out, in] or fp8, of 4 bits from -8 to 7."""
        every = (slice(0, size) for size in self._shape)
        return self._stored_numbers(*every)

    def scales(self) -> Tensor:
        """Return the scales, fp32."""
        scales: Tensor = self._scales[:, :]
        return scales.float()

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        """Return the dtype of the scales, which is the model's own."""
        return str(self._scales.get_dtype())

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        """Read and scale a slice of one or two dimensions, in the dtype of the scales."""
        every = (*where, slice(None))[:2]
        bounds = [part.indices(size)[:2] for part, size in zip(every, self._shape, strict=True)]
        parts = tuple(
            slice(low // block, -(-high // block))
            for (low, high), block in zip(bounds, self._block, strict=True)
        )
        stored = self._scales[parts]
        scales = stored.float()
        for dim, ((low, high), block) in enumerate(zip(bounds, self._block, strict=True)):
            scales = scales.repeat_interleave(block, dim).narrow(dim, low % block, high - low)
        numbers = self._stored_numbers(slice(*bounds[0]), slice(*bounds[1]))
        return (numbers.float() * scales).to(stored.dtype)


class Packed(Scaled):
    """The same of integers of 4 bits, eight in an int32, the first in its lowest bits, each with 8
    added."""

    ENDS = ("_packed", "_scale")
    EXTRA = "_shape"

    def _size(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        return (*stored[:-1], 8 * stored[-1])

    def _stored_numbers(self, rows: slice, columns: slice) -> Tensor:
        # Eight numbers of four bits are in a word: whole words around the columns.
        packed = slice(columns.start // 8, -(-columns.stop // 8))
        words: Tensor = self._numbers[rows, packed]
        numbers = (words[..., None] >> torch.arange(0, 32, 4)) & 15
        here = (numbers.flatten(-2) - 8).to(torch.int8)
        count = columns.stop - columns.start
        return here.narrow(-1, columns.start % 8, count)


class PackedInputs:
    """A matrix [out, in] as GPTQ's and AWQ's tools write it: integers of 4 or 8 bits, [in, out],
    several in an int32, and for each group of inputs and each output a scale and an integer that
    stands for 0, as they write them."""

    def __init__(self, parts: Mapping[str, Any], said: Mapping[str, Any]):
        """Take slices of safetensors by the ends of their names, qweight, qzeros, scales and
        perhaps g_idx, and what config.json says of them. Raises ValueError where they do not go
        together."""
        self._parts = parts
        self._awq, self._bits = said["quant_method"] == "awq", said["bits"]
        per_word = 32 // self._bits
        # Along the outputs in AWQ's files, along the inputs in GPTQ's.
        first, second = parts["qweight"].get_shape()
        size = (first, second * per_word) if self._awq else (first * per_word, second)
        groups, outputs = parts["scales"].get_shape()
        zeros, index = tuple(parts["qzeros"].get_shape()), parts.get("g_idx")
        whole = said.get("group_size", -1)
        self._group = size[0] if whole == -1 else whole
        if (
            (groups, outputs) != (-(-size[0] // self._group), size[1])
            or zeros != (groups, -(-outputs // per_word))
            or (index is not None and tuple(index.get_shape()) != (size[0],))
        ):
            raise ValueError(
                f"{size[0]} inputs of {size[1]} outputs do not go with scales of {[groups, outputs]} and zeros of "
                f"{list(zeros)} in groups of {self._group}"
            )
        self._shape = (size[1], size[0])
        # GPTQ's first version writes one less than stands for 0.
        self._less = int(not self._awq and said.get("checkpoint_format", "gptq") == "gptq")

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        """Return the dtype of the scales, which is the model's own."""
        return str(self._parts["scales"].get_dtype())

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        """Read and scale a slice of one or two dimensions, in the dtype of the scales."""
        every = (*where, slice(None))[:2]
        outputs, inputs = (
            slice(*part.indices(size)[:2]) for part, size in zip(every, self._shape, strict=True)
        )
        index = self._parts.get("g_idx")
        group = torch.arange(inputs.start, inputs.stop) // self._group
        if index is not None:
            group = index[inputs].long()
        scales = self._parts["scales"][:, outputs]
        zeros = self._unpacked(self._parts["qzeros"], slice(None), outputs, along=1) + self._less
        numbers = self._unpacked(self._parts["qweight"], inputs, outputs, along=int(self._awq))
        # The difference is exact in any dtype, and so rounded once: by the product.
        values = (numbers - zeros[group]).float() * scales[group].float()
        return values.t().to(scales.dtype)

    def _unpacked(self, words: Any, rows: slice, columns: slice, along: int) -> Tensor:
        """Return integers of `rows` and `columns`, of which several along a dimension share a word
        of `words`."""
        per_word = 32 // self._bits
        part = columns if along else rows
        length = words.get_shape()[along] * per_word
        start, stop, _ = part.indices(length)
        packed = slice(start // per_word, -(-stop // per_word))
        read = words[(packed, columns) if along == 0 else (rows, packed)]
        shifts = torch.arange(0, 32, self._bits, dtype=torch.int32)
        if self._awq:
            shifts = shifts[[0, 4, 1, 5, 2, 6, 3, 7]]
        by_word = shifts if along else shifts.view(-1, 1)
        all_ones = 2**self._bits - 1
        found = (read.unsqueeze(along + 1) >> by_word) & all_ones
        return found.flatten(along, along + 1).narrow(along, start % per_word, stop - start)


PACKED = ("qweight", "qzeros", "scales", "g_idx")
"""Ends of the names of `PackedInputs`' tensors, of which the last may be missing."""


def packed_config(folder: Path) -> dict[str, Any]:
    """Return what config.json of a folder says of its `PackedInputs`. Raises ConfigError."""
    values = read_json(folder / "config.json", ConfigError)
    said = values.get("quantization_config") if isinstance(values, dict) else None
    check_packed(said)
    assert isinstance(said, dict)
    return {"bits": said.get("w_bit"), "group_size": said.get("q_group_size", -1)} | said


STATE = ".quant_state.bitsandbytes__nf4"
"""End of the name of what bitsandbytes says of a matrix, as JSON in bytes."""
NF4 = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
"""Ends of the names of what a matrix in NF4 has beside its numbers."""
STORED_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


class Nf4Blocks:
    """A matrix [out, in] as bitsandbytes writes it: places of 4 bits in a table of 16 values, two in
    a byte and the first in its high half, along the rows; a scale for each block of them, fp32, or
    itself a place in a table, with a scale for each block of scales, less their mean."""

    def __init__(self, numbers: Any, parts: Mapping[str, Any]):
        """Take slices of safetensors, those beside the `numbers` by the ends in `NF4`. Raises
        ValueError where they do not go together."""
        self._numbers, self._parts = numbers, parts
        said = json.loads(bytes(parts[STATE][:].tolist()))
        shape, self._block = tuple(said["shape"]), said["blocksize"]
        self._nested = ".nested_absmax" in parts
        if len(shape) != 2 or said["quant_type"] != "nf4" or said["dtype"] not in STORED_AS:
            raise ValueError(f"a quant_state of {said} is not that of a matrix in NF4")
        self._shape, self._dtype = shape, said["dtype"]
        count = prod(shape)
        blocks = -(-count // self._block)
        wanted = {".absmax": blocks, ".quant_map": 16}
        if self._nested:
            self._mean, self._outer = said["nested_offset"], said["nested_blocksize"]
            wanted |= {".nested_absmax": -(-blocks // self._outer), ".nested_quant_map": 256}
        found = {end: prod(parts[end].get_shape()) for end in wanted if end in parts}
        if found != wanted or prod(numbers.get_shape()) != -(-count // 2):
            raise ValueError(f"numbers of {list(shape)} in blocks of {self._block} need {wanted}")

    def get_shape(self) -> tuple[int, ...]:
        return self._shape

    def get_dtype(self) -> str:
        """Return the dtype that the matrix had."""
        return STORED_AS[self._dtype]

    def _scales(self, low: int, high: int) -> Tensor:
        """Return the scales of some blocks, fp32."""
        scales: Tensor = self._parts[".absmax"][low:high]
        if not self._nested:
            return scales.float()
        table, outer = self._parts[".nested_quant_map"][:], self._parts[".nested_absmax"][:]
        number = torch.arange(low, high) // self._outer
        return table[scales.long()].float() * outer[number].float() + self._mean

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        """Read and scale a slice of one or two dimensions, in the dtype that the matrix had."""
        height, width = self._shape
        top, bottom, _ = where[0].indices(height)
        columns = where[1] if len(where) > 1 else slice(None)
        first, last = top * width, bottom * width
        # Whole blocks around the rows, whose ends may lie within one; a block is of whole bytes.
        block = self._block
        low, high = first // block, -(-last // block)
        pairs: Tensor = self._numbers[low * block // 2 : -(-high * block // 2)]
        pairs = pairs.flatten()
        places = torch.stack((pairs >> 4, pairs & 15), -1).flatten()
        table = self._parts[".quant_map"][:].float()
        values = table[places.long()]
        scales = self._scales(low, high).repeat_interleave(block)[: len(values)]
        begin = first - low * block
        wide = (values * scales)[begin : begin + last - first]
        return wide.view(-1, width)[:, columns].to(getattr(torch, self._dtype))


Kind = type[Fp8Blocks] | type[Mxfp4] | type[Scaled]
KINDS: dict[Kind, tuple[str, ...]] = {
    Fp8Blocks: ("F8_E4M3",), Mxfp4: ("U8",), Packed: ("I32",), Scaled: ("I8", "F8_E4M3"),
}  # fmt: skip
"""Kinds of quantised tensors, each with the dtypes of its numbers."""


def pairs(names: Any, dtype_of: Callable[[str], str]) -> dict[str, tuple[Kind, str, str]]:
    """Return what tensors of a file are quantised: (kind, name of the numbers, name of the scales)
    by the name of the tensor that these stand for. `dtype_of` gives the stored dtype of a name."""
    found: dict[str, tuple[Kind, str, str]] = {}
    for name in names:
        for kind, dtypes in KINDS.items():
            of_numbers, of_scales = kind.ENDS
            if name.endswith(of_scales):
                base = name.removesuffix(of_scales)
                numbers = base + of_numbers
                if numbers in names and dtype_of(numbers) in dtypes:
                    found[base] = (kind, numbers, name)
    return found
