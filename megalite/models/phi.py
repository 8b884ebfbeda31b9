"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023): GPT-NeoX's parallel attention and MLP behind one norm,
with partial RoPE, biases, also of the head, and dropout. Phi-3 and 4 are another family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field
from torch import Tensor

from megalite.models import rope
from megalite.models.dropout import Dropout
from megalite.models.llama import (
    LIKE_LLAMA,
    Biases,
    Names,
    Shared,
    attention_rows,
    fields_from_hf,
    fields_to_hf,
    norm_rows,
    table,
)
from megalite.models.ungated import (
    MLP,
    TANH,
    Dropping,
    DroppingAttention,
    DroppingDecoder,
    dropouts_from_hf,
    is_tanh,
    mlp_rows,
)
from megalite.models.weights import Weight


class PhiConfig(Dropping):
    family: Literal["phi"] = "phi"
    tanh_gelu: bool = Field(True, description="Use GELU's tanh approximation.")
    partial_rotary_factor: float = Field(
        0.5, gt=0, le=1, description="Share of each head that is rotated by RoPE."
    )

    NUM_NORMS: ClassVar[int] = 1
    ROPE: ClassVar[rope.Names] = rope.Names(share_key="partial_rotary_factor", share=0.5)

    @property
    def biases(self) -> Biases:
        return Biases(True, True, True)

    @property
    def rotary_size(self) -> int:
        """Return how many numbers of a head are rotated."""
        return int(self.head_size * self.partial_rotary_factor)


class Layer(nn.Module):
    """Pre-norm layer whose attention and MLP take the same normalized input."""

    def __init__(self, config: PhiConfig, number: int):
        super().__init__()
        site = f"layers.{number}"
        self.norm = config.NORM(config.hidden_size, config.norm_eps)
        self.attention = DroppingAttention(config, number)
        self.attention_dropout = Dropout(config.hidden_dropout, f"{site}.attention")
        self.mlp = MLP(config)
        self.mlp_dropout = Dropout(config.hidden_dropout, f"{site}.mlp")

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        normed, places = self.norm(x), shared.places
        attended = self.attention_dropout(self.attention(normed, shared), places)
        return x + attended + self.mlp_dropout(self.mlp(normed), places)


class Phi(DroppingDecoder):
    config: PhiConfig

    def __init__(self, config: PhiConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, number)


def weights(config: PhiConfig) -> Iterator[Weight]:
    """Yield the table of weights."""
    layer = (
        *norm_rows(config, "norm", "input_layernorm"),
        *attention_rows(config, hf_out="dense"),
        *mlp_rows(config, "mlp.fc1", "mlp.fc2"),
    )
    names = Names(norm="model.final_layernorm", head_bias="lm_head.bias")
    yield from table(config, layer, names)


KEYS = LIKE_LLAMA.but(
    used={
        "hidden_act": "gelu_new",
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": None,
        "embd_pdrop": 0.0,
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
    },
    only={"qk_layernorm": False},
    rms_norm_eps="which transformers does not read; it is layer_norm_eps",
)


def to_hf(config: PhiConfig) -> dict[str, Any]:
    values = fields_to_hf(config, "PhiForCausalLM", TANH[0] if config.tanh_gelu else "gelu")
    # All of its linear modules have biases, of which no key tells.
    del values["attention_bias"]
    return values | {
        "layer_norm_eps": values.pop("rms_norm_eps"),
        "partial_rotary_factor": config.partial_rotary_factor,
        "qk_layernorm": False,
        "embd_pdrop": config.embedding_dropout,
        "attention_dropout": config.attention_dropout,
        "resid_pdrop": config.hidden_dropout,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        **fields_from_hf(hf | {"rms_norm_eps": hf["layer_norm_eps"]}, PhiConfig),
        **dropouts_from_hf(hf, "embd_pdrop", "attention_dropout", "resid_pdrop"),
        "tanh_gelu": is_tanh(hf, "phi"),
        "partial_rotary_factor": rope.rotary_share(hf, PhiConfig.ROPE),
    }


MODEL, CONFIG = Phi, PhiConfig
