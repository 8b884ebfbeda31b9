"""Layers that attend to a window of the sequence, all of them or some."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megalite.models.llama import LlamaLike

LayerType = Literal["sliding_attention", "full_attention"]


class Windowed(LlamaLike):
    sliding_window: int | None = Field(
        None, gt=0, description="tokens that each attends to, itself included; left out: all before it"
    )

    def window(self, layer: int) -> int | None:
        return self.sliding_window


class WindowedByLayer(Windowed):
    layer_types: tuple[LayerType, ...] | None = Field(
        None, description="sliding_attention or full_attention for each layer; left out: as the family has it"
    )

    @model_validator(mode="after")
    def _a_type_a_layer(self) -> WindowedByLayer:
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries for num_layers = {self.num_layers}")
        return self

    @property
    def types(self) -> tuple[LayerType, ...]:
        return self.layer_types or tuple(self.usual_type(layer) for layer in range(self.num_layers))

    def usual_type(self, layer: int) -> LayerType:
        return "full_attention" if self.sliding_window is None else "sliding_attention"

    def window(self, layer: int) -> int | None:
        return self.sliding_window if self.types[layer] == "sliding_attention" else None


def qwen_to_hf(config: WindowedByLayer) -> dict[str, Any]:
    """The window as Qwen 2 and 3 spell it. transformers 4 reads `max_window_layers`: layers before it attend to all."""
    types = config.types
    return {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": types.index("sliding_attention") if "sliding_attention" in types else config.num_layers,
        "layer_types": list(types),
    }


def qwen_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if not hf.get("use_sliding_window") or hf.get("sliding_window") is None:
        return {}
    first, count = hf.get("max_window_layers", 28), hf["num_hidden_layers"]
    types = hf.get("layer_types") or ["full_attention"] * min(first, count) + ["sliding_attention"] * (count - first)
    return {"sliding_window": hf["sliding_window"], "layer_types": types}
