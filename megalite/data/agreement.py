"""How far annotators agree, beyond what chance would give: Cohen's and Fleiss' kappa, Krippendorff's
alpha. 1 is full agreement, 0 that of chance.

Legend: n = items, R = annotators, K = classes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Labels = Sequence[Mapping[str, Hashable]]
"""For each of n items what each annotator who judged it said, by the annotator's name."""


def cohen(one: Sequence[Hashable], other: Sequence[Hashable]) -> float:
    """Return Cohen's kappa (1960) of two annotators' labels of the same items, both [n]; NaN where
    neither ever differs from one single class, so that chance agrees too."""
    count = len(one)
    if not count:
        return math.nan
    agreed = sum(a == b for a, b in zip(one, other, strict=True)) / count
    here, there = Counter(one), Counter(other)
    chance = sum(here[label] * there[label] for label in here) / count**2
    return (agreed - chance) / (1 - chance) if chance < 1 else math.nan


def fleiss(counts: npt.ArrayLike) -> float:
    """Return Fleiss' kappa (1971) of `counts`, [n, K]: how many annotators gave each item each
    class, the same number of annotators for every item. NaN where all gave one class. Raise
    ValueError for items of fewer than two annotators, or of different numbers of them."""
    table = np.asarray(counts, np.float64)
    raters = table.sum(1)
    if not len(table) or raters.min() < 2 or raters.min() != raters.max():
        raise ValueError("every item needs the same number of annotators, two at least")
    number = raters[0]
    agreed = ((table**2).sum(1) - number) / (number * (number - 1))
    chance = ((table.sum(0) / table.sum()) ** 2).sum()
    return float((agreed.mean() - chance) / (1 - chance)) if chance < 1 else math.nan


def krippendorff(items: Sequence[Sequence[Hashable]], interval: bool = False) -> float:
    """Return Krippendorff's alpha (2011, "Computing Krippendorff's alpha-reliability") of the labels
    that each item got, in any number: classes that are equal or not, or numbers on an `interval`
    scale. Items with fewer than two labels do not count. NaN where all labels are one."""
    paired = [labels for labels in items if len(labels) > 1]
    values = list(dict.fromkeys(label for labels in paired for label in labels))
    number = {value: place for place, value in enumerate(values)}
    together = np.zeros((len(values), len(values)))
    for labels in paired:
        # m labels make m (m - 1) pairs. So weighted, an item counts as often as it has labels.
        for one, other in itertools.permutations(labels, 2):
            together[number[one], number[other]] += 1 / (len(labels) - 1)
    if interval:
        scale = np.array(values, np.float64)
        apart = (scale[:, None] - scale) ** 2
    else:
        apart = 1.0 - np.eye(len(values))
    of_each = together.sum(1)
    total = of_each.sum()
    by_chance = (of_each[:, None] * of_each * apart).sum()
    return float(1 - (total - 1) * (together * apart).sum() / by_chance) if by_chance else math.nan


def describe(labels: Labels) -> dict[str, float]:
    """Return the agreement of annotators, by the measure's name: Krippendorff's alpha of all items,
    Fleiss' kappa of those with the commonest number of annotators, and Cohen's kappa of each pair.
    Empty where no item has two labels."""
    shared = [each for each in labels if len(each) > 1]
    if not shared:
        return {}
    found = {"krippendorff_alpha": krippendorff([list(each.values()) for each in shared])}
    commonest = Counter(map(len, shared)).most_common(1)[0][0]
    classes = list(dict.fromkeys(label for each in shared for label in each.values()))
    rows = [Counter(each.values()) for each in shared if len(each) == commonest]
    found[f"fleiss_kappa_of_{commonest}"] = fleiss([[row[c] for c in classes] for row in rows])
    names = sorted({name for each in shared for name in each})
    for one, other in itertools.combinations(names, 2):
        both = [each for each in shared if one in each and other in each]
        if both:
            pair = [[each[name] for each in both] for name in (one, other)]
            found[f"cohen_kappa {one}, {other}"] = cohen(*pair)
    return found
