"""OLMo 3 (Team Olmo 2025): OLMo 2 whose layers look back over a window, all but every fourth, which
alone have their positions scaled."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from megalite.models import olmo2, rope
from megalite.models.llama import fields_from_hf, fields_to_hf
from megalite.models.olmo2 import Olmo2
from megalite.models.olmo2 import weights as weights
from megalite.models.windows import LayerType, TwoRopes, local_theta_from_hf

THETA = 500_000.0


class Olmo3Config(TwoRopes):
    family: Literal["olmo3"] = "olmo3"
    rope_theta: float = Field(
        THETA,
        gt=0,
        description="RoPE base of full-attention layers; `rope_scaling` is for these, too.",
    )
    local_rope_theta: float = Field(THETA, gt=0, description="RoPE base of sliding-window layers.")

    HEAD_NORMS: ClassVar[bool] = True
    NEEDS_WINDOW: ClassVar[bool] = True
    ROPE: ClassVar[rope.Names] = rope.Names(
        kinds=("llama3", "linear", "longrope", "yarn"),
        theta=THETA,
        new="rope_parameters.full_attention",
    )

    def usual_type(self, layer: int) -> LayerType:
        return "sliding_attention" if (layer + 1) % 4 else "full_attention"


KEYS = olmo2.KEYS.but(
    used={"sliding_window": 4096, "layer_types": None},
    only={"original_max_position_embeddings": None},
)


def to_hf(config: Olmo3Config) -> dict[str, Any]:
    values = fields_to_hf(config, "Olmo3ForCausalLM") | {
        "sliding_window": config.sliding_window,
        "layer_types": list(config.types),
    }
    if config.rope_theta == config.local_rope_theta == THETA:
        return values
    # transformers 4 gives both kinds of layers the one rope_theta, transformers 5 only those of
    # full attention: here there is no way to tell both, and the newer is told.
    full = (
        {"rope_type": "default"}
        | (values.pop("rope_scaling") or {})
        | {"rope_theta": values.pop("rope_theta")}
    )
    local = {"rope_type": "default", "rope_theta": config.local_rope_theta}
    return values | {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf, Olmo3Config) | {
        "sliding_window": hf["sliding_window"],
        "layer_types": hf["layer_types"],
        "local_rope_theta": local_theta_from_hf(hf, "olmo3", THETA),
    }


MODEL, CONFIG = Olmo2, Olmo3Config
