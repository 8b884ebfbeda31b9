"""Rotary positions (Su et al. 2021): how fast each pair of a head turns, stretched to longer sequences than were
trained on, and how a Hugging Face config.json says so. R in shapes: pairs of a head that turn."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor

from megalite.config import Section
from megalite.errors import ConfigError

Turn = tuple[Tensor, Tensor]
"""Cosine and sine of each pair's angle, fp32 [B or 1,T,R]."""


class Llama3Scaling(Section):
    """Llama 3.1's: waves that turn often within the original length are kept, slow ones are slowed by `factor`, the
    rest is blended."""

    type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def stretch(self, frequency_R: Tensor, length: int | Tensor) -> Tensor:
        turns = self.original_max_positions * frequency_R / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        return frequency_R * (smooth + (1 - smooth) / self.factor)

    def magnitude(self, max_positions: int) -> float:
        return 1.0


class LinearScaling(Section):
    """All waves are slowed alike (Chen et al. 2023)."""

    type: Literal["linear"]
    factor: float = Field(gt=0)

    def stretch(self, frequency_R: Tensor, length: int | Tensor) -> Tensor:
        return frequency_R / self.factor

    def magnitude(self, max_positions: int) -> float:
        return 1.0


class LongRope(Section):
    """Each wave is slowed by a factor of its own, of one set up to the original length and of another in any longer
    sequence (Ding et al. 2024)."""

    type: Literal["longrope"]
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int = Field(gt=1)

    def stretch(self, frequency_R: Tensor, length: int | Tensor) -> Tensor:
        long, short = (torch.tensor(f, device=frequency_R.device) for f in (self.long_factor, self.short_factor))
        is_long = torch.as_tensor(length, device=frequency_R.device) > self.original_max_positions
        return frequency_R / torch.where(is_long, long, short)

    def magnitude(self, max_positions: int) -> float:
        """What queries and keys are multiplied by."""
        factor = max_positions / self.original_max_positions
        return math.sqrt(1 + math.log(factor) / math.log(self.original_max_positions)) if factor > 1 else 1.0


KINDS: dict[str, type[Llama3Scaling] | type[LinearScaling] | type[LongRope]] = {
    "llama3": Llama3Scaling,
    "linear": LinearScaling,
    "longrope": LongRope,
}


def _kind(values: Any) -> str:
    return values.get("type", "llama3") if isinstance(values, dict) else getattr(values, "type", "llama3")


Scaling = Annotated[
    Annotated[Llama3Scaling, Tag("llama3")]
    | Annotated[LinearScaling, Tag("linear")]
    | Annotated[LongRope, Tag("longrope")],
    Discriminator(_kind, "unknown_rope", f"type must be {', '.join(KINDS)}"),
]
HF_NAMES = {"original_max_positions": "original_max_position_embeddings"}


def turns(
    position_BT: Tensor, size: int, theta: float, scaling: Scaling | None, length: int | Tensor, max_positions: int
) -> Turn:
    """Of heads whose first `size` numbers turn, for tokens of a sequence of `length`, [B,1,1] where rows
    differ, [B,T,1] where documents do."""
    exponent = torch.arange(0, size, 2, device=position_BT.device).float() / size
    frequency_R = theta**-exponent
    if scaling is None:
        angle_BTR = position_BT[..., None] * frequency_R
        return angle_BTR.cos(), angle_BTR.sin()
    angle_BTR = position_BT[..., None] * scaling.stretch(frequency_R, length)
    magnitude = scaling.magnitude(max_positions)
    return angle_BTR.cos() * magnitude, angle_BTR.sin() * magnitude


def to_hf(theta: float, scaling: Scaling | None, **more: Any) -> dict[str, Any]:
    """The keys of config.json: transformers 5 reads `rope_parameters`; transformers 4 and vLLM what it replaced."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta, **more}
    if scaling:
        values = scaling.model_dump(mode="json")
        rope["rope_type"] = values.pop("type")
        rope |= {HF_NAMES.get(key, key): value for key, value in values.items()}
    old = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {"rope_parameters": rope, "rope_theta": theta, "rope_scaling": old if scaling else None, **more}


def from_hf(hf: dict[str, Any], family: str, theta: float = 10_000.0) -> dict[str, Any]:
    """rope_theta, `theta` where config.json does not say, and rope_scaling. Raises ConfigError."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = rope.get("rope_theta", hf.get("rope_theta", theta))
    return {"rope_theta": theta, "rope_scaling": scaling_from_hf(rope, hf, family)}


def scaling_from_hf(rope: dict[str, Any], hf: dict[str, Any], family: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = {"su": "longrope"}.get(kind, kind)  # as Phi-3's first models call it
    if kind == "default":
        return None
    if kind not in KINDS:
        known = ", ".join(repr(name) for name in ("default", *KINDS))
        raise ConfigError(f"config.json has rope_type = {kind!r}; the {family} family supports {known}")
    if kind == "longrope" and rope.get("attention_factor", rope.get("factor")) is not None:
        raise ConfigError(f"config.json has a longrope with a factor; the {family} family derives it from the lengths")
    found = {name: {**hf, **rope}.get(HF_NAMES.get(name, name)) for name in KINDS[kind].model_fields}
    if "original_max_positions" in found:  # beside the others or, in Phi-3's, one level up
        found["original_max_positions"] = found["original_max_positions"] or hf["max_position_embeddings"]
    return {name: value for name, value in found.items() if value is not None} | {"type": kind}
