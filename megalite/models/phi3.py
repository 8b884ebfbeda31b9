"""Phi-3 and 4 (Abdin et al. 2024): Llama with a sliding window and optional partial RoPE; Hugging
Face stores its projections fused, as megalite does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megalite.models import rope
from megalite.models.llama import (
    LIKE_LLAMA,
    Llama,
    attention_rows,
    fields_from_hf,
    fields_to_hf,
    layer_table,
    mlp_rows,
    table,
)
from megalite.models.weights import Weight
from megalite.models.windows import Windowed


class Phi3Config(Windowed):
    family: Literal["phi3"] = "phi3"
    partial_rotary_factor: float = Field(
        1.0, gt=0, le=1, description="Share of each head that is rotated by RoPE."
    )

    ROPE: ClassVar[rope.Names] = rope.Names(kinds=("longrope",), share_key="partial_rotary_factor")

    @model_validator(mode="after")
    def _factors_fit(self) -> Phi3Config:
        # transformers counts them by this size, whatever head_dim says.
        size = self.hidden_size // self.num_attention_heads
        if (
            self.rope_scaling
            and int(size * self.partial_rotary_factor) // 2 != self.rotary_size // 2
        ):
            raise ValueError(
                f"head_dim {self.head_dim}: with rope_scaling it must be hidden_size / heads = {size}"
            )
        return self

    @property
    def rotary_size(self) -> int:
        """Return how many numbers of a head are rotated."""
        return int(self.head_size * self.partial_rotary_factor)


def weights(config: Phi3Config) -> Iterator[Weight]:
    # One Hugging Face name each: stored fused, in the order of rows that megalite has.
    layer = layer_table(
        config, attention_rows(config, ("qkv_proj",)), mlp_rows(config, ("gate_up_proj",))
    )
    yield from table(config, layer)


KEYS = LIKE_LLAMA.but(
    used={
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "partial_rotary_factor": None,
        "original_max_position_embeddings": 4096,
    },
    only={
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    },
)


def to_hf(config: Phi3Config) -> dict[str, Any]:
    values = fields_to_hf(config, "Phi3ForCausalLM") | {"sliding_window": config.sliding_window}
    scaling, original = config.rope_scaling, config.max_positions
    values |= rope.to_hf(config.ROPE, config.rope_theta, scaling, config.partial_rotary_factor)
    if isinstance(scaling, rope.LongRope):
        original = scaling.original_max_positions
        # transformers 4 takes these three keys alone.
        factors = {key: values["rope_scaling"][key] for key in ("short_factor", "long_factor")}
        values["rope_scaling"] = {"type": "longrope", **factors}
    return values | {
        "original_max_position_embeddings": original,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    rotary = rope.rotary_share(hf, Phi3Config.ROPE)
    return fields_from_hf(hf, Phi3Config) | {
        "sliding_window": hf["sliding_window"],
        "partial_rotary_factor": rotary,
    }


MODEL, CONFIG = Llama, Phi3Config
