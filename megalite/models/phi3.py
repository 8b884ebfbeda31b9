"""Phi-3 and 4 (Abdin et al. 2024): Llama with a sliding window, whose heads may turn in part; Hugging Face stores its
projections fused, as megalite holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from megalite.models import rope
from megalite.models.hf import require
from megalite.models.llama import Llama, attention_rows, fields_from_hf, fields_to_hf, layer_table, mlp_rows, table
from megalite.models.weights import Weight
from megalite.models.windows import Windowed


class Phi3Config(Windowed):
    family: Literal["phi3"] = "phi3"
    partial_rotary_factor: float = Field(1.0, gt=0, le=1, description="share of each head that turns")

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.partial_rotary_factor)


def weights(config: Phi3Config) -> Iterator[Weight]:
    layer = layer_table(config, attention_rows(config, ("qkv_proj",)), mlp_rows(config, ("gate_up_proj",)))
    yield from table(config, layer)


def to_hf(config: Phi3Config) -> dict[str, Any]:
    values = fields_to_hf(config, "Phi3ForCausalLM") | {"sliding_window": config.sliding_window}
    values |= rope.to_hf(config.rope_theta, config.rope_scaling, partial_rotary_factor=config.partial_rotary_factor)
    original = (values["rope_scaling"] or {}).get("original_max_position_embeddings", config.max_positions)
    return values | {"original_max_position_embeddings": original, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    require(hf, "phi3", {"resid_pdrop": 0.0, "embd_pdrop": 0.0})
    rotary = (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    found = {"sliding_window": hf.get("sliding_window"), "partial_rotary_factor": rotary}
    return fields_from_hf(hf, "phi3") | found


MODEL, CONFIG = Llama, Phi3Config
