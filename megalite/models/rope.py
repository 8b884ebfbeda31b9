"""RoPE, rotary positions (Su et al. 2021): the cos/sin tables, their scaling to longer sequences
than were trained on, and how a Hugging Face config.json describes them. R in shapes: pairs of a
head that are rotated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor

from megalite.config import Section
from megalite.errors import ConfigError
from megalite.models.hf import agreed, at, disagree, refuse_others
from megalite.utils.outside import shown

CosSin = tuple[Tensor, Tensor]
"""Cos/sin tables: cosine and sine of each pair's angle, fp32 [B or 1,T,R]."""


class Llama3Scaling(Section):
    """Llama 3.1's scaling: frequencies that turn often within the original length are kept, low
    ones are divided by `factor`, those between are blended."""

    type: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0, description="How many times the original length.")
    low_freq_factor: float = Field(
        1.0,
        gt=0,
        description="Turns within the original length at most which a frequency is divided by `factor`.",
    )
    high_freq_factor: float = Field(
        4.0, description="Turns within it at least which a frequency is kept."
    )
    original_max_positions: int = Field(
        8192, gt=0, description="Length that the model was trained on."
    )

    @model_validator(mode="after")
    def _a_band(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} must be above low_freq_factor {self.low_freq_factor}"
            )
        return self

    def stretch(self, frequency_R: Tensor, length: int | Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies [R]; the sequence's `length` does not matter."""
        # How often each pair turns within the length that the model was trained on.
        turns = self.original_max_positions * frequency_R / (2 * math.pi)
        # 1 for a frequency that turns at least high_freq_factor times within the original length
        # (kept), 0 for one that turns at most low_freq_factor times (divided by factor).
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        return frequency_R * (smooth + (1 - smooth) / self.factor)

    def magnitude(self, max_positions: int) -> float:
        """Return the factor of cosines and sines: 1, whatever `max_positions`."""
        return 1.0


class LinearScaling(Section):
    """Linear scaling: all frequencies are divided by `factor` (Chen et al. 2023)."""

    type: Literal["linear"]
    factor: float = Field(gt=0, description="How many times the original length.")

    def stretch(self, frequency_R: Tensor, length: int | Tensor, theta: float) -> Tensor:
        return frequency_R / self.factor

    def magnitude(self, max_positions: int) -> float:
        return 1.0


class LongRope(Section):
    """LongRoPE: each frequency is divided by its own factor, from `short_factor` up to the original
    length, and from `long_factor` in any longer sequence (Ding et al. 2024)."""

    type: Literal["longrope"]
    short_factor: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        description="Divisor of each frequency up to that length."
    )
    long_factor: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        description="Divisor of each frequency in longer sequences."
    )
    original_max_positions: int = Field(gt=1, description="Length that the model was trained on.")

    def stretch(self, frequency_R: Tensor, length: int | Tensor, theta: float) -> Tensor:
        """Return the frequencies [R] for a sequence of `length`; of the shape of `length` with R
        last, where that is a tensor."""
        long, short = (
            torch.tensor(f, device=frequency_R.device)
            for f in (self.long_factor, self.short_factor)
        )
        is_long = torch.as_tensor(length, device=frequency_R.device) > self.original_max_positions
        # [R] for one length, [B, 1, R] or [B, T, R] where rows or documents have lengths of their
        # own.
        return frequency_R / torch.where(is_long, long, short)

    def magnitude(self, max_positions: int) -> float:
        """Return the factor of cosines and sines, by which queries and keys are so multiplied."""
        factor = max_positions / self.original_max_positions
        return (
            math.sqrt(1 + math.log(factor) / math.log(self.original_max_positions))
            if factor > 1
            else 1.0
        )


class YarnScaling(Section):
    """YaRN: pairs that turn more than `beta_fast` times within the original length keep their
    frequency, those that turn less than `beta_slow` times have it divided by `factor`, those
    between are blended, and queries and keys are scaled (Peng et al. 2023)."""

    type: Literal["yarn"]
    factor: float = Field(ge=1, description="How many times the original length.")
    original_max_positions: int = Field(gt=0, description="Length that the model was trained on.")
    beta_fast: float = Field(32.0, gt=0, description="Turns above which a frequency is kept.")
    beta_slow: float = Field(
        1.0, gt=0, description="Turns below which a frequency is divided by `factor`."
    )
    attention_factor: float | None = Field(
        None,
        gt=0,
        description="Factor of queries and keys. By default 0.1 · log(factor) + 1, or what `mscale` says.",
    )
    mscale: float | None = Field(
        None,
        gt=0,
        description="Share of the logarithm in the factor of queries and keys (DeepSeek).",
    )
    mscale_all_dim: float | None = Field(
        None, gt=0, description="The same of the scale of attention (DeepSeek)."
    )
    truncate: bool = Field(True, description="Whether the blend begins and ends at whole pairs.")

    @model_validator(mode="after")
    def _a_band(self) -> YarnScaling:
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast {self.beta_fast} must not be below beta_slow {self.beta_slow}"
            )
        return self

    def stretch(self, frequency_R: Tensor, length: int | Tensor, theta: float) -> Tensor:
        """Return the scaled frequencies [R]; the sequence's `length` does not matter."""
        count = len(frequency_R)

        def pair(turns: float) -> float:
            """Return the number of the pair that turns so often within the original length."""
            return (
                count
                * math.log(self.original_max_positions / (turns * 2 * math.pi))
                / math.log(theta)
            )

        # Numbers of pairs: the first pairs turn fastest, so `low` belongs to the larger number of
        # turns.
        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # To the numbers of a head and not of its pairs, as in transformers.
        low, high = max(low, 0), min(high, 2 * count - 1)
        high += 0.001 if low == high else 0.0  # as in transformers
        divided_R = ((torch.arange(count, device=frequency_R.device) - low) / (high - low)).clamp(
            0, 1
        )
        return frequency_R / self.factor * divided_R + frequency_R * (1 - divided_R)

    def magnitude(self, max_positions: int) -> float:
        """Return the factor of cosines and sines, by which queries and keys are so multiplied."""
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(share: float) -> float:
            return 0.1 * share * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            # DeepSeek divides here what its attention scale multiplies (see
            # `LatentConfig.attention`).
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


class DynamicScaling(Section):
    """Dynamic NTK: a sequence longer than the original length has the base that its own length asks
    for, up to `factor` times that length."""

    type: Literal["dynamic"]
    factor: float = Field(ge=1, description="How many times the original length.")
    original_max_positions: int = Field(
        gt=0,
        description="max_position_embeddings of config.json; model.max_positions is `factor` times as many.",
    )

    def stretch(self, frequency_R: Tensor, length: int | Tensor, theta: float) -> Tensor:
        """Return the frequencies [R] for a sequence of `length`; of the shape of `length` with R
        last, where that is a tensor."""
        count, original = len(frequency_R), self.original_max_positions
        longer = torch.as_tensor(length, device=frequency_R.device).clamp(min=original)
        # With size = 2 · count, this is transformers' exponent size / (size - 2).
        base = theta * (self.factor * longer / original - (self.factor - 1)) ** (
            count / (count - 1)
        )
        return base ** -(torch.arange(count, device=frequency_R.device).float() / count)

    def magnitude(self, max_positions: int) -> float:
        return 1.0


KINDS: dict[str, type[Section]] = {
    "llama3": Llama3Scaling,
    "linear": LinearScaling,
    "longrope": LongRope,
    "yarn": YarnScaling,
    "dynamic": DynamicScaling,
}


def _kind(values: Any) -> str:
    return (
        values.get("type", "llama3")
        if isinstance(values, dict)
        else getattr(values, "type", "llama3")
    )


Scaling = Annotated[
    Annotated[Llama3Scaling, Tag("llama3")]
    | Annotated[LinearScaling, Tag("linear")]
    | Annotated[LongRope, Tag("longrope")]
    | Annotated[YarnScaling, Tag("yarn")]
    | Annotated[DynamicScaling, Tag("dynamic")],
    Discriminator(_kind, "unknown_rope", f"type must be {', '.join(KINDS)}"),
]
HF_NAMES = {"original_max_positions": "original_max_position_embeddings"}


@dataclass(frozen=True)
class Rope:
    """One way in which a model encodes positions: rotates the first `size` numbers of heads with
    base `theta`."""

    size: int
    theta: float
    scaling: Scaling | None
    max_positions: int
    """Longest sequence that the model is meant for."""

    def cos_sin(self, position_BT: Tensor, length: int | Tensor) -> CosSin:
        """Return the cos/sin tables for positions [B,T] in sequences of `length`, on which the
        scaling depends: [B,1,1] where rows differ, [B,T,1] where documents do."""
        exponent = torch.arange(0, self.size, 2, device=position_BT.device).float() / self.size
        # Pair i turns by theta^(-2i / size) radians per position.
        frequency_R = self.theta**-exponent
        if self.scaling is None:
            # fp32 in every precision: a bf16 position beyond 256 would be rounded.
            angle_BTR = position_BT[..., None] * frequency_R
            return angle_BTR.cos(), angle_BTR.sin()
        frequency_R = self.scaling.stretch(frequency_R, length, self.theta)
        angle_BTR = position_BT[..., None] * frequency_R
        magnitude = self.scaling.magnitude(self.max_positions)
        # Tables carry YaRN's and LongRoPE's temperature: q and k are each multiplied by it.
        return angle_BTR.cos() * magnitude, angle_BTR.sin() * magnitude


def turning_points(scaling: Scaling | None, max_positions: int) -> range:
    """Return the lengths of a sequence of up to `max_positions` tokens after which one token more
    turns all positions otherwise."""
    if isinstance(scaling, LongRope):
        # One: all longer sequences turn alike. With dynamic NTK each length has a base of its own.
        return range(scaling.original_max_positions, scaling.original_max_positions + 1)
    return (
        range(scaling.original_max_positions, max_positions)
        if isinstance(scaling, DynamicScaling)
        else range(0)
    )


@dataclass(frozen=True)
class Names:
    """Names by which a family's config.json describes RoPE."""

    kinds: tuple[str, ...] = tuple(KINDS)
    """Scalings with which transformers opens the family."""
    theta_key: str = "rope_theta"
    theta: float = 10_000.0
    """Default where config.json does not say."""
    share_key: str | None = None
    """Key of the share of each head that is rotated; None: all of it is."""
    share: float = 1.0
    """Default where config.json does not say."""
    new: str = "rope_parameters"
    """The place that transformers 5 writes; every version reads `rope_scaling` and the keys beside
    it."""


def to_hf(
    names: Names, theta: float, scaling: Scaling | None, share: float | None = None
) -> dict[str, Any]:
    """Return the keys of config.json for `theta`, `scaling` and the `share` of each head that is
    rotated, under the family's `names`. Each fact stands in one place: the one that transformers 4,
    5 and vLLM read."""
    values: dict[str, Any] = {names.theta_key: theta, "rope_scaling": None}
    if scaling:
        fields = scaling.model_dump(mode="json", exclude_none=True)
        kind = fields.pop("type")
        if isinstance(scaling, DynamicScaling):  # transformers takes it for the original length
            values["max_position_embeddings"] = fields.pop("original_max_positions")
        values["rope_scaling"] = {"rope_type": kind} | {
            HF_NAMES.get(key, key): fields[key] for key in fields
        }
    return values if share is None else values | {str(names.share_key): share}


def from_hf(hf: dict[str, Any], family: str, names: Names) -> dict[str, Any]:
    """Return rope_theta and rope_scaling of the `model:` section from config.json, `hf`, of a
    `family` with these `names`; and max_positions where the scaling decides them. Raises
    ConfigError."""
    # `place` counts; what `copy` says as well must agree.
    place, copy = _places(hf, names)
    values = at(hf, place) or {}
    kind = kind_of(values, place)
    if kind not in ("default", *names.kinds):
        known = ", ".join(repr(name) for name in ("default", *names.kinds))
        raise ConfigError(
            f"config.json has rope_type = {kind!r}; the {family} family supports {known}"
        )
    fields = (
        {}
        if kind == "default"
        else {HF_NAMES.get(name, name): name for name in KINDS[kind].model_fields}
    )
    if kind == "dynamic":
        # transformers takes max_position_embeddings for the original length of this kind.
        del fields["original_max_position_embeddings"]
    known_keys = {"type", "rope_type", "rope_theta", "partial_rotary_factor", *fields}
    refuse_others(values, known_keys, place, f"rope_type {kind!r} of the {family} family")
    rotary_share(hf, names)
    scaling = {name: values[key] for key, name in fields.items() if values.get(key) is not None}
    if "original_max_position_embeddings" in fields:
        inside = f"{place}.original_max_position_embeddings"
        scaling["original_max_positions"] = agreed(
            hf, "original_max_position_embeddings", inside, default=hf["max_position_embeddings"]
        )
    # transformers reads no other theta where the family has a key of its own.
    theta = agreed(
        hf,
        f"{place}.rope_theta",
        names.theta_key,
        default=names.theta,
        copies=("rope_theta", f"{copy}.rope_theta"),
    )
    found: dict[str, Any] = {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else scaling | {"type": kind},
    }
    if kind == "dynamic":
        found["rope_scaling"]["original_max_positions"] = hf["max_position_embeddings"]
        found["max_positions"] = longest(hf["max_position_embeddings"], scaling.get("factor", 1.0))
    return found


def longest(original: int, factor: float) -> int:
    """Return the longest sequence of a model for `original` positions that is scaled by
    `factor`."""
    # A factor such as 1.1 times a length may come out a hair below the whole number.
    return int(round(original * factor, 6))


def lengthened(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return the `values` of a `model:` section with what its `rope_scaling` leaves to a pretrained
    model without one, whose fields are `base`: the original length is the model's, and
    max_positions are `factor` times as many."""
    scaling = values.get("rope_scaling")
    if not isinstance(scaling, dict) or base.get("rope_scaling") or _kind(scaling) not in KINDS:
        return values
    original, factor = base.get("max_positions"), scaling.get("factor")
    if "original_max_positions" in KINDS[_kind(scaling)].model_fields:
        scaling = {"original_max_positions": original} | scaling
        original = scaling["original_max_positions"]
    longer = {}
    if isinstance(original, int) and isinstance(factor, int | float) and factor > 1:
        longer = {"max_positions": longest(original, factor)}
    # max_positions that are given win.
    return longer | values | {"rope_scaling": scaling}


def rotary_share(hf: dict[str, Any], names: Names) -> float:
    """Return the share of each head that is rotated. Raises ConfigError."""
    place, copy = _places(hf, names)
    key = names.share_key or "partial_rotary_factor"
    copies = ("partial_rotary_factor", f"{copy}.partial_rotary_factor")
    share = agreed(hf, f"{place}.partial_rotary_factor", key, default=names.share, copies=copies)
    if names.share_key is None and share != 1.0:
        raise ConfigError(
            f"config.json has partial_rotary_factor = {shown(share)}; the family supports 1.0"
        )
    return float(share)


def _places(hf: dict[str, Any], names: Names) -> tuple[str, str]:
    """Return the place that transformers reads, which is `rope_scaling` where that says anything,
    and the other one. Raises ConfigError where both say something, and not the same."""
    old, new = (at(hf, place) or {} for place in ("rope_scaling", names.new))
    if not old or not new:
        return ("rope_scaling", names.new) if old else (names.new, "rope_scaling")
    beside = {
        "rope_theta",
        "partial_rotary_factor",
        "type",
    }  # these are compared where they are read
    said = [
        {key: value for key, value in values.items() if value is not None and key not in beside}
        | {"rope_type": kind_of(values, place)}
        for values, place in ((old, "rope_scaling"), (new, names.new))
    ]
    if said[0] != said[1]:
        disagree(f"rope_scaling = {shown(old)}", f"{names.new} = {shown(new)}")
    return "rope_scaling", names.new


def kind_of(values: dict[str, Any], place: str) -> str:
    """Return the name of a scaling, which older versions call `type`, and Phi-3's first models
    `su`."""
    kinds = [
        {"su": "longrope"}.get(kind, kind)
        for key in ("rope_type", "type")
        if (kind := values.get(key))
    ]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        disagree(f"{place}.rope_type = {shown(kinds[0])}", f"{place}.type = {shown(kinds[1])}")
    return kinds[0] if kinds else "default"
