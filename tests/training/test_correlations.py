"""Metrics of classes and numbers, against scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megalite.training.objectives import matthews, means_over_classes, pearson, ranks_of

metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")


def counts_of(there: np.ndarray, told: np.ndarray, classes: int) -> list[torch.Tensor]:
    counted = (there, told, there[there == told])
    return [torch.from_numpy(np.bincount(some, minlength=classes)).double() for some in counted]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("skill", [0.0, 0.5, 1.0])
def test_classes_are_judged_as_by_scikit_learn(classes: int, skill: float) -> None:
    draw = np.random.default_rng(classes)
    # One class never occurs, or is never told.
    there, guess = draw.integers(0, classes, 200), draw.integers(0, max(classes - 1, 1), 200)
    told = np.where(draw.random(200) < skill, there, guess)
    counts = counts_of(there, told, classes)
    assert matthews(*counts) == pytest.approx(metrics.matthews_corrcoef(there, told), abs=1e-12)
    found = means_over_classes(*counts)
    for name in ("f1", "precision", "recall"):
        judge = getattr(metrics, f"{name}_score")
        assert found[name] == pytest.approx(
            judge(there, told, average="macro", zero_division=0), abs=1e-12
        )


def test_one_class_alone_correlates_with_nothing() -> None:
    same = np.zeros(9, np.int64)
    assert matthews(*counts_of(same, same, 2)) == 0 == metrics.matthews_corrcoef(same, same)


def test_series_correlate_as_in_scipy() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=300)
    y = np.round(x + draw.normal(size=300), 1)  # with many that are equal
    both = torch.from_numpy(x), torch.from_numpy(y)
    assert pearson(*both) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert (ranks_of(both[1]) + 1).tolist() == stats.rankdata(y).tolist()
    assert pearson(*map(ranks_of, both)) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    assert math.isnan(pearson(both[0], torch.ones(300)))
