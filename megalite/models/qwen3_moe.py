"""Qwen 3 with a mixture of experts (Yang et al. 2025), in all layers or among dense ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field, model_validator

from megalite.models.experts import ROUTED, RoutedConfig, RoutedLayer, expert_rows, routed_from_hf, routed_to_hf
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


class Qwen3MoeConfig(RoutedConfig):
    family: Literal["qwen3_moe"] = "qwen3_moe"
    moe_intermediate_size: int = Field(gt=0, description="Inner features of an expert; intermediate_size is dense.")
    norm_topk_prob: bool = Field(False, description="Have the weights of a token's experts add up to 1.")
    decoder_sparse_step: int = Field(1, gt=0, description="Every so many layers one has experts, the others are dense.")
    mlp_only_layers: tuple[int, ...] = Field((), description="Numbers of layers, from 0, that are dense in any case.")

    HEAD_NORMS: ClassVar[bool] = True

    @model_validator(mode="after")
    def _dense_layers_exist(self) -> Qwen3MoeConfig:
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_layers:
                last = self.num_layers - 1
                raise ValueError(
                    f"mlp_only_layers names layer {layer}; the {self.num_layers} layers have the numbers 0 to {last}"
                )
        return self

    @property
    def expert_inner(self) -> int:
        return self.moe_intermediate_size

    @property
    def renormalizes(self) -> bool:
        return self.norm_topk_prob

    def is_routed(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


class Qwen3Moe(Llama):
    config: Qwen3MoeConfig

    def layer(self, number: int) -> nn.Module:
        kind = RoutedLayer if self.config.is_routed(number) else Layer
        return kind(self.config, HeadNormAttention(self.config, number))


def weights(config: Qwen3MoeConfig) -> Iterator[Weight]:
    attention = attention_rows(config, norms=head_norm_rows(config))
    dense = layer_table(config, attention)
    routed = layer_table(config, attention, expert_rows(config, "mlp", "gate_proj", "up_proj", "down_proj"))

    def rows(layer: int) -> Sequence[Weight]:
        return routed if config.is_routed(layer) else dense

    yield from table(config, rows)


KEYS = ROUTED.but(
    used={
        "num_key_value_heads": 4,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
    },
    max_window_layers="a window is in all layers",
)


def to_hf(config: Qwen3MoeConfig) -> dict[str, Any]:
    return fields_to_hf(config, "Qwen3MoeForCausalLM") | routed_to_hf(config) | {
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": config.decoder_sparse_step,
        "mlp_only_layers": list(config.mlp_only_layers),
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf, Qwen3MoeConfig) | routed_from_hf(hf, "num_experts", "num_local_experts", usual=128) | {
        "moe_intermediate_size": hf["moe_intermediate_size"],
        "norm_topk_prob": hf["norm_topk_prob"],
        "decoder_sparse_step": hf["decoder_sparse_step"],
        "mlp_only_layers": hf["mlp_only_layers"] or (),
        "sliding_window": hf["sliding_window"] if hf["use_sliding_window"] else None,
    }  # fmt: skip


MODEL, CONFIG = Qwen3Moe, Qwen3MoeConfig
