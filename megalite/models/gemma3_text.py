"""Gemma 3, the text models (Gemma Team 2025): Gemma 2 with normalised queries and keys instead of
soft caps, and five sliding-window layers, with a smaller RoPE theta, to one layer of full
attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch.nn as nn
from pydantic import Field

from megalite.errors import ConfigError
from megalite.models import rope
from megalite.models.gemma2 import (
    GEMMA,
    Gemma2,
    GemmaLike,
    Layer,
    gemma_from_hf,
    gemma_to_hf,
    layer_rows,
)
from megalite.models.hf import REQUIRED, Keys, disagree
from megalite.models.llama import HeadNormAttention, attention_rows, head_norm_rows, table
from megalite.models.weights import Weight
from megalite.models.windows import LayerType, TwoRopes, local_theta_from_hf
from megalite.utils.outside import shown


class Gemma3TextConfig(TwoRopes, GemmaLike):
    family: Literal["gemma3_text"] = "gemma3_text"
    rope_theta: float = Field(
        1_000_000.0,
        gt=0,
        description="RoPE base of full-attention layers; `rope_scaling` is for these, too.",
    )

    HEAD_NORMS: ClassVar[bool] = True
    # Where the versions of transformers have put the text model inside of the whole one.
    OLD_STARTS: ClassVar[Mapping[str, str]] = {
        "language_model.model.": "model.",
        "model.language_model.": "model.",
        "language_model.lm_head.": "lm_head.",
    }
    SPARE_STARTS: ClassVar[tuple[str, ...]] = tuple(
        f"{prefix}{part}."
        for prefix in ("", "model.")
        for part in ("vision_tower", "multi_modal_projector")
    )
    ROPE: ClassVar[rope.Names] = rope.Names(
        kinds=("llama3", "linear", "longrope"),
        theta=1_000_000.0,
        new="rope_parameters.full_attention",
    )

    def usual_type(self, layer: int) -> LayerType:
        return "sliding_attention" if (layer + 1) % 6 else "full_attention"


class Gemma3Text(Gemma2):
    config: Gemma3TextConfig

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, HeadNormAttention(self.config, number))


def weights(config: Gemma3TextConfig) -> Iterator[Weight]:
    yield from table(
        config, layer_rows(config, attention_rows(config, norms=head_norm_rows(config)))
    )


_IMAGES = "of images, which are not read"
OUTER = Keys().but(
    used={"text_config": REQUIRED},
    only={"tie_word_embeddings": True},
    initializer_range="of initial values, where text_config has its own",
    **dict.fromkeys(
        (
            "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index",
            "boi_token_id", "eoi_token_id", "image_token_id",
        ),
        _IMAGES,
    ),
)  # fmt: skip
"""Keys of the config.json of a model for texts and images, which Gemma 3 was published as from 4B
on."""
USUAL = {
    "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "max_position_embeddings": 131_072,
}  # fmt: skip
"""What transformers takes for keys that its text_config leaves out, beside those of `KEYS`."""


def text_part(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text model in that of a model for texts and images. Raises
    ConfigError."""
    text = OUTER.read(hf, "gemma3").get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(
            f"config.json of a gemma3 model has text_config = {shown(text)}, which is no JSON object"
        )
    # Those of the whole model win over text_config's.
    tokens = {
        key: hf[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if hf.get(key) is not None
    }
    dtype = {key: hf[key] for key in ("dtype", "torch_dtype") if hf.get(key) is not None}
    return (
        USUAL
        | text
        | tokens
        | dtype
        | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    )


KEYS = GEMMA.but(
    used={
        "final_logit_softcapping": None,
        "sliding_window_pattern": None,
        "rope_local_base_freq": None,
    },
    only={"attn_logit_softcapping": None, "original_max_position_embeddings": None},
    _sliding_window_pattern="transformers writes it and does not read it",
)


def to_hf(config: Gemma3TextConfig) -> dict[str, Any]:
    return gemma_to_hf(config, "Gemma3ForCausalLM") | {
        "rope_local_base_freq": config.local_rope_theta
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    theta = local_theta_from_hf(hf, "gemma3_text", 10_000.0, "rope_local_base_freq")
    return gemma_from_hf(hf, Gemma3TextConfig) | {
        "local_rope_theta": theta,
        "layer_types": _layer_types(hf),
    }


def _layer_types(hf: dict[str, Any]) -> list[str]:
    """Return the layer types as config.json lists them, or as its older key says: one of so many
    layers has full attention."""
    types, pattern = hf["layer_types"], hf["sliding_window_pattern"]
    layers = range(1, hf["num_hidden_layers"] + 1)
    usual = [
        "sliding_attention" if layer % (pattern or 6) else "full_attention" for layer in layers
    ]
    if types and pattern and types != usual:
        disagree(f"layer_types = {types}", f"sliding_window_pattern = {pattern}")
    return types or usual


MODEL, CONFIG = Gemma3Text, Gemma3TextConfig
