"""Qwen 1.5 and 2 with a mixture of experts (Yang et al. 2024): beside those that are chosen, an
expert that every token visits, weighed by a gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch.nn as nn
from pydantic import Field

from megalite.models.experts import (
    AMONG,
    Among,
    RoutedLayer,
    among_from_hf,
    among_to_hf,
    expert_rows,
    shared_rows,
)
from megalite.models.hf import disagree
from megalite.models.llama import (
    Attention,
    Biases,
    Layer,
    Llama,
    fields_from_hf,
    fields_to_hf,
    layer_table,
    table,
)
from megalite.models.weights import Weight
from megalite.utils.outside import shown


class Qwen2MoeConfig(Among):
    family: Literal["qwen2_moe"] = "qwen2_moe"
    shared_expert_intermediate_size: int = Field(
        gt=0, description="Inner features of the expert of every token."
    )

    @property
    def biases(self) -> Biases:
        return Biases(qkv=True)

    @property
    def shared_inner(self) -> int:
        return self.shared_expert_intermediate_size

    @property
    def gates_shared(self) -> bool:
        return True


class Qwen2Moe(Llama):
    config: Qwen2MoeConfig

    def layer(self, number: int) -> nn.Module:
        kind = RoutedLayer if self.config.is_routed(number) else Layer
        return kind(self.config, Attention(self.config, number))


def weights(config: Qwen2MoeConfig) -> Iterator[Weight]:
    experts = (*expert_rows(config), *shared_rows(config, "mlp.shared_expert"))
    dense, routed = layer_table(config), layer_table(config, mlp=experts)

    def rows(layer: int) -> Sequence[Weight]:
        return routed if config.is_routed(layer) else dense

    yield from table(config, rows)


KEYS = AMONG.but(
    used={
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "layer_types": None,
    },
    only={"use_sliding_window": False, "qkv_bias": True},
    sliding_window="no layer has a window",
    max_window_layers="no layer has a window",
    attention_bias="queries, keys and values have biases, whatever it says",
)


def to_hf(config: Qwen2MoeConfig) -> dict[str, Any]:
    values = fields_to_hf(config, "Qwen2MoeForCausalLM") | among_to_hf(config)
    del values["attention_bias"]  # it is part of the family
    return values | {
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "use_sliding_window": False,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if "sliding_attention" in (types := hf["layer_types"] or ()):
        disagree(f"layer_types = {shown(types)}", "use_sliding_window = False")
    shared = {"shared_expert_intermediate_size": hf["shared_expert_intermediate_size"]}
    return fields_from_hf(hf, Qwen2MoeConfig) | among_from_hf(hf, usual=60) | shared


MODEL, CONFIG = Qwen2Moe, Qwen2MoeConfig
