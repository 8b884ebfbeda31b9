"""Whether two samples differ, by how much and how surely: the population stability index (PSI) of
their shares in bins, and Kolmogorov's and Smirnov's test of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.monitor.records import Array

NUM_BINS = 10
LEAST_ROWS = 50
"""Rows on either side below which nothing is judged."""
MOST_CLASSES = 12
"""Classes that are told apart, the most frequent ones of the reference; others are one class."""
OTHERS = "others"
Counts = npt.NDArray[Any]
SMOOTHING = 0.5
"""Added to the count of each bin, since an empty one would make the index infinite."""


class Drift(NamedTuple):
    """Holds how a feature of requests differs from its reference."""

    feature: str
    kind: Literal["number", "class"]
    psi: float
    """Σ (p − q) ln(p / q) over bins; below 0.1 is usually called stable, from 0.25 shifted."""
    p: float
    """Probability of such a difference where nothing has changed: of numbers by the test of
    Kolmogorov and Smirnov, of classes by the index, which is χ² distributed then."""
    ks: float | None
    """Largest difference of the two distribution functions; None for classes."""
    num_now: int
    num_reference: int
    names: list[str]
    """Of the bins, whose shares are drawn."""
    shares_now: list[float]
    shares_reference: list[float]

    @property
    def is_judged(self) -> bool:
        """Return whether there are enough rows on both sides."""
        return min(self.num_now, self.num_reference) >= LEAST_ROWS


def drift_of_numbers(feature: str, now: Array, reference: Array) -> Drift:
    """Return how the numbers `now` differ from those of the reference, whose deciles are the
    bins."""
    if not (len(now) and len(reference)):
        return _none(feature, "number", len(now), len(reference))
    # Repeated values make deciles coincide, as most prompts of one template have one length: then
    # there are fewer bins.
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, NUM_BINS + 1)[1:-1]))
    # Values that equal an edge belong below it, as quantiles have it: most lengths are repeated.
    counts = [
        np.bincount(np.searchsorted(edges, x), minlength=len(edges) + 1) for x in (now, reference)
    ]
    ks = ks_statistic(now, reference)
    marks = [f"{edge:.4g}" for edge in edges]
    names = [f"≤ {mark}" for mark in marks] + [f"> {marks[-1]}"]
    return Drift(
        feature, "number", psi(*counts), ks_p(ks, len(now), len(reference)), ks, len(now), len(reference), names,
        *(list(each / each.sum()) for each in counts),
    )  # fmt: skip


def drift_of_classes(feature: str, now: Sequence[str], reference: Sequence[str]) -> Drift:
    """Return how the classes of rows `now` differ from those of the reference."""
    if not (now and reference):
        return _none(feature, "class", len(now), len(reference))
    # By the reference alone: classes that are chosen by looking at both sides would find differences
    # where there is none.
    whole = Counter(reference)
    names = [name for name, _ in whole.most_common(MOST_CLASSES)]
    # What is new is told by name, but counted with all others.
    rest = Counter(x for x in now if x not in whole)
    others = f"{OTHERS}, mostly {rest.most_common(1)[0][0]}" if rest else OTHERS
    found = [Counter(x if x in names else others for x in rows) for rows in (now, reference)]
    if any(others in each for each in found):
        names.append(others)
    counts = [np.array([each[name] for name in names]) for each in found]
    index = psi(*counts)
    p = psi_p(index, len(now), len(reference), len(names))
    return Drift(
        feature, "class", index, p, None, len(now), len(reference), names,
        *(list(each / each.sum()) for each in counts),
    )  # fmt: skip


def _none(
    feature: str, kind: Literal["number", "class"], num_now: int, num_reference: int
) -> Drift:
    return Drift(feature, kind, 0.0, 1.0, None, num_now, num_reference, [], [], [])


def psi(now: Counts, reference: Counts) -> float:
    """Return the population stability index of two arrays of counts per bin."""
    # Before they become shares, which sum to 1 as they must.
    p, q = (
        (counts + SMOOTHING) / (counts.sum() + SMOOTHING * len(counts))
        for counts in (now, reference)
    )
    return float(((p - q) * np.log(p / q)).sum())


def psi_p(index: float, num_now: int, num_reference: int, num_bins: int) -> float:
    """Return the probability of an index at least this large where nothing has changed (Yurdakul
    2018): scaled by the numbers of rows it is χ² distributed, with a degree of freedom less than
    bins."""
    import torch

    if num_bins < 2:
        return 1.0
    # For small differences (p − q) ln(p / q) is about (p − q)² / q: Pearson's χ² of two samples, but
    # for the numbers of rows.
    scaled = index * num_now * num_reference / (num_now + num_reference)
    # The upper tail of χ² is the regularised gamma function of halves; torch has it, scipy is no
    # requirement.
    half = torch.tensor([(num_bins - 1) / 2, scaled / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def ks_statistic(now: Array, reference: Array) -> float:
    """Return the largest difference of two samples' distribution functions."""
    now, reference = np.sort(now), np.sort(reference)
    # Both functions jump at values of either sample only.
    every = np.concatenate([now, reference])
    below = [np.searchsorted(x, every, side="right") / len(x) for x in (now, reference)]
    return float(np.abs(below[0] - below[1]).max())


def ks_p(statistic: float, num_now: int, num_reference: int) -> float:
    """Return the probability of a difference at least this large where nothing has changed, by
    Kolmogorov's limit with Stephens' correction for few rows. Repeated values make it larger, never
    smaller."""
    root = np.sqrt(num_now * num_reference / (num_now + num_reference))
    scaled = (root + 0.12 + 0.11 / root) * statistic
    if scaled < 0.2:  # the series converges slowly there, to 1
        return 1.0
    # Terms fall as exp(−n²): at 0.2 the hundredth is below 1e-300.
    index = np.arange(1, 101)
    terms = (-1.0) ** (index - 1) * np.exp(-2 * (index * scaled) ** 2)
    return float(np.clip(2 * terms.sum(), 0, 1))
