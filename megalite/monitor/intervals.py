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
    # The low end of the difference is where the first is low and the second high: the distances to
    # these ends add up as standard errors do.
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
    generator = np.random.default_rng(0)  # the same log gives the same interval each time
    parts = [_Clients(*pair) for pair in zip(groups, clients, strict=True)]
    found = []
    for _ in range(NUM_RESAMPLES):
        found.append(measure(*(part.drawn(generator) for part in parts)))
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(float(measure(*groups)), float(low), float(high))


class _Clients:
    """The numbers of each client's requests."""

    def __init__(self, values: Array, clients: Sequence[str]):
        names, index = np.unique(np.array(clients), return_inverse=True)
        # Client by client, each with its requests in their order.
        self._values = values[np.argsort(index, kind="stable")]
        self._counts = np.bincount(index, minlength=len(names))
        self._starts = self._counts.cumsum() - self._counts

    def drawn(self, generator: np.random.Generator) -> Array:
        """Return the numbers of as many clients as there are, drawn with replacement."""
        chosen = generator.integers(len(self._counts), size=len(self._counts))
        counts = self._counts[chosen]
        ends = counts.cumsum()
        # Places in `_values`, end to end. A list of an array for each client took minutes for a
        # hundred thousand of them, a thousand times over.
        places = np.arange(ends[-1]) + np.repeat(self._starts[chosen] - ends + counts, counts)
        return self._values[places]
