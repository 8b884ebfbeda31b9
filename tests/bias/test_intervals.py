"""Intervals contain what they are of as often as they say, also where items come in clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megalite.bias import intervals
from megalite.bias.intervals import estimate, spearman, t_quantile, wilson


def test_wilsons_interval_is_that_of_the_books() -> None:
    # Newcombe (1998), table I, method 3.
    for share, count, low, high in (
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0 / 20, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ):
        assert wilson(share, count) == pytest.approx((low, high), abs=5e-5)
    assert estimate([1, 0] * 131 + [1], range(263), (0, 1))[1:3] == pytest.approx(
        wilson(132 / 263, 263)
    )


def test_students_quantile_is_near() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 5, 10, 30, 200):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


def test_ranks_correlate_as_scipy_has_it() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    rows = random.integers(0, 4, (2, 20, 7)).astype(float)  # with ties
    wanted = [stats.spearmanr(a, b)[0] for a, b in zip(*rows, strict=True)]
    assert spearman(*rows) == pytest.approx(wanted)
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


@pytest.mark.parametrize(("bounds", "num_clusters"), [((0.0, 1.0), 12), (None, 5)])
def test_intervals_of_clusters_contain_the_truth(
    bounds: tuple[float, float] | None, num_clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 200 samples, those whose interval contains the truth: 95%, of which three standard errors
    of a share of 200 are 4.6. An interval that takes items as independent has far fewer."""
    monkeypatch.setattr(intervals, "DRAWS", 400)  # enough for ends of 2.5%, and quicker
    random, truth, held, naive = np.random.default_rng(5), 0.3, 0, 0
    for _ in range(200):
        # What items of a cluster share varies as much as what they do not.
        of_cluster = (
            random.beta(0.9, 2.1, num_clusters) if bounds else random.normal(truth, 1, num_clusters)
        )
        clusters = np.repeat(np.arange(num_clusters), 10)
        each = np.repeat(of_cluster, 10)
        values = random.random(len(each)) < each if bounds else random.normal(each, 1)
        found = estimate(values.astype(float), clusters.tolist(), bounds)
        held += found.low <= truth <= found.high
        alone = estimate(values.astype(float), range(len(values)), bounds)
        naive += alone.low <= truth <= alone.high
    assert held / 200 > 0.95 - 0.046
    assert naive / 200 < 0.8


def test_values_that_are_all_alike_leave_room_for_doubt() -> None:
    """Four templates with ten sentences each are no forty observations."""
    clusters = [number // 10 for number in range(40)]
    found = estimate([1.0] * 40, clusters, (0, 1))
    assert found.value == pytest.approx(1)
    assert found.high == pytest.approx(1)
    assert found.low < wilson(1.0, 4)[0]
    one = estimate([1.0, 2.0], ["a", "a"])
    assert one.value == 1.5
    assert math.isnan(one.low)
    assert not one.excludes(0.0)
