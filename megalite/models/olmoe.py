"""OLMoE (Muennighoff et al. 2024): a mixture of experts in every layer, whose queries and keys are
normalised over all heads, as OLMo 2's are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field, model_validator

from megalite.models.experts import (
    ROUTED,
    RoutedConfig,
    RoutedLayer,
    expert_rows,
    routed_from_hf,
    routed_to_hf,
)
from megalite.models.llama import (
    Llama,
    attention_rows,
    fields_from_hf,
    fields_to_hf,
    layer_table,
    table,
)
from megalite.models.olmo2 import Attention, projection_norms
from megalite.models.weights import Weight


class OlmoeConfig(RoutedConfig):
    family: Literal["olmoe"] = "olmoe"
    router_aux_loss_coef: float = Field(0.01, ge=0)
    norm_topk_prob: bool = Field(
        False, description="Have the weights of a token's experts add up to 1."
    )

    HEAD_NORMS: ClassVar[bool] = True
    HEADS_DIVIDE: ClassVar[bool] = True

    @model_validator(mode="after")
    def _heads_are_the_hidden_size(self) -> OlmoeConfig:
        if self.head_size * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim {self.head_dim}: transformers opens olmoe only with hidden_size / num_attention_heads = "
                f"{self.hidden_size // self.num_attention_heads}"
            )
        return self

    @property
    def renormalizes(self) -> bool:
        return self.norm_topk_prob


class Olmoe(Llama):
    config: OlmoeConfig

    def layer(self, number: int) -> nn.Module:
        return RoutedLayer(self.config, Attention(self.config, number))


def weights(config: OlmoeConfig) -> Iterator[Weight]:
    attention = attention_rows(config, norms=tuple(projection_norms(config)))
    yield from table(config, layer_table(config, attention, expert_rows(config)))


KEYS = ROUTED.but(
    used={
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.01,
        "norm_topk_prob": False,
    },
    only={"clip_qkv": None},
)


def to_hf(config: OlmoeConfig) -> dict[str, Any]:
    experts = routed_to_hf(config) | {
        "num_experts": config.num_experts,
        "norm_topk_prob": config.norm_topk_prob,
    }
    return fields_to_hf(config, "OlmoeForCausalLM") | experts


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    experts = routed_from_hf(hf, "num_experts", "num_local_experts", usual=64)
    return fields_from_hf(hf, OlmoeConfig) | experts | {"norm_topk_prob": hf["norm_topk_prob"]}


MODEL, CONFIG = Olmoe, OlmoeConfig
