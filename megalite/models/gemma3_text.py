"""Gemma 3, the text models (Gemma Team 2025): Gemma 2 with normalised queries and keys instead of soft caps, and five
layers that look back over a window, their positions turning faster, to one that sees all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch.nn as nn
from pydantic import Field

from megalite.models import rope
from megalite.models.gemma2 import Gemma, GemmaLike, Layer, gemma_from_hf, gemma_to_hf, layer_rows
from megalite.models.hf import require
from megalite.models.layers import Places
from megalite.models.llama import HeadNormAttention, attention_rows, head_norm_rows, table
from megalite.models.weights import Weight
from megalite.models.windows import LayerType


class Gemma3TextConfig(GemmaLike):
    family: Literal["gemma3_text"] = "gemma3_text"
    rope_theta: float = Field(1_000_000.0, gt=0, description="of the layers that see all, as is `rope_scaling`")
    local_rope_theta: float = Field(10_000.0, gt=0, description="of the layers that look back over a window")

    def usual_type(self, layer: int) -> LayerType:
        return "sliding_attention" if (layer + 1) % 6 else "full_attention"

    def turn(self, layer: int) -> int | None:
        return 1 if self.types[layer] == "sliding_attention" else 0


class Gemma3Text(Gemma):
    config: Gemma3TextConfig

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, HeadNormAttention(self.config, number))

    def turns(self, places: Places) -> tuple[rope.Turn, ...]:
        c = self.config
        local = rope.turns(places.position_BT, c.rotary_size, c.local_rope_theta, None, places.length, c.max_positions)
        return *super().turns(places), local


def weights(config: Gemma3TextConfig) -> Iterator[Weight]:
    yield from table(config, layer_rows(config, attention_rows(config, norms=head_norm_rows(config))))


def to_hf(config: Gemma3TextConfig) -> dict[str, Any]:
    values = gemma_to_hf(config, "Gemma3ForCausalLM")
    # transformers 5 reads the nested form; transformers 4 and vLLM the keys beside it.
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    nested = {"full_attention": values["rope_parameters"], "sliding_attention": local}
    return values | {"rope_parameters": nested, "rope_local_base_freq": config.local_rope_theta}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    require(hf, "gemma3_text", {"attn_logit_softcapping": None})
    ropes = hf.get("rope_parameters") or {}
    usual = {"rope_theta": 1_000_000.0, "final_logit_softcapping": None}
    flat = {**usual, **hf, "rope_parameters": ropes.get("full_attention")}
    local = (ropes.get("sliding_attention") or {}).get("rope_theta", hf.get("rope_local_base_freq", 10_000.0))
    found = gemma_from_hf(flat, "gemma3_text") | {"local_rope_theta": local}
    if found["layer_types"] is None and (pattern := hf.get("sliding_window_pattern", 6)) != 6:
        layers = range(1, hf["num_hidden_layers"] + 1)
        found["layer_types"] = ["sliding_attention" if layer % pattern else "full_attention" for layer in layers]
    return found


MODEL, CONFIG = Gemma3Text, Gemma3TextConfig
