"""Sliding-window attention, in all layers or in some."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megalite.errors import ConfigError
from megalite.models import rope
from megalite.models.hf import agreed, at, disagree, refuse_others
from megalite.models.llama import LIKE_LLAMA, LlamaLike

LayerType = Literal["sliding_attention", "full_attention"]
LAYER_TYPES = ("full_attention", "sliding_attention")


class Windowed(LlamaLike):
    sliding_window: int | None = Field(
        None,
        gt=0,
        description="Tokens that each token attends to, itself included. All before it where left out.",
    )

    def window(self, layer: int) -> int | None:
        return self.sliding_window


class WindowedByLayer(Windowed):
    layer_types: tuple[LayerType, ...] | None = Field(
        None,
        description="sliding_attention or full_attention for each layer. The family's usual types where left out.",
    )

    NEEDS_WINDOW: ClassVar[bool] = False
    """Whether transformers opens the family only with a window, even where no layer uses it."""

    @model_validator(mode="after")
    def _a_type_a_layer(self) -> WindowedByLayer:
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_layers = {self.num_layers}"
            )
        if self.sliding_window is None and (self.NEEDS_WINDOW or "sliding_attention" in self.types):
            raise ValueError(
                f"sliding_window is left out, but {self.family} needs one for layers of sliding_attention"
            )
        return self

    @property
    def types(self) -> tuple[LayerType, ...]:
        """Return the type of every layer: as set, or the family's usual ones."""
        return tuple(self.type_of(layer) for layer in range(self.num_layers))

    def type_of(self, layer: int) -> LayerType:
        """Return the type of a layer: as set, or the family's usual one."""
        return self.usual_type(layer) if self.layer_types is None else self.layer_types[layer]

    def usual_type(self, layer: int) -> LayerType:
        """Return the type that a layer has where `layer_types` is left out."""
        return "full_attention" if self.sliding_window is None else "sliding_attention"

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.type_of(layer) == "sliding_attention" else None


class TwoRopes(WindowedByLayer):
    """Fields of families whose sliding-window layers have a RoPE of their own."""

    local_rope_theta: float = Field(
        10_000.0, gt=0, description="RoPE base of sliding-window layers."
    )

    def turn(self, layer: int) -> int | None:
        """Return 1, the RoPE of local layers, for a sliding-window layer; else 0."""
        return 1 if self.type_of(layer) == "sliding_attention" else 0

    @property
    def ropes(self) -> tuple[rope.Rope, ...]:
        """Return the RoPE of layers of full attention, then that of sliding-window layers."""
        (full,) = super().ropes
        # Local layers have no scaling: a window never reaches further than was trained.
        return full, replace(full, theta=self.local_rope_theta, scaling=None)


def local_theta_from_hf(hf: dict[str, Any], family: str, default: float, *older: str) -> float:
    """Return the RoPE base of sliding-window layers from config.json, whose `rope_parameters` are
    by the type of the layer; `older` are other keys that may have it. Raises ConfigError."""
    if at(hf, "rope_scaling.type") and not at(hf, "rope_scaling.rope_type"):
        raise ConfigError(
            f"config.json has rope_scaling.type, which transformers does not read for {family}: it is rope_type"
        )
    ropes, place = hf["rope_parameters"] or {}, "rope_parameters.sliding_attention"
    refuse_others(
        ropes, LAYER_TYPES, "rope_parameters", f"{family}, which has them by the type of the layer"
    )
    local = ropes.get("sliding_attention") or {}
    refuse_others(
        local, ("rope_type", "type", "rope_theta"), place, "layers that look back over a window"
    )
    if (kind := rope.kind_of(local, place)) != "default":
        raise ConfigError(
            f"config.json has {place}.rope_type = {kind!r}; the {family} family supports 'default'"
        )
    return agreed(hf, f"{place}.rope_theta", *older, default=default)


QWEN = LIKE_LLAMA.but(
    used={
        "num_key_value_heads": 32,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    }
)


def qwen_to_hf(config: WindowedByLayer) -> dict[str, Any]:
    """Return the window as Qwen 2 and 3 spell it. Older versions of transformers know only
    `max_window_layers`, before which layers have full attention: what that cannot say is written as
    `layer_types`."""
    types = list(config.types)
    first = types.index("sliding_attention") if "sliding_attention" in types else config.num_layers
    layers: dict[str, Any] = {"max_window_layers": first}
    if types != _types_from(first, config.num_layers):
        layers = {"layer_types": types}
    sliding = config.sliding_window is not None
    return {"use_sliding_window": sliding, "sliding_window": config.sliding_window, **layers}


def qwen_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the window's fields from Qwen's config.json. Raises ConfigError where its keys
    disagree."""
    # Qwen writes a sliding_window into every config; only this switch makes it count.
    sliding = bool(hf["use_sliding_window"]) and hf["sliding_window"] is not None
    first, count = hf["max_window_layers"], hf["num_hidden_layers"]
    types = hf["layer_types"] or _types_from(first if sliding else count, count)
    if not sliding:
        if "sliding_attention" in types:
            which = "use_sliding_window" if not hf["use_sliding_window"] else "sliding_window"
            disagree(f"layer_types = {types}", f"{which} = {hf[which]}")
        return {}
    # transformers writes the usual number beside any `layer_types`; another one was meant.
    if first != QWEN.used["max_window_layers"] and types != _types_from(first, count):
        disagree(f"layer_types = {types}", f"max_window_layers = {first}")
    return {"sliding_window": hf["sliding_window"], "layer_types": types}


def _types_from(first: int, count: int) -> list[str]:
    """Return the types of `count` layers, of which those from `first` on have a sliding window."""
    return ["full_attention" if layer < first else "sliding_attention" for layer in range(count)]
