"""Qwen 3 with a mixture of experts (Yang et al. 2025), in all layers or among dense ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch.nn as nn

from megalite.models.experts import (
    AMONG,
    Among,
    RoutedLayer,
    among_from_hf,
    among_to_hf,
    expert_rows,
)
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
from megalite.models.windows import Windowed


class Qwen3MoeConfig(Among, Windowed):
    family: Literal["qwen3_moe"] = "qwen3_moe"

    HEAD_NORMS: ClassVar[bool] = True


class Qwen3Moe(Llama):
    config: Qwen3MoeConfig

    def layer(self, number: int) -> nn.Module:
        kind = RoutedLayer if self.config.is_routed(number) else Layer
        return kind(self.config, HeadNormAttention(self.config, number))


def weights(config: Qwen3MoeConfig) -> Iterator[Weight]:
    attention = attention_rows(config, norms=head_norm_rows(config))
    dense = layer_table(config, attention)
    routed = layer_table(config, attention, expert_rows(config))

    def rows(layer: int) -> Sequence[Weight]:
        return routed if config.is_routed(layer) else dense

    yield from table(config, rows)


KEYS = AMONG.but(
    used={
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
    },
    max_window_layers="a window is in all layers",
)


def to_hf(config: Qwen3MoeConfig) -> dict[str, Any]:
    window = {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }
    return fields_to_hf(config, "Qwen3MoeForCausalLM") | among_to_hf(config) | window


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    window = {"sliding_window": hf["sliding_window"] if hf["use_sliding_window"] else None}
    return fields_from_hf(hf, Qwen3MoeConfig) | among_from_hf(hf, usual=128) | window


MODEL, CONFIG = Qwen3Moe, Qwen3MoeConfig
