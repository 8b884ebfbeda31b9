"""Linear layers on the CPU whose weights stay the integers that `megalite quantize` has written.

    w8a8     int8 × int8 by oneDNN, for any number of rows: inputs are rounded token by token, as the format says
    w4a16    int4 × bf16 by torch's kernel for up to `INT4_ROWS` rows; for more, as in long prompts, the product of
             the weight in bf16, dequantised for it

They are taken where they are the quicker ones: on CPUs with int8 products of their own (VNNI); int8
of a model whose matrices are larger than caches (`INT8_BYTES`), and int4 of a model in bf16, as its
kernel is slow otherwise. Everywhere else weights are what
their integers stand for, in the model's precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.checkpoint.quantised import Scaled
from megalite.checkpoint.tensors import TensorFolder
from megalite.kernels.blockwise import look_up_pairs, pairs_of
from megalite.kernels.int8 import round_rows
from megalite.models import peft, read_hf_config, weight_table
from megalite.models.layers import Decoder
from megalite.models.weights import Weight

INT8_BYTES = 2**26
"""Bytes of a model's matrices in bf16 from which int8 is taken: what stays in caches is read in no
time, and rounding the inputs takes longer than half of the bytes save."""
INT4_ROWS = 128
"""Rows up to which the int4 kernel is quicker than dequantising and a product in bf16."""
INT4_GROUPS = (32, 64, 128, 256)
"""Columns of a scale that torch's int4 kernel takes."""
AT_ONCE = 2**20
"""Numbers that are dequantised at a time."""


class Int8Linear(nn.Module):
    """Multiplies int8 weights by inputs that are rounded to int8, with a scale for each row of
    both."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None):
        """Take `numbers` int8 [N, K] and their `scales` fp32 [N, 1]."""
        super().__init__()
        # [N, K] and not its transpose: of a square matrix that would be multiplied without a word.
        self.weight = torch.ops.onednn.qlinear_prepack(numbers, None)
        self.scales, self.zeros = scales.flatten(), torch.zeros(len(scales), dtype=torch.int64)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        # Unsigned with a zero of 128: oneDNN computes signed inputs number by number.
        numbers, scale = round_rows(x.flatten(0, -2))
        out = torch.ops.onednn.qlinear_pointwise(
            numbers, 1.0, 128, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        out *= scale
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """Multiplies int4 weights, with a scale for each group of columns, by inputs in bf16."""

    def __init__(self, numbers: Tensor, scales: Tensor, bias: Tensor | None):
        """Take `numbers` int8 [N, K] from -8 to 7 and their `scales` [N, K / group]."""
        super().__init__()
        unsigned, self.group = numbers.int() + 8, numbers.shape[1] // scales.shape[1]
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
        # Scales, and what is added to each number behind them: nothing.
        pairs = torch.stack((scales.t(), torch.zeros_like(scales.t())), -1)
        self.scales = pairs.to(torch.bfloat16).contiguous()
        # Two numbers a byte, to dequantise from: the kernel's own order depends on the CPU.
        self.pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)
        self.values = pairs_of(torch.arange(-8.0, 8.0))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= INT4_ROWS:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.contiguous(), self.weight, self.group, self.scales
            )
            out = out if self.bias is None else out + self.bias
        else:
            out = F.linear(rows, self.dense(), self.bias)
        return out.view(*x.shape[:-1], -1)

    def dense(self) -> Tensor:
        """Return the weight in bf16, [N, K]."""
        scales = self.scales[..., 0].t().float()[..., None]
        rows, width = len(self.pairs), 2 * self.pairs.shape[1]
        out = torch.empty(rows, width, dtype=torch.bfloat16)
        step = max(1, AT_ONCE // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            numbers = look_up_pairs(self.values, self.pairs[part])
            numbers = numbers.view(-1, scales.shape[1], self.group)
            out[part] = numbers.mul_(scales[part]).flatten(1)
        return out


def keep_integers(model: Decoder, folder: Path) -> int:
    """Replace the linear layers of `model`, in place, by those of the integers that its `folder`
    has, where that is quicker. Returns how many were."""
    if peft.is_adapter(folder):  # merged, its model has other weights than those that are stored
        return 0
    said = read_hf_config(folder).get("quantization_config")
    kind = _kind(said) if isinstance(said, dict) else None
    device = next(model.parameters()).device
    if kind is None or device.type != "cpu" or not torch.cpu._is_vnni_supported():
        return 0
    if kind is Int4Linear and next(model.parameters()).dtype != torch.bfloat16:
        return 0
    rows = {weight.name: weight for weight in weight_table(model.config) if weight.is_matrix}
    if kind is Int8Linear and 2 * sum(weight.numel for weight in rows.values()) < INT8_BYTES:
        return 0
    files, replaced = TensorFolder(folder), 0
    for parent_name, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            weight = rows.get(f"{parent_name}.{name}.weight")
            # Exactly nn.Linear, whose weight nobody else reads.
            if type(child) is not nn.Linear or weight is None:
                continue
            found = _integers(weight, files)
            if found and (kind is Int8Linear or _fits_int4(*found)):
                setattr(parent, name, kind(*found, child.bias))
                replaced += 1
    return replaced


def _kind(said: dict[str, object]) -> type[Int8Linear] | type[Int4Linear] | None:
    """Return which layer computes what a `quantization_config` describes; None where none does."""
    groups = said.get("config_groups")
    if said.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
        return None
    (group, *others) = groups.values()
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if others or kind[0] != "int":
        return None
    if kind[1:] == (8, "channel") and inputs and inputs.get("num_bits") == 8:
        return Int8Linear if inputs.get("dynamic") and inputs.get("strategy") == "token" else None
    return Int4Linear if kind[1:] == (4, "group") and not inputs else None


def _integers(weight: Weight, files: TensorFolder) -> tuple[Tensor, Tensor] | None:
    """Return the stored numbers of a matrix, int8 [N, K], and their scales, fp32 [N, groups]; None
    where they are not stored so."""
    stored = [files.scaled(name) for name in weight.hf]
    if not all(isinstance(each, Scaled) for each in stored):
        return None
    by_name = dict(zip(weight.hf, stored, strict=True))

    def rows(read: Callable[[Scaled], Tensor]) -> Tensor:
        whole = {name: read(each) for name, each in by_name.items()}
        width = next(iter(whole.values())).shape[1]
        narrow = replace(weight, shape=(weight.num_rows, width), quantised=None)
        return narrow.rows_from_hf(
            lambda name, where: whole[name][where], 0, weight.num_rows, (0, width)
        )

    return rows(Scaled.numbers), rows(Scaled.scales)


def _fits_int4(numbers: Tensor, scales: Tensor) -> bool:
    """Return whether torch's kernel takes a matrix of this shape."""
    # Divided, not rounded: a last group that is shorter fits no kernel.
    groups = numbers.shape[1] / scales.shape[1]
    return groups in INT4_GROUPS and numbers.shape[0] % 32 == 0 and math.prod(scales.shape) > 0
