"""Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases in the projection of queries, keys and
values."""

from __future__ import annotations

from typing import Any, Literal

from megalite.models.llama import Biases, Llama, fields_from_hf, fields_to_hf
from megalite.models.llama import weights as weights
from megalite.models.windows import QWEN, WindowedByLayer, qwen_from_hf, qwen_to_hf


class Qwen2Config(WindowedByLayer):
    family: Literal["qwen2"] = "qwen2"

    @property
    def biases(self) -> Biases:
        return Biases(qkv=True)


KEYS = QWEN.but(attention_bias="queries, keys and values have biases, whatever it says")


def to_hf(config: Qwen2Config) -> dict[str, Any]:
    values = fields_to_hf(config, "Qwen2ForCausalLM") | qwen_to_hf(config)
    del values["attention_bias"]  # it is part of the family
    return values


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf, Qwen2Config) | qwen_from_hf(hf)


MODEL, CONFIG = Llama, Qwen2Config
