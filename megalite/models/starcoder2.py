"""StarCoder 2 (Lozhkov et al. 2024): Llama with LayerNorm, an MLP without a gate, biases, a sliding
window and dropout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch.nn as nn
from pydantic import Field
from torch import Tensor

from megalite.models.dropout import Dropout
from megalite.models.llama import (
    LIKE_LLAMA,
    Biases,
    Shared,
    fields_from_hf,
    fields_to_hf,
    layer_table,
    table,
)
from megalite.models.ungated import (
    MLP,
    Dropping,
    DroppingAttention,
    DroppingDecoder,
    dropouts_from_hf,
    is_tanh,
    mlp_rows,
)
from megalite.models.weights import Weight
from megalite.models.windows import Windowed

GELU = "gelu_pytorch_tanh"


class Starcoder2Config(Dropping, Windowed):
    family: Literal["starcoder2"] = "starcoder2"
    tie_embeddings: bool = True
    tanh_gelu: bool = Field(True, description="Use GELU's tanh approximation.")
    use_bias: bool = Field(True, description="Give linear modules biases.")

    @property
    def biases(self) -> Biases:
        return Biases(self.use_bias, self.use_bias, self.use_bias)


class Layer(nn.Module):
    """Pre-norm layer: attention, then MLP, each added to the residual stream after dropout."""

    def __init__(self, config: Starcoder2Config, number: int):
        super().__init__()
        site = f"layers.{number}"
        self.attention_norm = config.NORM(config.hidden_size, config.norm_eps)
        self.attention = DroppingAttention(config, number)
        self.attention_dropout = Dropout(config.hidden_dropout, f"{site}.attention")
        self.mlp_norm = config.NORM(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_dropout = Dropout(config.hidden_dropout, f"{site}.mlp")

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        places = shared.places
        attended = self.attention_dropout(self.attention(self.attention_norm(x), shared), places)
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp_dropout(self.mlp(normed), places)


class Starcoder2(DroppingDecoder):
    config: Starcoder2Config

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, number)


def weights(config: Starcoder2Config) -> Iterator[Weight]:
    yield from table(config, layer_table(config, mlp=mlp_rows(config, "mlp.c_fc", "mlp.c_proj")))


_UNREAD = "which transformers does not read"
KEYS = LIKE_LLAMA.but(
    used={
        "num_key_value_heads": 2,
        "hidden_act": GELU,
        "norm_epsilon": 1e-5,
        "initializer_range": 0.018042,
        "tie_word_embeddings": True,
        "sliding_window": None,
        "use_bias": True,
        "embedding_dropout": 0.0,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    only={"scale_attn_weights": True, "mlp_type": "default", "norm_type": "layer_norm"},
    rms_norm_eps=f"{_UNREAD}; it is norm_epsilon",
    layer_norm_epsilon=f"{_UNREAD}; it is norm_epsilon",
    activation_function=f"{_UNREAD}; it is hidden_act",
    attention_softmax_in_fp32="the precision of the scores in half precision",
    scale_attention_softmax_in_fp32="the precision of the scores in half precision",
)


def to_hf(config: Starcoder2Config) -> dict[str, Any]:
    values = fields_to_hf(config, "Starcoder2ForCausalLM", GELU if config.tanh_gelu else "gelu")
    # `use_bias` says it.
    del values["attention_bias"]
    return values | {
        "norm_epsilon": values.pop("rms_norm_eps"),
        "sliding_window": config.sliding_window,
        "use_bias": config.use_bias,
        "embedding_dropout": config.embedding_dropout,
        "attention_dropout": config.attention_dropout,
        "residual_dropout": config.hidden_dropout,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        **fields_from_hf(hf | {"rms_norm_eps": hf["norm_epsilon"]}, Starcoder2Config),
        **dropouts_from_hf(hf, "embedding_dropout", "attention_dropout", "residual_dropout"),
        "tanh_gelu": is_tanh(hf, "starcoder2"),
        "sliding_window": hf["sliding_window"],
        "use_bias": hf["use_bias"],
    }


MODEL, CONFIG = Starcoder2, Starcoder2Config
