"""How the numbers of a quantised matrix and their scales are stored: compressed-tensors' formats,
as transformers and vLLM read them, which are symmetric (a number stands for itself × its scale), and
bitsandbytes' NF4."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megalite.errors import ConfigError
from megalite.kernels import quantised
from megalite.kernels.blockwise import DYNAMIC_BLOCK, dynamic_table, nf4_table
from megalite.kernels.quantised import BLOCK

SMALLEST_SCALE = torch.finfo(torch.float32).eps
"""Scale of numbers that are all 0."""
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Scheme:
    """Stores matrices [N, K], of N output features. Scales are [N, K / group], one for each `group`
    of columns, and are rounded to the model's own dtype first, as readers hold them in it."""

    name: str
    format: str
    """What compressed-tensors calls the layout of the files."""
    group: int | None = None
    """Columns that share a scale; None: all of a row."""

    SUFFIX: ClassVar[str] = "weight"
    """What stands in place of "weight" in the name of the numbers."""

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise ConfigError for a matrix that cannot be stored."""
        if self.group and shape[1] % self.group:
            raise ConfigError(
                f"{name} has {shape[1]} columns, which do not divide into groups of {self.group}; give a --group that "
                "divides them"
            )

    def scales(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scales of a matrix, fp32 numbers that `dtype` holds exactly."""
        return self.scales_for(self.largest(weight), dtype)

    def largest(self, weight: Tensor) -> Tensor:
        """Return the largest absolute number under each scale, fp32."""
        return weight.float().abs().unflatten(1, (-1, self.group or weight.shape[1])).amax(2)

    @property
    def step(self) -> float:
        """Return the scale of numbers of which the largest is 1."""
        raise NotImplementedError

    def scales_for(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scales of numbers of which the `largest` are these."""
        return (largest * self.step).to(dtype).float().clamp(min=SMALLEST_SCALE)

    def spread(self, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return the scale of every number of a matrix of `shape` [N, K]."""
        return scales.repeat_interleave(self.group or shape[1], 1)

    def encode(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the stored numbers, one for each of `weight`, by the `scale` of each (all of one
        shape)."""
        raise NotImplementedError

    def decode(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """Return what stored numbers stand for, fp32."""
        return numbers.float() * scale

    def round_to_nearest(
        self, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what a matrix stored in `dtype` becomes, fp32, and the tensors to write by what
        replaces "weight" in its name."""
        scales = self.scales(weight, dtype)
        scale = self.spread(scales, tuple(weight.shape))
        numbers = self.encode(weight, scale)
        return self.decode(numbers, scale), self.pack(numbers, scales, dtype)

    def pack(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors to write by what replaces "weight" in the matrix's name."""
        return {"weight": numbers, "weight_scale": scales.to(dtype)}

    def weights_config(self) -> dict[str, Any]:
        """Return what compressed-tensors' config says of the weights."""
        raise NotImplementedError

    def activations_config(self) -> dict[str, Any] | None:
        """Return what it says of a matrix's input; None: left as it is."""
        return None

    def inputs(self) -> Scheme | None:
        """Return how a matrix's inputs, rows of tokens, are rounded as they come; None: not at
        all."""
        return None

    def config(self, ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
        """Return `quantization_config` of config.json. Modules in `ignore` are not quantised;
        `dtype` is the model's."""
        group = {
            "targets": ["Linear"], "weights": self.weights_config(), "input_activations": self.activations_config(),
            "output_activations": None,
        }  # fmt: skip
        return {
            "quant_method": "compressed-tensors", "format": self.format, "quantization_status": "compressed",
            "ignore": ignore, "config_groups": {"group_0": group},
        }  # fmt: skip


def _arguments(
    bits: int, kind: Literal["int", "float"], strategy: str, dynamic: bool = False, **more: Any
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": True,
        "dynamic": dynamic,
        **more,
    }


@dataclass(frozen=True)
class Integers(Scheme):
    """Integers of `bits` bits in two's complement; of 4 bits eight in an int32, the first in its
    lowest bits."""

    bits: int = 8

    @property
    def step(self) -> float:
        # As compressed-tensors has it: the range of all 2^bits numbers, half a step beyond the
        # largest one, which `encode` cuts off.
        return 2 / (2**self.bits - 1)

    def encode(self, weight: Tensor, scale: Tensor) -> Tensor:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return (weight.float() / scale).round().clamp(low, high).to(torch.int8)

    def pack(self, numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.bits == 8:
            return super().pack(numbers, scales, dtype)
        per_word = 32 // self.bits
        # Unsigned, so that no sign reaches over the bits of the numbers beside it.
        unsigned = numbers.int() + 2 ** (self.bits - 1)
        words = torch.zeros(numbers.shape[0], numbers.shape[1] // per_word, dtype=torch.int32)
        for place in range(per_word):
            words |= unsigned[:, place::per_word] << (self.bits * place)
        shape = torch.tensor(numbers.shape)
        return {"weight_packed": words, "weight_scale": scales.to(dtype), "weight_shape": shape}

    def weights_config(self) -> dict[str, Any]:
        if self.group:
            return _arguments(self.bits, "int", "group", group_size=self.group)
        return _arguments(self.bits, "int", "channel")

    def inputs(self) -> Scheme | None:
        return replace(self, group=None) if self.bits == 8 else None

    def activations_config(self) -> dict[str, Any] | None:
        # Rounded as they come, with a scale of each token: int8 × int8 products.
        return _arguments(8, "int", "token", dynamic=True) if self.bits == 8 else None


@dataclass(frozen=True)
class Float8(Scheme):
    """fp8 (E4M3) with a scale for each output feature, or for each block of `block` × `block`."""

    block: int | None = None

    @property
    def step(self) -> float:
        return 1 / torch.finfo(FP8).max

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if self.block and any(size % self.block for size in shape):
            raise ConfigError(
                f"{name} of shape {list(shape)} does not divide into blocks of {self.block}; --scheme fp8 takes any"
            )

    def largest(self, weight: Tensor) -> Tensor:
        if not self.block:
            return super().largest(weight)
        blocks = weight.float().abs().unflatten(1, (-1, self.block)).unflatten(0, (-1, self.block))
        return blocks.amax((1, 3))

    def spread(self, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not self.block:
            return super().spread(scales, shape)
        return scales.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)

    def encode(self, weight: Tensor, scale: Tensor) -> Tensor:
        # A cast beyond the largest number gives NaN, not the largest number.
        largest = torch.finfo(FP8).max
        return (weight.float() / scale).clamp(-largest, largest).to(FP8)

    def weights_config(self) -> dict[str, Any]:
        if self.block:
            return _arguments(8, "float", "block", block_structure=[self.block, self.block])
        return _arguments(8, "float", "channel")

    def inputs(self) -> Scheme | None:
        return replace(self, group=self.block, block=None)

    def activations_config(self) -> dict[str, Any] | None:
        if self.block:
            return _arguments(8, "float", "group", dynamic=True, group_size=self.block)
        return _arguments(8, "float", "token", dynamic=True)


class Nf4(Scheme):
    """bitsandbytes' NF4 with double quantisation: a scale for each 64 numbers, which is quantised in
    turn, and both tables beside the numbers."""

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if shape[1] % BLOCK:
            raise ConfigError(
                f"{name} has {shape[1]} columns, which do not divide into the blocks of {BLOCK} of --scheme nf4"
            )

    def round_to_nearest(
        self, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        numbers = quantised.Nf4.of([weight])
        state = {
            "quant_type": "nf4", "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch."),
            "shape": list(weight.shape), "nested_blocksize": DYNAMIC_BLOCK, "nested_dtype": "float32",
            "nested_offset": numbers.mean[0].item(),
        }  # fmt: skip
        tensors = {
            "weight": numbers.codes.reshape(-1, 1),
            "weight.absmax": numbers.scales.flatten(),
            "weight.quant_map": nf4_table(weight.device),
            "weight.nested_absmax": numbers.nested,
            "weight.nested_quant_map": dynamic_table(weight.device),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor([*json.dumps(state).encode()], dtype=torch.uint8),
        }  # fmt: skip
        # Readers have the numbers in `dtype`.
        return numbers.rows(slice(None)).to(dtype).float(), tensors

    def config(self, ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."), "llm_int8_skip_modules": ignore,
        }  # fmt: skip


SCHEMES = ("w8a8", "w4a16", "fp8", "fp8_block", "nf4")
GROUP = 128
"""Columns that share a scale under w4a16, and rows and columns of a block under fp8_block, unless
told otherwise."""


def make_scheme(name: str, group: int = GROUP) -> Scheme:
    """Return the scheme of a name in `SCHEMES`. Raises ConfigError."""
    match name:
        case "w8a8":
            return Integers(name, "int-quantized")
        case "w4a16":
            if group % 8:
                raise ConfigError(
                    f"--group {group} must be a multiple of 8: eight numbers share a word"
                )
            return Integers(name, "pack-quantized", group, bits=4)
        case "fp8":
            return Float8(name, "float-quantized")
        case "fp8_block":
            return Float8(name, "float-quantized", block=group)
        case "nf4":
            return Nf4(name, "bitsandbytes")
    raise ConfigError(f"--scheme {name} is none of {', '.join(SCHEMES)}")
