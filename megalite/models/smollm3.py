"""SmolLM 3 (Bakouch et al. 2025): Llama in which every fourth layer encodes no positions (NoPE,
Kazemnejad et al. 2023). SmolLM 1 and 2 are Llama."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from megalite.errors import ConfigError
from megalite.models import rope
from megalite.models.hf import disagree
from megalite.models.llama import LIKE_LLAMA, Llama, LlamaLike, fields_from_hf, fields_to_hf
from megalite.models.llama import weights as weights


class SmolLM3Config(LlamaLike):
    family: Literal["smollm3"] = "smollm3"
    nope_layers: tuple[int, ...] | None = Field(
        None,
        description="Numbers, from 0, of the layers that encode no positions. Every fourth where left out.",
    )

    ROPE: ClassVar[rope.Names] = rope.Names(theta=2_000_000.0)

    @field_validator("nope_layers")
    @classmethod
    def _layers_exist(
        cls, layers: tuple[int, ...] | None, info: ValidationInfo
    ) -> tuple[int, ...] | None:
        count = info.data.get("num_layers")
        if layers and count and not 0 <= min(layers) <= max(layers) < count:
            raise ValueError(f"the {count} layers have the numbers 0 to {count - 1}")
        return layers

    @property
    def without_positions(self) -> tuple[int, ...]:
        """Return the numbers of the layers that encode no positions."""
        return tuple(range(3, self.num_layers, 4)) if self.nope_layers is None else self.nope_layers

    def turn(self, layer: int) -> int | None:
        """Return 0, the model's only cos/sin tables; None for a layer that encodes no positions."""
        return None if layer in self.without_positions else 0


KEYS = LIKE_LLAMA.but(
    used={
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
        "layer_types": None,
    },
    sliding_window="read only with use_sliding_window",
    max_window_layers="of Qwen, and not read",
)


def to_hf(config: SmolLM3Config) -> dict[str, Any]:
    # Hugging Face's list says 1 where positions ARE encoded, for all its name (no_rope_layers).
    turning = [int(layer not in config.without_positions) for layer in range(config.num_layers)]
    return fields_to_hf(config, "SmolLM3ForCausalLM") | {
        "mlp_bias": False,
        "no_rope_layers": turning,
        "use_sliding_window": False,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    count, interval = hf["num_hidden_layers"], hf["no_rope_layer_interval"]
    if hf["layer_types"] and hf["layer_types"] != ["full_attention"] * count:
        disagree(
            f"layer_types = {hf['layer_types']}",
            f"num_hidden_layers = {count} and use_sliding_window = False",
        )
    turning = [int((layer + 1) % interval != 0) for layer in range(count)]
    if hf["no_rope_layers"] is not None:
        if (
            interval != KEYS.used["no_rope_layer_interval"]
            and hf["no_rope_layers"][:count] != turning
        ):
            disagree(
                f"no_rope_layers = {hf['no_rope_layers']}", f"no_rope_layer_interval = {interval}"
            )
        turning = hf["no_rope_layers"]
    if len(turning) < count:
        raise ConfigError(
            f"config.json has no_rope_layers = {turning} for num_hidden_layers = {count}"
        )
    return fields_from_hf(hf, SmolLM3Config) | {
        "nope_layers": [layer for layer in range(count) if not turning[layer]],
    }


MODEL, CONFIG = Llama, SmolLM3Config
