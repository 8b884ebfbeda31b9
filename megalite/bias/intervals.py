"""95% intervals of means over items that come in clusters: sentences of one template, questions of
one scenario. Clusters are independent of each other; items of a cluster need not be.

Legend: n = items, C = clusters, R = draws of the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Z = 1.959963984540054
"""Quantile 0.975 of the normal distribution."""
DRAWS = 2000
SEED = 20
"""Of the bootstrap: the same file and model give the same interval."""
FEWEST = 2
"""Clusters that an interval needs."""
Array = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A mean with its 95% interval, whose ends are NaN where there are too few clusters for one."""

    value: float
    low: float
    high: float
    items: int
    clusters: int

    def excludes(self, neutral: float) -> bool:
        """Return whether the interval lies on one side of a value."""
        return self.low > neutral or self.high < neutral


def estimate(
    values: Sequence[float] | Array,
    clusters: Sequence[Hashable],
    bounds: tuple[float, float] | None = None,
) -> Estimate:
    """Return the mean of `values`, [n], with its interval: of values within `bounds` by Wilson's
    formula with the effective number of items, of others by a bootstrap over clusters."""
    x = np.asarray(values, np.float64)
    sums_C, counts_C = by_cluster(x, clusters)
    number = len(counts_C)
    if not len(x):
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    mean = float(x.mean())
    # Of one cluster nothing tells how far others are from it, however many items it has.
    if number < FEWEST:
        return Estimate(mean, math.nan, math.nan, len(x), number)
    if bounds is None:
        # Sums and counts are drawn together: a draw of large clusters has more items, too.
        drawn_R = means_drawn(sums_C[:, None], counts_C[:, None])[:, 0]
        low, high = widened(mean, np.quantile(drawn_R, (0.025, 0.975)), number)
    else:
        low, high = _bounded(mean, sums_C, counts_C, bounds)
    return Estimate(mean, low, high, len(x), number)


def by_cluster(values: Array, clusters: Sequence[Hashable]) -> tuple[Array, Array]:
    """Return the sum and the number of the values of each cluster, both [C]."""
    number = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    # `np.add.at`, for `sums[at] += values` would count a cluster once, not once an item.
    at = np.array([number[cluster] for cluster in clusters], np.int64)
    sums, counts = np.zeros((2, len(number)))
    np.add.at(sums, at, values)
    np.add.at(counts, at, 1)
    return sums, counts


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share of `count` independent items. Unlike that by the
    standard error it has a width at shares of 0 and 1, and stays between them."""
    centre = share + Z**2 / (2 * count)
    variance = share * (1 - share) / count
    half = Z * math.sqrt(variance + Z**2 / (4 * count**2))
    whole = 1 + Z**2 / count
    # At shares of 0 and 1 an end is the share itself, which rounding could leave outside.
    low = min(share, (centre - half) / whole)
    high = max(share, (centre + half) / whole)
    return max(0.0, low), min(1.0, high)


def _bounded(
    mean: float, sums_C: Array, counts_C: Array, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Return Wilson's interval of a mean of values within bounds, as of a share, with as many items
    as independent ones would have to be for the variance between clusters (Korn, Graubard 1998)."""
    least, most = bounds
    # A mean of values within bounds varies at most as a share of yes and no does.
    share = (mean - least) / (most - least)
    count, number = counts_C.sum(), len(counts_C)
    effective = count
    if number < count:
        shares_C = (sums_C - least * counts_C) / (most - least)
        apart = ((shares_C - share * counts_C) ** 2).sum()
        # The variance of a ratio of two sums over clusters, linearised; they are of unequal sizes.
        variance = number / (number - 1) * apart / count**2
        # Where all are alike nothing tells how far clusters differ: each of them counts as one.
        independent = share * (1 - share)
        effective = min(count, independent / variance) if variance > 0 else number
        # Few clusters tell their own variance badly: as many fewer items widen the interval as
        # Student's t does that of a mean.
        effective *= (Z / t_quantile(number - 1)) ** 2
    low, high = wilson(share, effective)
    return least + low * (most - least), least + high * (most - least)


def t_quantile(freedom: int) -> float:
    """Return the quantile 0.975 of Student's t, to 1% from 2 degrees of freedom on (the expansion
    of Cornish and Fisher in 1/freedom), and 12.706 for one."""
    if freedom < 2:
        return 12.706
    terms = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
        (79 * Z**9 + 776 * Z**7 + 1482 * Z**5 - 1920 * Z**3 - 945 * Z) / 92160,
    )
    return Z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def widened(mean: float, ends: Array, number: int) -> tuple[float, float]:
    """Return the ends of a bootstrap's interval, as much wider as so few clusters ask for: their
    spread is underestimated, and it is itself uncertain."""
    factor = math.sqrt(number / (number - 1)) * t_quantile(number - 1) / Z
    low, high = mean + (ends - mean) * factor
    return float(low), float(high)


def means_drawn(sums_CK: Array, counts_CK: Array) -> Array:
    """Return K means in each of R draws of as many clusters, with replacement, [R, K]; NaN where no
    cluster that was drawn has a value."""
    number = len(sums_CK)
    # How often each cluster was drawn is all that a mean needs: no items are copied.
    generator = np.random.Generator(np.random.Philox(SEED))
    found = []
    # A few draws at a time: R × C numbers would be gigabytes for large tests.
    for _ in range(0, DRAWS, 100):
        times_RC = generator.multinomial(number, np.full(number, 1 / number), 100)
        with np.errstate(invalid="ignore"):
            found.append((times_RC @ sums_CK) / (times_RC @ counts_CK))
    return np.concatenate(found)


def spearman(one: Array, other: Array) -> Array:
    """Return Spearman's rank correlation of rows, [..., n] each: that of their ranks, means where
    values are tied. NaN for rows whose values are all alike."""
    ranks = [_ranks(x) for x in (one, other)]
    centred = [rank - rank.mean(-1, keepdims=True) for rank in ranks]
    both, *own = (
        (a * b).sum(-1) for a, b in ((centred[0], centred[1]), *((c, c) for c in centred))
    )
    with np.errstate(invalid="ignore"):
        return np.asarray(both / np.sqrt(own[0] * own[1]))


def _ranks(x: Array) -> Array:
    """Return the rank of each value among the last dimension's, from 1 on."""
    # By comparing all pairs: groups are few, and a sort has no mean rank for ties.
    less = (x[..., None, :] < x[..., :, None]).sum(-1)
    same = (x[..., None, :] == x[..., :, None]).sum(-1)
    return less + (same + 1) / 2
