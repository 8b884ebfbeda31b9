"""What decoders share whose MLP has no gate: GPT-NeoX, StarCoder 2, Phi and Falcon. They are Llama
otherwise, with LayerNorm, and biases in some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from megalite.kernels.activation import gelu
from megalite.models.architecture import Architecture, FeedForwardSpec, MixerSpec
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.hf import require
from megalite.models.layers import LayerNorm, RMSNorm, SequenceInfo
from megalite.models.llama import Attention, Llama, LlamaLike, residual_std, row_bias
from megalite.models.weights import Weight

TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Names that transformers has for GELU's tanh approximation."""


class Ungated(LlamaLike):
    """Fields of decoders without a gate."""

    tanh_gelu: bool = Field(False, description="Use GELU's tanh approximation.")

    NORM: ClassVar[type[RMSNorm] | type[LayerNorm]] = LayerNorm

    def feed_forward(self, layer: int) -> FeedForwardSpec:
        return FeedForwardSpec(inner=self.intermediate_size, gated=False, activation="gelu")


class MLP(nn.Module):
    def __init__(self, config: Ungated):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.biases.mlp)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.biases.mlp)
        self.activation = gelu if config.tanh_gelu else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_and_down_proj(self.up(x))

    def activation_and_down_proj(self, up: Tensor) -> Tensor:
        """Apply the activation and the down projection; recomputed as one under `train.recompute:
        selective`."""
        return self.down(self.activation(up))


def mlp_rows(config: Ungated, up: str, down: str) -> tuple[Weight, ...]:
    """Return the rows of the MLP, whose modules Hugging Face calls `up` and `down`."""
    hidden, inner, biased = config.hidden_size, config.intermediate_size, config.biases.mlp
    bias = Weight("mlp.up.bias", (inner,), (f"{up}.bias",), "column", init="zeros", decay=False)
    return (
        Weight("mlp.up.weight", (inner, hidden), (f"{up}.weight",), "column", init=config.init_std),
        *[bias] * biased,
        Weight(
            "mlp.down.weight",
            (hidden, inner),
            (f"{down}.weight",),
            "row",
            init=residual_std(config),
        ),
        *[row_bias("mlp.down", down, hidden)] * biased,
    )


def attention_rows(config: Ungated, qkv: str, out: str) -> tuple[Weight, ...]:
    """Return the rows of attention, of whose `qkv` Hugging Face stores the queries of heads that
    share a key, the key and the value before those of the next. `qkv` and `out` are its names of
    the modules."""
    q, kv = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    hidden = config.hidden_size
    unit, parts, name = config.head_size, (q, kv, kv), "attention.qkv"
    # Not three tensors: `by_unit` says in which order the one has their rows.
    matrix = Weight(
        f"{name}.weight", (sum(parts), hidden), (f"{qkv}.weight",), "column", parts, unit, by_unit=True,
        init=config.init_std,
    )  # fmt: skip
    bias = replace(
        matrix,
        name=f"{name}.bias",
        shape=matrix.shape[:1],
        hf=(f"{qkv}.bias",),
        init="zeros",
        decay=False,
    )
    return (
        matrix,
        *[bias] * config.biases.qkv,
        Weight(
            "attention.out.weight",
            (hidden, q),
            (f"{out}.weight",),
            "row",
            unit=unit,
            init=residual_std(config),
        ),
        *[row_bias("attention.out", out, hidden)] * config.biases.out,
    )


class Dropping(Ungated):
    """Fields of decoders without a gate that were trained with dropout."""

    embedding_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the embeddings.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of attention's weights.")
    hidden_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of what attention and the MLP give."
    )

    def mixer(self, layer: int) -> MixerSpec:
        return replace(super().mixer(layer), dropout=self.attention_dropout)  # type: ignore[type-var]

    def describe(self) -> Architecture:
        return replace(super().describe(), hidden_dropout=self.hidden_dropout)


class DroppingAttention(Attention):
    """Attention that drops some of its probabilities."""

    def __init__(self, config: Dropping, layer: int):
        super().__init__(config, layer)
        dropout = Dropout(
            config.attention_dropout, f"layers.{layer}.attention.probabilities", over_heads=True
        )
        self.core = CoreAttention(dropout, config.attention(layer))


class DroppingDecoder(Llama):
    INPUT = ("embedding", "dropout")
    config: Dropping

    def __init__(self, config: Dropping):
        super().__init__(config)
        self.dropout = Dropout(config.embedding_dropout, "embedding")

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        return self.dropout(self.embedding(tokens_BT), places)


def dropouts_from_hf(
    hf: dict[str, Any], embedding: str, attention: str, hidden: str
) -> dict[str, Any]:
    """Return the fields of the `model:` section of `Dropping`, from these keys of config.json."""
    return {
        "embedding_dropout": hf[embedding],
        "attention_dropout": hf[attention] or 0.0,
        "hidden_dropout": hf[hidden],
    }


def is_tanh(hf: dict[str, Any], family: str, key: str = "hidden_act") -> bool:
    """Return whether the activation at `key` of config.json is GELU's tanh approximation. Raises
    ConfigError where it is no GELU."""
    if hf[key] not in ("gelu", *TANH):
        require(hf, family, {key: "gelu"})
    return hf[key] in TANH
