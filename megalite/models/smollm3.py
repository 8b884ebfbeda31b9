"""SmolLM 3 (Bakouch et al. 2025): Llama in which every fourth layer encodes no positions (NoPE, Kazemnejad et al.
2023). SmolLM 1 and 2 are Llama."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from megalite.models.hf import require
from megalite.models.llama import Llama, LlamaLike, fields_from_hf, fields_to_hf
from megalite.models.llama import weights as weights


class SmolLM3Config(LlamaLike):
    family: Literal["smollm3"] = "smollm3"
    nope_layers: tuple[int, ...] | None = Field(
        None, description="numbers of the layers that encode no positions, from 0; left out: every fourth"
    )

    @field_validator("nope_layers")
    @classmethod
    def _layers_exist(cls, layers: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        count = info.data.get("num_layers")
        if layers and count and not 0 <= min(layers) <= max(layers) < count:
            raise ValueError(f"the {count} layers have the numbers 0 to {count - 1}")
        return layers

    @property
    def without_positions(self) -> tuple[int, ...]:
        return tuple(range(3, self.num_layers, 4)) if self.nope_layers is None else self.nope_layers

    def turn(self, layer: int) -> int | None:
        return None if layer in self.without_positions else 0


def to_hf(config: SmolLM3Config) -> dict[str, Any]:
    turning = [int(layer not in config.without_positions) for layer in range(config.num_layers)]
    return fields_to_hf(config, "SmolLM3ForCausalLM") | {
        "mlp_bias": False,
        "no_rope_layers": turning,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * config.num_layers,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    require(hf, "smollm3", {"mlp_bias": False, "use_sliding_window": False})
    count, interval = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    turning = hf.get("no_rope_layers") or [(layer + 1) % interval for layer in range(count)]
    usual = {"rope_theta": 2_000_000.0, "tie_word_embeddings": True}
    return fields_from_hf(usual | hf, "smollm3") | {
        "nope_layers": [layer for layer in range(count) if not turning[layer]]
    }


MODEL, CONFIG = Llama, SmolLM3Config
