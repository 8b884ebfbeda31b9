"""Gemma 1 (Gemma Team 2024): Llama with GeGLU, norms that scale by 1 + weight, and embeddings
scaled by the root of their size. Gemma 2 and 3 grew out of it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megalite.models.hf import require
from megalite.models.layers import LayerNorm, OffsetRMSNorm, RMSNorm, SequenceInfo
from megalite.models.llama import LIKE_LLAMA, Llama, LlamaLike, fields_from_hf, fields_to_hf
from megalite.models.llama import weights as weights

GELU = "gelu_pytorch_tanh"


class GemmaConfig(LlamaLike):
    family: Literal["gemma"] = "gemma"
    tie_embeddings: bool = True

    GATE: ClassVar[Literal["silu", "gelu"]] = "gelu"
    NORM: ClassVar[type[RMSNorm] | type[LayerNorm]] = OffsetRMSNorm


class Gemma(Llama):
    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        """Look up embeddings, scaled by √hidden_size: [B,T,D]."""
        x_BTD = self.embedding(tokens_BT)
        # The factor is rounded to the weights' precision, as it was when Google trained them.
        return x_BTD * torch.tensor(self.config.hidden_size**0.5, dtype=x_BTD.dtype)


KEYS = LIKE_LLAMA.but(
    used={
        "num_key_value_heads": 16,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "hidden_act": GELU,
    },
    only={"hidden_activation": GELU, "use_bidirectional_attention": False},
)


def to_hf(config: GemmaConfig) -> dict[str, Any]:
    return fields_to_hf(config, "GemmaForCausalLM", GELU)


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["hidden_act"] != "gelu":  # which Google's files say for the approximation
        require(hf, "gemma", {"hidden_act": GELU})
    return fields_from_hf(hf, GemmaConfig) | {"head_dim": hf["head_dim"]}


MODEL, CONFIG = Gemma, GemmaConfig
