"""Gemma 3, the text models (Gemma Team 2025): Gemma 2 with normalised queries and keys instead of soft caps, and five
sliding-window layers, with a smaller RoPE theta, to one layer of full attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field

from megalite.errors import ConfigError
from megalite.models import rope
from megalite.models.gemma2 import GEMMA, Gemma, GemmaLike, Layer, gemma_from_hf, gemma_to_hf, layer_rows
from megalite.models.hf import agreed, at, disagree, refuse_others
from megalite.models.layers import SequenceInfo
from megalite.models.llama import HeadNormAttention, attention_rows, head_norm_rows, table
from megalite.models.weights import Weight
from megalite.models.windows import LayerType


class Gemma3TextConfig(GemmaLike):
    family: Literal["gemma3_text"] = "gemma3_text"
    rope_theta: float = Field(
        1_000_000.0, gt=0, description="RoPE base of full-attention layers; `rope_scaling` is for these, too."
    )
    local_rope_theta: float = Field(10_000.0, gt=0, description="RoPE base of sliding-window layers.")

    HEAD_NORMS: ClassVar[bool] = True
    ROPE: ClassVar[rope.Names] = rope.Names(
        kinds=("llama3", "linear", "longrope"), theta=1_000_000.0, new="rope_parameters.full_attention"
    )

    def usual_type(self, layer: int) -> LayerType:
        return "sliding_attention" if (layer + 1) % 6 else "full_attention"

    def turn(self, layer: int) -> int | None:
        """Return 1, the cos/sin tables of local layers, for a sliding-window layer; else 0."""
        return 1 if self.type_of(layer) == "sliding_attention" else 0


class Gemma3Text(Gemma):
    config: Gemma3TextConfig

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, HeadNormAttention(self.config, number))

    def rope_cos_sin(self, places: SequenceInfo) -> tuple[rope.CosSin, ...]:
        """Return two pairs of cos/sin tables: for layers of full attention, then for sliding-window layers."""
        c = self.config
        # Local layers have no scaling: a window never reaches further than was trained.
        local = rope.rope_cos_sin(
            places.position_BT, c.rotary_size, c.local_rope_theta, None, places.length, c.max_positions
        )
        return *super().rope_cos_sin(places), local


def weights(config: Gemma3TextConfig) -> Iterator[Weight]:
    yield from table(config, layer_rows(config, attention_rows(config, norms=head_norm_rows(config))))


KEYS = GEMMA.but(
    used={
        "final_logit_softcapping": None,
        "sliding_window_pattern": None,
        "rope_local_base_freq": None,
    },
    only={"attn_logit_softcapping": None, "original_max_position_embeddings": None},
    _sliding_window_pattern="transformers writes it and does not read it",
)
LAYER_TYPES = ("full_attention", "sliding_attention")


def to_hf(config: Gemma3TextConfig) -> dict[str, Any]:
    return gemma_to_hf(config, "Gemma3ForCausalLM") | {"rope_local_base_freq": config.local_rope_theta}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if at(hf, "rope_scaling.type") and not at(hf, "rope_scaling.rope_type"):
        raise ConfigError(
            "config.json has rope_scaling.type, which transformers does not read for Gemma 3: it is rope_type"
        )
    ropes, place = hf["rope_parameters"] or {}, "rope_parameters.sliding_attention"
    refuse_others(ropes, LAYER_TYPES, "rope_parameters", "Gemma 3, which has them by the type of the layer")
    local = ropes.get("sliding_attention") or {}
    refuse_others(local, ("rope_type", "type", "rope_theta"), place, "layers that look back over a window")
    if (kind := rope.kind_of(local, place)) != "default":
        raise ConfigError(f"config.json has {place}.rope_type = {kind!r}; the gemma3_text family supports 'default'")
    theta = agreed(hf, f"{place}.rope_theta", "rope_local_base_freq", default=10_000.0)
    return gemma_from_hf(hf, Gemma3TextConfig) | {"local_rope_theta": theta, "layer_types": _layer_types(hf)}


def _layer_types(hf: dict[str, Any]) -> list[str]:
    """Return the layer types as config.json lists them, or as its older key says: one of so many layers has full
    attention."""
    types, pattern = hf["layer_types"], hf["sliding_window_pattern"]
    layers = range(1, hf["num_hidden_layers"] + 1)
    usual = ["sliding_attention" if layer % (pattern or 6) else "full_attention" for layer in layers]
    if types and pattern and types != usual:
        disagree(f"layer_types = {types}", f"sliding_window_pattern = {pattern}")
    return types or usual


MODEL, CONFIG = Gemma3Text, Gemma3TextConfig
