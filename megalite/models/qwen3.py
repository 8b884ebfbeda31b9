"""Qwen 3 (Yang et al. 2025): Llama that normalises each head's queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn as nn

from megalite.models.llama import (
    HeadNormAttention,
    Layer,
    Llama,
    attention_rows,
    fields_from_hf,
    fields_to_hf,
    head_norm_rows,
    layer_table,
    table,
)
from megalite.models.weights import Weight
from megalite.models.windows import QWEN, WindowedByLayer, qwen_from_hf, qwen_to_hf


class Qwen3Config(WindowedByLayer):
    family: Literal["qwen3"] = "qwen3"
    HEAD_NORMS: ClassVar[bool] = True


class Qwen3(Llama):
    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, HeadNormAttention(self.config, number))


def weights(config: Qwen3Config) -> Iterator[Weight]:
    yield from table(
        config, layer_table(config, attention_rows(config, norms=head_norm_rows(config)))
    )


KEYS = QWEN.but(used={"head_dim": 128})


def to_hf(config: Qwen3Config) -> dict[str, Any]:
    return fields_to_hf(config, "Qwen3ForCausalLM") | qwen_to_hf(config)


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf, Qwen3Config) | qwen_from_hf(hf)


MODEL, CONFIG = Qwen3, Qwen3Config
