"""OLMo 2 (OLMo et al. 2024): Llama that normalises the outputs of attention and MLP instead of
their inputs, and a token's queries of all heads, and its keys, each as one vector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn as nn
from torch import Tensor

from megalite.models import llama
from megalite.models.layers import RMSNorm
from megalite.models.llama import (
    Llama,
    LlamaLike,
    Shared,
    attention_rows,
    mlp_rows,
    norm_row,
    table,
)
from megalite.models.weights import Weight


class Olmo2Config(LlamaLike):
    family: Literal["olmo2"] = "olmo2"
    HEAD_NORMS: ClassVar[bool] = True


class Attention(llama.Attention):
    """Attention that normalises a token's queries of all heads as one vector, and so its keys."""

    def __init__(self, config: LlamaLike, layer: int):
        super().__init__(config, layer)
        self.q_norm = RMSNorm(config.num_attention_heads * config.head_size, config.norm_eps)
        self.k_norm = RMSNorm(config.kv_heads * config.head_size, config.norm_eps)

    def normalize(self, qkv: Tensor, heads: int, groups: int) -> Tensor:
        # A norm over all heads of a token: under tensor parallelism `FeatureCutRMSNorm` takes its
        # place, which sums the squares over the ranks.
        q, k, v = qkv.split([count * self.head_size for count in (heads, groups, groups)], dim=-1)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=-1)


class Layer(nn.Module):
    """Post-norm layer: the outputs of attention and MLP are normalised before they join the
    residual stream."""

    def __init__(self, config: LlamaLike, number: int):
        super().__init__()
        self.attention = Attention(config, number)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = llama.MLP(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        x = x + self.attention_norm(self.attention(x, shared))
        return x + self.mlp_norm(self.mlp(x))


class Olmo2(Llama):
    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, number)


def weights(config: Olmo2Config) -> Iterator[Weight]:
    layer = (
        *attention_rows(config, norms=tuple(projection_norms(config))),
        norm_row(config, "attention_norm", "post_attention_layernorm"),
        *mlp_rows(config),
        norm_row(config, "mlp_norm", "post_feedforward_layernorm"),
    )
    yield from table(config, layer)


def projection_norms(config: LlamaLike) -> Iterator[Weight]:
    """Yield the rows of the norms of queries and keys, which are cut over tensor ranks as the heads
    are."""
    for part, heads in (("q", config.num_attention_heads), ("k", config.kv_heads)):
        name, size = f"{part}_norm.weight", heads * config.head_size
        yield Weight(
            f"attention.{name}", (size,), (f"self_attn.{name}",), "column", unit=config.head_size, init="ones",
            decay=False,
        )  # fmt: skip


KEYS = llama.LIKE_LLAMA.but(used={"rms_norm_eps": 1e-5})


def to_hf(config: Olmo2Config) -> dict[str, Any]:
    return llama.fields_to_hf(config, "Olmo2ForCausalLM")


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return llama.fields_from_hf(hf, Olmo2Config)


MODEL, CONFIG = Olmo2, Olmo2Config
