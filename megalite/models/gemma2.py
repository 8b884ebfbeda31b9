"""Gemma 2 (Gemma Team 2024): norms before and after attention and MLP, GeGLU, scores and logits
limited by a tanh ("soft caps"), a sliding window in every second layer, and embeddings scaled by
the root of their size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field
from torch import Tensor

from megalite.kernels.attention_kinds import AttentionKind
from megalite.models.architecture import Architecture
from megalite.models.gemma import GELU, Gemma
from megalite.models.hf import agreed
from megalite.models.layers import LayerNorm, OffsetRMSNorm, RMSNorm
from megalite.models.llama import (
    LIKE_LLAMA,
    MLP,
    Attention,
    Shared,
    attention_rows,
    fields_from_hf,
    fields_to_hf,
    mlp_rows,
    norm_row,
    table,
)
from megalite.models.weights import Weight
from megalite.models.windows import LayerType, WindowedByLayer


class GemmaLike(WindowedByLayer):
    """Fields that Gemma 2 and 3 share."""

    tie_embeddings: bool = True
    query_pre_attn_scalar: int = Field(
        0, ge=0, description="Attention scores are divided by its square root. 0: the head size."
    )
    logit_softcap: float | None = Field(
        None, gt=0, description="Cap c of logits: c · tanh(logit / c)."
    )

    GATE: ClassVar[Literal["silu", "gelu"]] = "gelu"
    NORM: ClassVar[type[RMSNorm] | type[LayerNorm]] = OffsetRMSNorm
    NUM_NORMS: ClassVar[int] = 4
    HEADS_DIVIDE: ClassVar[bool] = True
    NEEDS_WINDOW: ClassVar[bool] = True

    def attention(self, layer: int) -> AttentionKind:
        # None is 1/√head_size, which megalite's own kernel computes; any other scale goes to
        # torch's.
        usual = self.query_pre_attn_scalar in (0, self.head_size)
        return AttentionKind(
            self.window(layer), scale=None if usual else self.query_pre_attn_scalar**-0.5
        )

    def describe(self) -> Architecture:
        return replace(super().describe(), logit_softcap=self.logit_softcap)


class Gemma2Config(GemmaLike):
    family: Literal["gemma2"] = "gemma2"
    attention_softcap: float | None = Field(
        None, gt=0, description="Cap c of attention scores: c · tanh(score / c)."
    )

    def usual_type(self, layer: int) -> LayerType:
        return "full_attention" if layer % 2 else "sliding_attention"

    def attention(self, layer: int) -> AttentionKind:
        kind = super().attention(layer)
        return AttentionKind(kind.window, self.attention_softcap, kind.scale)


class Layer(nn.Module):
    """Layer with norms before and after attention and MLP."""

    def __init__(self, config: GemmaLike, attention: Attention):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm = OffsetRMSNorm(size, eps)
        self.attention = attention
        self.attention_out_norm = OffsetRMSNorm(size, eps)
        self.mlp_norm = OffsetRMSNorm(size, eps)
        self.mlp = MLP(config)
        self.mlp_out_norm = OffsetRMSNorm(size, eps)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        # Sandwich norms: what attention and MLP return is normalized before it joins the stream.
        attended = self.attention_out_norm(self.attention(self.attention_norm(x), shared))
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp_out_norm(self.mlp(normed))


class Gemma2(Gemma):
    config: GemmaLike

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, Attention(self.config, number))

    def project(self, x_BTD: Tensor) -> Tensor:
        """Return logits [B,T,V], with Gemma's soft cap."""
        # Element by element, so that it works on a tensor rank's columns of the vocabulary as well.
        logits, cap = super().project(x_BTD), self.config.logit_softcap
        return logits if cap is None else (logits / cap).tanh() * cap


def weights(config: Gemma2Config) -> Iterator[Weight]:
    yield from table(config, layer_rows(config, attention_rows(config)))


def layer_rows(config: GemmaLike, attention: Sequence[Weight]) -> tuple[Weight, ...]:
    """Return the rows of one Gemma layer, given those of its `attention`."""
    return (
        norm_row(config, "attention_norm", "input_layernorm"),
        *attention,
        norm_row(config, "attention_out_norm", "post_attention_layernorm"),
        norm_row(config, "mlp_norm", "pre_feedforward_layernorm"),
        *mlp_rows(config),
        norm_row(config, "mlp_out_norm", "post_feedforward_layernorm"),
    )


GEMMA = LIKE_LLAMA.but(
    used={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
    },
    only={"hidden_activation": GELU, "hidden_act": GELU, "use_bidirectional_attention": False},
)
KEYS = GEMMA.but(
    used={
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window_size": None,
    }
)


def to_hf(config: Gemma2Config) -> dict[str, Any]:
    return gemma_to_hf(config, "Gemma2ForCausalLM") | {
        "attn_logit_softcapping": config.attention_softcap
    }


def gemma_to_hf(config: GemmaLike, architecture: str) -> dict[str, Any]:
    """Return the keys of config.json that Gemma 2 and 3 share."""
    values = fields_to_hf(config, architecture, GELU) | {
        "hidden_activation": GELU,
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_size,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.types),
        "final_logit_softcapping": config.logit_softcap,
        "use_bidirectional_attention": False,
    }
    # Gemma's key is hidden_activation; both would be two sources of one fact.
    del values["hidden_act"]
    return values


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    agreed(hf, "sliding_window", default=None, copies=("sliding_window_size",))
    return gemma_from_hf(hf, Gemma2Config) | {"attention_softcap": hf["attn_logit_softcapping"]}


def gemma_from_hf(hf: dict[str, Any], config: type[GemmaLike]) -> dict[str, Any]:
    """Return the fields of the `model:` section that Gemma 2 and 3 share."""
    return fields_from_hf(hf, config) | {
        "head_dim": hf["head_dim"],
        "query_pre_attn_scalar": hf["query_pre_attn_scalar"],
        "sliding_window": hf["sliding_window"],
        "layer_types": hf["layer_types"],
        "logit_softcap": hf["final_logit_softcapping"],
    }


MODEL, CONFIG = Gemma2, Gemma2Config
