"""Intervals of 95% for shares and for differences between two groups of requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megalite.bias.intervals import wilson as wilson_of_share
from megalite.monitor.records import Array

NUM_RESAMPLES = 1000


class Interval(NamedTuple):
    """Holds an estimate and where the true value lies with a confidence of 95%."""

    value: float
    low: float
    high: float

    def shown(self, spec: str) -> str:
        """Return it as text, each number by the format `spec`."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def as_json(self) -> dict[str, float | None]:
        """Return it as JSON can hold it, where nothing is known as null."""
        return {name: None if np.isnan(x) else x for name, x in self._asdict().items()}


NOTHING = Interval(float("nan"), float("nan"), float("nan"))


def wilson(count: int, total: int) -> Interval:
    """Return the share `count` / `total` with Wilson's interval (1927), which holds for few and for
    extreme counts, too."""
    if not total:
        return NOTHING
    return Interval(count / total, *wilson_of_share(count / total, total))


def newcombe(one: Interval, other: Interval) -> Interval:
    """Return the difference of two shares, the first less the second, with Newcombe's interval
    (1998) of their own intervals by Wilson."""
    difference = one.value - other.value
    down = np.hypot(one.value - one.low, other.high - other.value)
    up = np.hypot(one.high - one.value, other.value - other.low)
    return Interval(difference, float(difference - down), float(difference + up))


def bootstrap(
    groups: Sequence[Array], clients: Sequence[Sequence[str]], measure: Callable[..., float]
) -> Interval:
    """Return `measure(*groups)` with the interval of its bootstrap (percentiles).

    `groups` are the numbers of each group's requests, and `clients` who made each: clients are
    drawn whole, since the requests of one are alike, which single requests would not show."""
    if not all(map(len, groups)):
        return NOTHING
    generator = np.random.default_rng(0)
    parts = [_by_client(*pair) for pair in zip(groups, clients, strict=True)]
    found = []
    for _ in range(NUM_RESAMPLES):
        drawn = [
            np.concatenate([part[at] for at in generator.integers(len(part), size=len(part))])
            for part in parts
        ]
        found.append(measure(*drawn))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(measure(*groups)), float(low), float(high))


def _by_client(values: Array, clients: Sequence[str]) -> list[Array]:
    names, index = np.unique(np.array(clients), return_inverse=True)
    return [values[index == number] for number in range(len(names))]
