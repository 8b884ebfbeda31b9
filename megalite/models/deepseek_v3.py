"""DeepSeek-V3 (2024) and kin: latent attention, and many small experts that are chosen by sigmoid
scores with a bias, which balances their load, beside some that every token visits. The first layers
are dense. Behind the last one may be predictors of further tokens."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch.nn as nn
from pydantic import Field, model_validator
from torch import Tensor

from megalite.models.architecture import Architecture, LayerSpec
from megalite.models.experts import (
    ROUTED,
    RoutedConfig,
    RoutedLayer,
    expert_rows,
    routed_from_hf,
    routed_to_hf,
    shared_rows,
)
from megalite.models.hf import check_quantisation
from megalite.models.latent import LatentAttention, LatentConfig, latent_rows
from megalite.models.layers import SequenceInfo, numbered
from megalite.models.llama import (
    NAMES,
    Layer,
    Llama,
    fields_from_hf,
    fields_to_hf,
    layer_table,
    table,
)
from megalite.models.predictors import Predictor, predict_ahead, with_predictors
from megalite.models.weights import Weight


class DeepseekV3Config(RoutedConfig, LatentConfig):
    family: Literal["deepseek_v3"] = "deepseek_v3"
    moe_intermediate_size: int = Field(
        gt=0, description="Inner features of an expert; intermediate_size is dense."
    )
    n_shared_experts: int = Field(1, gt=0, description="Experts that every token visits.")
    n_group: int = Field(1, gt=0, description="Groups of experts.")
    topk_group: int = Field(1, gt=0, description="Groups of which a token may visit experts.")
    norm_topk_prob: bool = Field(
        True, description="Have the weights of a token's experts add up to 1."
    )
    routed_scaling_factor: float = Field(
        1.0, gt=0, description="Factor of the weights of a token's experts."
    )
    first_k_dense_replace: int = Field(
        0, ge=0, description="How many layers, the first ones, are dense."
    )
    router_aux_loss_coef: float = Field(
        0.0001, ge=0, description="Weight of the sequence-wise load-balancing loss."
    )
    router_bias_rate: float = Field(
        0.001,
        ge=0,
        description="How much a step moves the bias by which experts are chosen, up for those with fewer tokens of the "
        "global batch than the mean, down for the others. 0: not at all.",
    )
    num_nextn_predict_layers: int = Field(
        0,
        ge=0,
        le=8,
        description="Predictors of further tokens, a layer each behind the last one (multi-token prediction).",
    )
    mtp_loss_scaling_factor: float = Field(
        0.1, ge=0, description="Weight of the mean loss of these predictors."
    )

    @model_validator(mode="after")
    def _groups_come_out_even(self) -> DeepseekV3Config:
        if self.num_experts % self.n_group:
            raise ValueError(
                f"num_experts {self.num_experts} must be a multiple of n_group {self.n_group}"
            )
        size = self.num_experts // self.n_group
        if self.n_group > 1 and size < 2:
            raise ValueError(
                f"n_group {self.n_group} leaves a group {size} expert; transformers needs two"
            )
        if self.topk_group > self.n_group or self.experts_per_token > self.topk_group * size:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} do not fit into topk_group {self.topk_group} of n_group "
                f"{self.n_group} groups of {size} experts"
            )
        return self

    @model_validator(mode="after")
    def _predicts_tokens(self) -> DeepseekV3Config:
        if self.num_nextn_predict_layers and self.task != "causal":
            raise ValueError(
                f"num_nextn_predict_layers {self.num_nextn_predict_layers} needs task: causal, not {self.task}; 0 "
                "leaves the predictors out"
            )
        return self

    @classmethod
    def with_files(cls, fields: dict[str, Any], names: Container[str]) -> dict[str, Any]:
        """Return the fields with as many predictors as are stored: transformers saves their number
        in config.json, but not them."""
        count = num_stored(names, fields["num_layers"])
        return fields | {"num_nextn_predict_layers": count}

    def starts_of_spare(self, names: Container[str]) -> tuple[str, ...]:
        stored = num_stored(names, self.num_layers)
        # Predictors that are stored, and that this model was asked to leave out.
        spare = range(self.num_nextn_predict_layers, stored)
        return tuple(f"{NAMES.layers}.{self.num_layers + number}." for number in spare)

    def without_predictors(self) -> DeepseekV3Config:
        return self.model_copy(update={"num_nextn_predict_layers": 0})

    @property
    def predictor_weight(self) -> float:
        return self.mtp_loss_scaling_factor

    def describe(self) -> Architecture:
        numbers = range(self.num_layers, self.num_layers + self.num_nextn_predict_layers)
        # Three norms more: of what is joined, and before the head.
        predictors = tuple(
            LayerSpec(self.mixer(n), self.feed_forward(n), self.NUM_NORMS + 3, joins=True)
            for n in numbers
        )
        return replace(super().describe(), predictors=predictors)

    @property
    def expert_inner(self) -> int:
        return self.moe_intermediate_size

    @property
    def renormalizes(self) -> bool:
        return self.norm_topk_prob

    @property
    def scores_by(self) -> Literal["softmax", "sigmoid"]:
        return "sigmoid"

    @property
    def groups(self) -> tuple[int, int]:
        return self.n_group, self.topk_group

    @property
    def routed_scale(self) -> float:
        return self.routed_scaling_factor

    @property
    def bias_rate(self) -> float:
        return self.router_bias_rate

    @property
    def shared_inner(self) -> int:
        return self.n_shared_experts * self.moe_intermediate_size

    def is_routed(self, layer: int) -> bool:
        return layer >= self.first_k_dense_replace


def num_stored(names: Container[str], num_layers: int) -> int:
    """Return how many predictors are stored among tensors of these `names`."""
    count = 0
    # No other layer has this tensor, and each predictor does.
    while f"{NAMES.layers}.{num_layers + count}.eh_proj.weight" in names:
        count += 1
    return count


class DeepseekV3(Llama):
    config: DeepseekV3Config

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        # Anew, with the predictors behind the last layer: `run_layers` stops before these.
        every = range(config.num_layers + config.num_nextn_predict_layers)
        self.layers = numbered(self.layer(number) for number in every)

    def layer(self, number: int) -> nn.Module:
        attention = LatentAttention(self.config, number)
        if number >= self.config.num_layers:
            return Predictor(self.config, attention)
        # The first layers are dense MLPs of `intermediate_size`, the others experts.
        kind = RoutedLayer if self.config.is_routed(number) else Layer
        return kind(self.config, attention)

    def predict_ahead(
        self, states_BTD: Tensor, tokens_ABT: Tensor, places: SequenceInfo
    ) -> tuple[Tensor, ...]:
        return predict_ahead(self, states_BTD, tokens_ABT, places)


def weights(config: DeepseekV3Config) -> Iterator[Weight]:
    attention = latent_rows(config)
    experts = (*expert_rows(config), *shared_rows(config, "mlp.shared_experts"))
    dense, routed = layer_table(config, attention), layer_table(config, attention, experts)

    def rows(layer: int) -> Sequence[Weight]:
        return routed if config.is_routed(layer) else dense

    alone = table(config, rows)
    # A predictor has experts, even where all layers of the model are dense.
    yield from with_predictors(config, alone, routed, config.num_nextn_predict_layers)


KEYS = ROUTED.but(
    used={
        "num_key_value_heads": 128,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": None,
        "num_experts": None,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_head_dim": None,
        "rope_interleave": True,
        "router_aux_loss_coef": 0.0,
        "num_nextn_predict_layers": 0,
        "quantization_config": None,
    },
    only={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "ep_size": 1},
    num_mtp_layers="what transformers calls the predictors, which are those that are stored",
    aux_loss_alpha="of training",
    seq_aux="of training",
)

SAME = (
    "moe_intermediate_size", "n_shared_experts", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    "first_k_dense_replace", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "rope_interleave", "num_nextn_predict_layers",
)  # fmt: skip
"""Fields that config.json calls as they are called here."""


def to_hf(config: DeepseekV3Config) -> dict[str, Any]:
    return fields_to_hf(config, "DeepseekV3ForCausalLM") | routed_to_hf(config) | {
        "n_routed_experts": config.num_experts,
        # transformers makes its cosines for heads of this size.
        "head_dim": config.qk_rope_head_dim,
        **{name: getattr(config, name) for name in SAME},
    }  # fmt: skip


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    check_quantisation(
        hf, "deepseek_v3", {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    )
    experts = routed_from_hf(hf, "n_routed_experts", "num_local_experts", "num_experts", usual=256)
    values = fields_from_hf(
        hf | {"head_dim": hf["head_dim"] or hf["qk_rope_head_dim"]}, DeepseekV3Config
    )
    return values | experts | {name: hf[name] for name in SAME}


MODEL, CONFIG = DeepseekV3, DeepseekV3Config
