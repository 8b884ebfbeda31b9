"""Falcon (Almazrouei et al. 2023): attention and MLP in parallel on one residual stream, one
key/value head for all queries, or for a group of them, and LayerNorm. Falcon 3 calls itself
llama."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch.nn as nn
from pydantic import Field, model_validator
from torch import Tensor

from megalite.errors import ConfigError
from megalite.models import rope
from megalite.models.architecture import Architecture
from megalite.models.hf import REQUIRED, Keys, agreed, require
from megalite.models.llama import Attention, Biases, Llama, Names, Shared, norm_rows, table
from megalite.models.ungated import MLP, TANH, Ungated, attention_rows, is_tanh, mlp_rows
from megalite.models.weights import Weight


class FalconConfig(Ungated):
    family: Literal["falcon"] = "falcon"
    tie_embeddings: bool = True
    use_bias: bool = Field(False, description="Give linear modules biases.")
    norms: Literal[1, 2] = Field(
        1,
        description="Norms of a layer. 1: attention and MLP share one; 2: each has one of its own (Falcon-40B).",
    )

    @model_validator(mode="after")
    def _heads_fill_a_token(self) -> FalconConfig:
        if self.head_size * self.num_attention_heads != self.hidden_size:
            raise ValueError("falcon has no head_dim of its own: its heads fill a token together")
        return self

    @property
    def biases(self) -> Biases:
        return Biases(self.use_bias, self.use_bias, self.use_bias)

    def describe(self) -> Architecture:
        found = super().describe()
        return replace(
            found, layers=tuple(replace(layer, num_norms=self.norms) for layer in found.layers)
        )


class Layer(nn.Module):
    """Pre-norm layer whose attention and MLP stand side by side."""

    def __init__(self, config: FalconConfig, number: int):
        super().__init__()
        self.attention_norm = config.NORM(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, number)
        self.mlp_norm = (
            config.NORM(config.hidden_size, config.norm_eps) if config.norms == 2 else None
        )
        self.mlp = MLP(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        normed = self.attention_norm(x)
        to_mlp = self.mlp_norm(x) if self.mlp_norm else normed
        return x + self.attention(normed, shared) + self.mlp(to_mlp)


class Falcon(Llama):
    config: FalconConfig

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, number)


def weights(config: FalconConfig) -> Iterator[Weight]:
    """Yield the table of weights."""
    both = config.norms == 2
    layer = (
        # The one norm of smaller models and the two of Falcon-40B have other names in files.
        *norm_rows(config, "attention_norm", "ln_attn" if both else "input_layernorm"),
        *attention_rows(config, "self_attention.query_key_value", "self_attention.dense"),
        *(norm_rows(config, "mlp_norm", "ln_mlp") if both else ()),
        *mlp_rows(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
    yield from table(
        config, layer, Names("transformer.word_embeddings", "transformer.h", "transformer.ln_f")
    )


KEYS = Keys().but(
    used={
        "vocab_size": REQUIRED,
        "hidden_size": None,
        "n_embed": None,
        "ffn_hidden_size": None,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "num_kv_heads": None,
        "max_position_embeddings": 2048,
        "original_max_position_embeddings": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "activation": "gelu",
        "bias": False,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": None,
    },
    only={
        "alibi": False,
        "parallel_attn": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
)


def to_hf(config: FalconConfig) -> dict[str, Any]:
    # transformers knows groups of heads, and two norms, of the new architecture only.
    new = config.norms == 2 or config.kv_heads not in (1, config.num_attention_heads)
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_kv_heads": config.kv_heads,
        "max_position_embeddings": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "activation": TANH[0] if config.tanh_gelu else "gelu",
        "bias": config.use_bias,
        "alibi": False,
        "parallel_attn": True,
        "multi_query": config.kv_heads == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": config.norms if new else None,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **rope.to_hf(FalconConfig.ROPE, config.rope_theta, config.rope_scaling),
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    new, heads = hf["new_decoder_architecture"], hf["num_attention_heads"]
    # Files of the old architecture say by multi_query alone how many key/value heads there are.
    kv_heads = hf["num_kv_heads"] or heads
    if not new and hf["multi_query"]:
        kv_heads = 1
    elif not new:
        require(hf, "falcon", {"num_kv_heads": heads})
    norms = hf["num_ln_in_parallel_attn"] or (2 if new else 1)
    if not new and norms != 1:
        raise ConfigError(
            f"config.json has num_ln_in_parallel_attn = {norms}, which needs new_decoder_architecture = true"
        )
    hidden = agreed(hf, "n_embed", "hidden_size")
    return {
        "family": "falcon",
        "vocab_size": hf["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": hf["ffn_hidden_size"] or 4 * hidden,
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf["layer_norm_epsilon"],
        "init_std": hf["initializer_range"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "tanh_gelu": is_tanh(hf, "falcon", "activation"),
        "use_bias": bool(hf["bias"]),
        "norms": norms,
        **rope.from_hf(hf, "falcon", FalconConfig.ROPE),
    }


MODEL, CONFIG = Falcon, FalconConfig
