"""Granite 3 (IBM 2024): Llama with factors of its embeddings, attention scores, residual sums and
logits."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn as nn
from pydantic import Field
from torch import Tensor

from megalite.kernels.attention_kinds import AttentionKind
from megalite.models import llama
from megalite.models.layers import SequenceInfo
from megalite.models.llama import (
    WITH_BIASES,
    Attention,
    Biased,
    Llama,
    Shared,
    biased_from_hf,
    biased_to_hf,
)
from megalite.models.llama import weights as weights


class GraniteConfig(Biased):
    family: Literal["granite"] = "granite"
    embedding_multiplier: float = Field(1.0, gt=0, description="Factor of the embeddings.")
    attention_multiplier: float = Field(
        1.0, gt=0, description="Factor of attention scores, instead of 1/√head_dim."
    )
    residual_multiplier: float = Field(
        1.0, gt=0, description="Factor of what attention and MLP add."
    )
    logits_scaling: float = Field(1.0, gt=0, description="Number that logits are divided by.")

    def attention(self, layer: int) -> AttentionKind:
        return AttentionKind(self.window(layer), scale=self.attention_multiplier)


class Layer(llama.Layer):
    """Layer whose additions to the residual stream have a factor."""

    def __init__(self, config: GraniteConfig, attention: nn.Module):
        super().__init__(config, attention)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.attention(self.attention_norm(x), shared) * self.multiplier
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp(normed) * self.multiplier


class Granite(Llama):
    config: GraniteConfig

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, Attention(self.config, number))

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        return self.embedding(tokens_BT) * self.config.embedding_multiplier

    def finish(self, x_BTD: Tensor) -> Tensor:
        # Divided before the head, which is linear: the logits may then be computed in chunks.
        return super().finish(x_BTD) / self.config.logits_scaling


MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
KEYS = WITH_BIASES.but(used=dict.fromkeys(MULTIPLIERS, 1.0))


def to_hf(config: GraniteConfig) -> dict[str, Any]:
    return biased_to_hf(config, "GraniteForCausalLM") | {
        name: getattr(config, name) for name in MULTIPLIERS
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return biased_from_hf(hf, GraniteConfig) | {name: hf[name] for name in MULTIPLIERS}


MODEL, CONFIG = Granite, GraniteConfig
