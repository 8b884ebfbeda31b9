"""Ministral (Mistral AI 2024): Mistral whose layers differ in whether they look back over a
window."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from megalite.models.llama import LIKE_LLAMA, Llama, fields_from_hf, fields_to_hf
from megalite.models.llama import weights as weights
from megalite.models.windows import WindowedByLayer


class MinistralConfig(WindowedByLayer):
    family: Literal["ministral"] = "ministral"

    NEEDS_WINDOW: ClassVar[bool] = True


KEYS = LIKE_LLAMA.but(used={"num_key_value_heads": 8, "sliding_window": 4096, "layer_types": None})


def to_hf(config: MinistralConfig) -> dict[str, Any]:
    windows = {"sliding_window": config.sliding_window, "layer_types": list(config.types)}
    return fields_to_hf(config, "MinistralForCausalLM") | windows


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    windows = {"sliding_window": hf["sliding_window"], "layer_types": hf["layer_types"]}
    return fields_from_hf(hf, MinistralConfig) | windows


MODEL, CONFIG = Llama, MinistralConfig
