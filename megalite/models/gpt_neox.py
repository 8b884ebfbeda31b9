"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023): Llama's attention with partial
RoPE, LayerNorm, GELU, biases, and attention and MLP in parallel on one residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field, model_validator
from torch import Tensor

from megalite.models import rope
from megalite.models.hf import SIZES, Keys, require
from megalite.models.layers import LayerNorm
from megalite.models.llama import Attention, Biases, Llama, Names, Shared, norm_rows, table
from megalite.models.ungated import MLP, Ungated, attention_rows, is_tanh, mlp_rows
from megalite.models.weights import Weight


class GPTNeoXConfig(Ungated):
    family: Literal["gpt_neox"] = "gpt_neox"
    rotary_pct: float = Field(
        0.25, gt=0, le=1, description="Share of each head that is rotated by RoPE."
    )
    parallel_residual: bool = Field(
        True,
        description="Attention and MLP take the same input. false: the MLP comes after attention.",
    )

    ROPE: ClassVar[rope.Names] = rope.Names(
        theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25
    )

    @model_validator(mode="after")
    def _plain_heads(self) -> GPTNeoXConfig:
        if (
            self.kv_heads != self.num_attention_heads
            or self.head_size * self.num_attention_heads != self.hidden_size
        ):
            raise ValueError(
                "gpt_neox has as many num_kv_heads as num_attention_heads, and together they fill a token"
            )
        return self

    @property
    def rotary_size(self) -> int:
        """Return how many numbers of a head are rotated."""
        # Rounded down, as in transformers.
        return int(self.head_size * self.rotary_pct)

    @property
    def biases(self) -> Biases:
        return Biases(True, True, True)


class Layer(nn.Module):
    """Pre-norm layer whose attention and MLP take the same input, or where `parallel_residual` is
    off, one after the other."""

    def __init__(self, config: GPTNeoXConfig, number: int):
        super().__init__()
        self.parallel = config.parallel_residual
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, number)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.attention(self.attention_norm(x), shared)
        if self.parallel:
            # Both read the same x, so there is no sum between them to fuse a norm with.
            return x + attended + self.mlp(self.mlp_norm(x))
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp(normed)


class GPTNeoX(Llama):
    config: GPTNeoXConfig

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, number)


def weights(config: GPTNeoXConfig) -> Iterator[Weight]:
    """Yield the table of weights."""
    layer = (
        *norm_rows(config, "attention_norm", "input_layernorm"),
        *attention_rows(config, "attention.query_key_value", "attention.dense"),
        *norm_rows(config, "mlp_norm", "post_attention_layernorm"),
        *mlp_rows(config, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
    yield from table(config, layer, NAMES)


NAMES = Names("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm", "embed_out")
KEYS = Keys().but(
    used={
        **SIZES,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "gelu",
        "original_max_position_embeddings": None,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "rotary_pct": None,
        "rotary_emb_base": None,
        "partial_rotary_factor": None,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": None,
    },
    only={
        "attention_bias": True,
        "attention_dropout": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout": 0.0,
        "hidden_dropout_prob": 0.0,
    },
)


def to_hf(config: GPTNeoXConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": "gelu_new" if config.tanh_gelu else "gelu",
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **rope.to_hf(config.ROPE, config.rope_theta, config.rope_scaling, config.rotary_pct),
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    # transformers ignores both, so only what it computes all the same may stand there.
    for key, value in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
        require(hf, "gpt_neox", {key: value})
    return {
        "family": "gpt_neox",
        "vocab_size": hf["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf["layer_norm_eps"],
        "init_std": hf["initializer_range"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "parallel_residual": hf["use_parallel_residual"],
        "tanh_gelu": is_tanh(hf, "gpt_neox"),
        "rotary_pct": rope.rotary_share(hf, GPTNeoXConfig.ROPE),
        **rope.from_hf(hf, "gpt_neox", GPTNeoXConfig.ROPE),
    }


MODEL, CONFIG = GPTNeoX, GPTNeoXConfig
