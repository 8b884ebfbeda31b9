"""mT5 (Xue et al. 2021): T5 1.1 for many languages, whose head is never scaled."""

from __future__ import annotations

from typing import Any, Literal

from megalite.models.t5 import KEYS as T5_KEYS
from megalite.models.t5 import T5, T5Config, fields_from_hf, fields_to_hf
from megalite.models.t5 import weights as weights


class MT5Config(T5Config):
    family: Literal["mt5"] = "mt5"  # type: ignore[assignment]
    scale_head: Literal[False] = False


KEYS = T5_KEYS.but(used={"feed_forward_proj": "gated-gelu"}, only={"scale_decoder_outputs": False})


def to_hf(config: MT5Config) -> dict[str, Any]:
    return fields_to_hf(config, "MT5ForConditionalGeneration") | {
        "tie_word_embeddings": config.tie_embeddings
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf, MT5Config)


MODEL, CONFIG = T5, MT5Config
