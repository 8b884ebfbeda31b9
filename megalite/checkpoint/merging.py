"""How models of one shape become one, a weight at a time, in fp64: linear averages, task arithmetic
(Ilharco et al. 2023), TIES (Yadav et al. 2023) and spherical interpolation (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megalite.errors import ConfigError
from megalite.models.weights import Weight

Read = Callable[[Weight], Tensor]
"""Returns the logical tensor of a weight of one model."""


@dataclass(frozen=True)
class Merging:
    """Base of the methods. Holds one weight of at most all models in memory, whatever their
    size."""

    weights: Sequence[Weight]
    """The table of all models."""
    models: Sequence[Read]
    shares: Sequence[float]
    """How much each model counts."""

    def merge(self, weight: Weight) -> Tensor:
        """Return the logical tensor of a weight of the merged model, fp64."""
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(Merging):
    """The mean, in which shares are scaled to a sum of 1."""

    def __post_init__(self) -> None:
        if not math.fsum(self.shares) > 0:
            raise ConfigError(f"shares {_listed(self.shares)}: their sum must be above 0")

    def merge(self, weight: Weight) -> Tensor:
        total = math.fsum(self.shares)
        summed = torch.zeros(weight.shape, dtype=torch.float64)
        for read, share in zip(self.models, self.shares, strict=True):
            summed.add_(read(weight), alpha=share / total)
        return summed


@dataclass(frozen=True)
class Slerp(Merging):
    """The point between two models on the arc from one to the other, by Hugging Face tensor: each
    is one vector, and its angle is that of the two directions."""

    def __post_init__(self) -> None:
        if len(self.models) != 2:
            raise ConfigError(f"--method slerp is between two models, not {len(self.models)}")
        if min(self.shares) < 0 or not math.fsum(self.shares) > 0:
            raise ConfigError(
                f"shares {_listed(self.shares)}: under slerp none may be below 0, nor all be 0"
            )

    def merge(self, weight: Weight) -> Tensor:
        first, second = (weight.to_hf(read(weight).double()) for read in self.models)
        where = self.shares[1] / math.fsum(self.shares)
        return weight.from_hf({name: slerp(x, second[name], where) for name, x in first.items()})


def slerp(a: Tensor, b: Tensor, where: float) -> Tensor:
    """Return the point at `where`, 0 for `a` and 1 for `b`, on the arc between two tensors that
    are taken for vectors: (sin((1−t)Ω) a + sin(tΩ) b) / sin Ω. Where their directions are equal or
    opposite, or one is 0, no arc is defined, and the point is on the line."""
    lengths = float(a.norm() * b.norm())
    cosine = float((a * b).sum()) / lengths if lengths else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sin(angle) < 1e-6:  # there, sin(tΩ) / sin Ω is t to twelve digits
        return a * (1 - where) + b * where
    return (a * math.sin((1 - where) * angle) + b * math.sin(where * angle)) / math.sin(angle)


@dataclass(frozen=True)
class TaskArithmetic(Merging):
    """The base plus `scale` times the sum of task vectors, what each model has learned since the
    base: θ₀ + λ Σ sᵢ (θᵢ − θ₀). A share below 0 has the model forget."""

    base: Read
    scale: float = 1.0

    def merge(self, weight: Weight) -> Tensor:
        base = self.base(weight).double()
        summed = torch.zeros_like(base)
        for read, share in zip(self.models, self.shares, strict=True):
            summed.add_(read(weight) - base, alpha=share)
        return base.add_(summed, alpha=self.scale)


@dataclass(frozen=True)
class Ties(TaskArithmetic):
    """Task vectors trimmed to their largest elements, of which those are averaged that have the
    elected sign of their sum: TRIM, ELECT SIGN and DISJOINT MERGE."""

    density: Sequence[float] = ()
    """Share of all elements of each task vector that is kept."""

    def __post_init__(self) -> None:
        if not min(self.shares) > 0:
            raise ConfigError(f"shares {_listed(self.shares)}: under ties each must be above 0")
        if not all(0 < density <= 1 for density in self.density):
            raise ConfigError(
                f"densities {_listed(self.density)}: each must be above 0 and at most 1"
            )

    def merge(self, weight: Weight) -> Tensor:
        base = self.base(weight).double()
        elected = torch.zeros_like(base)
        for vector, share in self._trimmed(weight, base):
            elected.add_(vector, alpha=share)
        elected.sign_()
        summed, counted = torch.zeros_like(base), torch.zeros_like(base)
        for vector, share in self._trimmed(weight, base):
            # An element that was trimmed away is 0, has no sign, and does not count.
            agrees = (vector.sign() == elected) & (vector != 0)
            summed.add_(vector * agrees, alpha=share)
            counted.add_(agrees, alpha=share)
        return base.add_(summed / counted.where(counted > 0, 1.0), alpha=self.scale)

    def _trimmed(self, weight: Weight, base: Tensor) -> Iterator[tuple[Tensor, float]]:
        for read, smallest, share in zip(self.models, self._smallest, self.shares, strict=True):
            vector = read(weight) - base
            yield vector.where(vector.float().abs() >= smallest, 0.0), share

    @cached_property
    def _smallest(self) -> list[float]:
        """Return the size of the smallest element that is kept of each task vector, over all
        weights together, in two passes over the models: sizes, which fp32's bits order, are counted
        by their upper 16 bits, and then the sizes that share those of the element by the lower."""
        count = sum(weight.numel for weight in self.weights)
        ranks = [max(1, int(density * count)) for density in self.density]
        upper = [_place(each, rank) for each, rank in zip(self._counts(), ranks, strict=True)]
        counts = self._counts([bits for bits, _ in upper])
        lower = [_place(each, left)[0] for each, (_, left) in zip(counts, upper, strict=True)]
        bits = [high << 16 | low for (high, _), low in zip(upper, lower, strict=True)]
        return torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()

    def _counts(self, upper: Sequence[int] | None = None) -> list[Tensor]:
        """Count the elements of each task vector by the upper 16 bits of their size, or where these
        are those given, by the lower."""
        counts = [torch.zeros(1 << 16, dtype=torch.long) for _ in self.models]
        for weight in self.weights:
            base = self.base(weight).double()
            for number, read in enumerate(self.models):
                bits = (read(weight) - base).float().abs().flatten().view(torch.int32)
                high = bits >> 16
                found = high if upper is None else bits[high == upper[number]] & 0xFFFF
                counts[number] += torch.bincount(found, minlength=1 << 16)
        return counts


def _place(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the bin of the element that is number `rank` from the largest, from 1, and its number
    within the bin."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(map(str, numbers))


METHODS: dict[str, type[Merging]] = {
    "linear": Linear, "task_arithmetic": TaskArithmetic, "ties": Ties, "slerp": Slerp
}  # fmt: skip
