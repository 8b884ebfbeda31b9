"""Mistral (Jiang et al. 2023): Llama with sliding-window attention."""

from __future__ import annotations

from typing import Any, Literal

from megalite.models.llama import LIKE_LLAMA, Llama, fields_from_hf, fields_to_hf
from megalite.models.llama import weights as weights
from megalite.models.windows import Windowed


class MistralConfig(Windowed):
    family: Literal["mistral"] = "mistral"


KEYS = LIKE_LLAMA.but(used={"num_key_value_heads": 8, "sliding_window": 4096})


def to_hf(config: MistralConfig) -> dict[str, Any]:
    return fields_to_hf(config, "MistralForCausalLM") | {"sliding_window": config.sliding_window}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf, MistralConfig) | {"sliding_window": hf["sliding_window"]}


MODEL, CONFIG = Llama, MistralConfig
