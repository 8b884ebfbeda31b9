"""gpt-oss (OpenAI 2025): a mixture of experts with biases and a clamped GLU in every layer, and
attention whose heads have sinks, over a window in every other layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field
from torch import Tensor

from megalite.kernels.activation import clamped_glu
from megalite.kernels.attention_kinds import AttentionKind
from megalite.models import rope
from megalite.models.experts import ROUTED, RoutedConfig, RoutedLayer, routed_from_hf, routed_to_hf
from megalite.models.hf import check_quantisation
from megalite.models.llama import (
    Attention,
    Biases,
    Llama,
    attention_rows,
    fields_from_hf,
    fields_to_hf,
    layer_table,
    residual_std,
    table,
)
from megalite.models.weights import Weight
from megalite.models.windows import LayerType, WindowedByLayer


class GptOssConfig(RoutedConfig, WindowedByLayer):
    family: Literal["gpt_oss"] = "gpt_oss"
    sliding_window: int | None = Field(
        128, gt=0, description="Tokens that each token of every other layer attends to."
    )
    glu_alpha: float = Field(
        1.702, description="Factor of gates in the sigmoid of the experts' GLU."
    )
    glu_limit: float = Field(
        7.0, gt=0, description="Largest gate, and largest size of an up, in the experts' GLU."
    )

    HAS_BIASES: ClassVar[bool] = True
    ROPE: ClassVar[rope.Names] = rope.Names(theta=150_000.0)

    @property
    def biases(self) -> Biases:
        return Biases(qkv=True, out=True)

    def usual_type(self, layer: int) -> LayerType:
        return "full_attention" if layer % 2 else "sliding_attention"

    def attention(self, layer: int) -> AttentionKind:
        return replace(super().attention(layer), sinks=True)

    @property
    def expert_gate(self) -> Callable[[Tensor], Tensor]:
        return partial(clamped_glu, alpha=self.glu_alpha, limit=self.glu_limit)


class GptOss(Llama):
    config: GptOssConfig

    def layer(self, number: int) -> nn.Module:
        return RoutedLayer(self.config, Attention(self.config, number))


def weights(config: GptOssConfig) -> Iterator[Weight]:
    heads = config.num_attention_heads
    sinks = Weight(
        "attention.core.sinks",
        (heads,),
        ("self_attn.sinks",),
        "column",
        init=config.init_std,
        decay=False,
    )
    yield from table(
        config, layer_table(config, (*attention_rows(config), sinks), _expert_rows(config))
    )


def _expert_rows(config: GptOssConfig) -> tuple[Weight, ...]:
    """Return the rows of a router and its experts. A tensor has the matrices of all experts, [in,
    out]; gates and ups take turns."""
    experts, hidden, inner = config.num_experts, config.hidden_size, config.expert_inner
    used = config.experts_per_token / experts

    def bias(module: str, hf: str, size: int, unit: int) -> Weight:
        return Weight(
            f"mlp.experts.{module}.bias", (experts, size), (f"mlp.experts.{hf}_bias",), "column", unit=unit, stack=1,
            used=used, init="zeros", decay=False,
        )  # fmt: skip

    return (
        Weight(
            "mlp.router.weight", (experts, hidden), ("mlp.router.weight",), init=config.init_std,
            partial_grad="sequence",
        ),
        Weight(
            "mlp.router.logit_bias", (experts,), ("mlp.router.bias",), init="zeros", decay=False,
            partial_grad="sequence",
        ),
        Weight(
            # A unit is a gate and its up, which stand side by side: a tensor rank has both.
            "mlp.experts.gate_up.weight", (experts, 2 * inner, hidden), ("mlp.experts.gate_up_proj",), "column", unit=2,
            transpose=True, stack=1, used=used, init=config.init_std,
        ),
        bias("gate_up", "gate_up_proj", 2 * inner, 2),
        Weight(
            "mlp.experts.down.weight", (experts, hidden, inner), ("mlp.experts.down_proj",), "row", transpose=True,
            stack=1, used=used, init=residual_std(config),
        ),
        # Cut, although its matrix is row-parallel: each rank adds its own features to the sum.
        bias("down", "down_proj", hidden, 1),
    )  # fmt: skip


YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""The scaling of RoPE that transformers takes where config.json has none."""

KEYS = ROUTED.but(
    used={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "layer_types": None,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "quantization_config": None,
    },
    only={"attention_bias": True},
    initial_context_length="OpenAI's name for a key of rope_scaling",
    experts_per_token="OpenAI's name for num_experts_per_tok",
)


def to_hf(config: GptOssConfig) -> dict[str, Any]:
    experts = routed_to_hf(config) | {"num_local_experts": config.num_experts}
    fields = (
        fields_to_hf(config, "GptOssForCausalLM")
        | experts
        | {
            "attention_bias": True,
            "sliding_window": config.sliding_window,
            "layer_types": list(config.types),
            "swiglu_alpha": config.glu_alpha,
            "swiglu_limit": config.glu_limit,
        }
    )
    if config.rope_scaling is None:  # left out, it would be YaRN
        fields["rope_scaling"] = {"rope_type": "default"}
    return fields


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    check_quantisation(hf, "gpt_oss", {"quant_method": "mxfp4"})
    if hf["rope_scaling"] is None and hf["rope_parameters"] is None:
        hf = hf | {"rope_scaling": YARN}
    experts = routed_from_hf(hf, "num_local_experts", "num_experts", usual=128)
    return (
        fields_from_hf(hf, GptOssConfig)
        | experts
        | {
            "sliding_window": hf["sliding_window"],
            "layer_types": hf["layer_types"],
            "glu_alpha": hf["swiglu_alpha"],
            "glu_limit": hf["swiglu_limit"],
        }
    )


MODEL, CONFIG = GptOss, GptOssConfig
