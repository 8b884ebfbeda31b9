"""Mixtral (Jiang et al. 2024): Mistral whose MLPs are mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn as nn

from megalite.models import rope
from megalite.models.experts import (
    ROUTED,
    RoutedConfig,
    RoutedLayer,
    expert_rows,
    routed_from_hf,
    routed_to_hf,
)
from megalite.models.llama import Attention, Llama, fields_from_hf, fields_to_hf, layer_table, table
from megalite.models.weights import Weight
from megalite.models.windows import Windowed


class MixtralConfig(RoutedConfig, Windowed):
    family: Literal["mixtral"] = "mixtral"

    ROPE: ClassVar[rope.Names] = rope.Names(theta=1e6)


class Mixtral(Llama):
    config: MixtralConfig

    def layer(self, number: int) -> nn.Module:
        return RoutedLayer(self.config, Attention(self.config, number))


def weights(config: MixtralConfig) -> Iterator[Weight]:
    # w1 is the gate, w3 up, w2 down.
    yield from table(
        config, layer_table(config, mlp=expert_rows(config, "block_sparse_moe", "w1", "w3", "w2"))
    )


KEYS = ROUTED.but(
    used={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts_per_tok": 2,
    },
    only={"router_jitter_noise": 0.0},
)


def to_hf(config: MixtralConfig) -> dict[str, Any]:
    experts = routed_to_hf(config) | {"num_local_experts": config.num_experts}
    return (
        fields_to_hf(config, "MixtralForCausalLM")
        | experts
        | {"sliding_window": config.sliding_window}
    )


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    experts = routed_from_hf(hf, "num_local_experts", "num_experts", usual=8)
    return fields_from_hf(hf, MixtralConfig) | experts | {"sliding_window": hf["sliding_window"]}


MODEL, CONFIG = Mixtral, MixtralConfig
