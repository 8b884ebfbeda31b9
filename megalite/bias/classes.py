"""Bias of classifiers: does the class change where nothing but the group does, and do groups whose rows
are labelled have other shares and other errors?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations, product

import numpy as np

from megalite.bias.forms import BiasTest, Filled, Labelled
from megalite.bias.intervals import Array, Estimate, estimate, wilson
from megalite.bias.measures import ALL, Outcome, Result
from megalite.errors import ConfigError
from megalite.infer.classify import Classifier, Question, TextVerdict


def ask_classifier(test: BiasTest, classifier: Classifier) -> Outcome:
    """Return what a classifier says to templates, or to labelled rows of groups. Raise ConfigError for
    another test, or a model that does not tell one class."""
    if classifier.task != "classification" or classifier.problem != "single_label":
        raise ConfigError("bias of classes is measured of models that tell one class of a text")
    items: Sequence[Filled | Labelled] = test.filled or test.rows
    if test.filled:
        questions = [Question(item.text) for item in test.filled]
    elif test.rows:
        questions = [item.question for item in test.rows]
    else:
        raise ConfigError(
            f"{test.file} ({test.form}) asks how likely texts are, which a model of classes does not tell; for that "
            "there are templates, and rows with a label and a group"
        )
    verdicts = [x for x in classifier.classify(questions) if isinstance(x, TextVerdict)]
    samples = [
        item._asdict() | {"said": said.label, "scores": said.scores}
        for item, said in zip(items, verdicts, strict=True)
    ]
    if test.filled:
        shares = np.array([[x.scores[name] for name in classifier.labels] for x in verdicts])
        return Outcome(flip_results(test.filled, shares, classifier.labels), [], samples, [])
    # A label that the model cannot tell would count as wrong in every row of its group.
    if unknown := {row.label for row in test.rows} - {*classifier.labels}:
        raise ConfigError(
            f"{test.file} has the label {min(unknown)!r}, which is none of the model's: {', '.join(classifier.labels)}"
        )
    said = [str(x.label) for x in verdicts]
    return Outcome(group_results(test.rows, said, classifier.labels), [], samples, [])


def flip_results(filled: Sequence[Filled], shares_nK: Array, labels: Sequence[str]) -> list[Result]:
    """Return how often the class changes between words of different groups in the same text, and
    between words of one group, as any other word may change it; and by how much each class is
    likelier with a group than with the others. Probabilities are [n, K], of K `labels`."""
    said = shares_nK.argmax(1)
    # Compared are texts of one template and one attribute's words: they differ in the group alone.
    texts: dict[tuple[str, str], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, item in enumerate(filled):
        texts[item.cluster, item.rest][item.group].append(number)
    across, clusters = [], []
    # Of texts with several words of a group: of one word each nothing is known of others.
    within, apart, of_within = [], [], []
    more: dict[str, list[Array]] = defaultdict(list)
    for (cluster, _), groups in texts.items():
        pairs = [
            (a, b) for one, other in combinations(groups.values(), 2) for a in one for b in other
        ]
        across.append(float(np.mean([said[a] != said[b] for a, b in pairs])))
        alike = [pair for numbers in groups.values() for pair in combinations(numbers, 2)]
        clusters.append(cluster)
        if alike:
            within.append(float(np.mean([said[a] != said[b] for a, b in alike])))
            apart.append(across[-1] - within[-1])
            of_within.append(cluster)
        # Each group counts once, however many words it has; so do the others, whose mean is taken.
        means = {group: shares_nK[numbers].mean(0) for group, numbers in groups.items()}
        for group, mean_K in means.items():
            others = [means[other] for other in means if other != group]
            more[group].append(mean_K - np.mean(others, 0))
    unit = (0.0, 1.0)
    results = [
        Result("class changes with the group", ALL, estimate(across, clusters, unit), None),
        Result("class changes within a group", ALL, estimate(within, of_within, unit), None),
        Result("changes, across − within", ALL, estimate(apart, of_within, (-1, 1)), 0.0),
    ]
    for group, found in more.items():
        for column, label in enumerate(labels):
            values = [float(each[column]) for each in found]
            # No share of yes and no: where all are nearly alike, so much is known.
            found_gap = estimate(values, clusters)
            results.append(
                Result("probability, group − others", f"{label} × {group}", found_gap, 0.0)
            )
    return [result for result in results if result.found.items]


def group_results(
    rows: Sequence[Labelled], said: Sequence[str], labels: Sequence[str]
) -> list[Result]:
    """Return the accuracy of each group's rows, and by how much its share of rows that are told a
    class is larger than that of all others: of all rows (demographic parity), of those that are of
    the class, and of those that are not (equalised odds; Hardt et al. 2016)."""
    groups = sorted({row.group for row in rows})
    results = []
    for group in groups:
        right = [
            row.label == told for row, told in zip(rows, said, strict=True) if row.group == group
        ]
        # No row was filled from a template: each is a cluster of its own.
        share = estimate([*map(float, right)], range(len(right)), (0, 1))
        results.append(Result("accuracy", group, share, None))
    for measure, is_counted in (
        ("told, group − others", lambda row, label: True),
        ("told rightly, group − others", lambda row, label: row.label == label),
        ("told wrongly, group − others", lambda row, label: row.label != label),
    ):
        for label, group in product(labels, groups):
            some = [n for n, row in enumerate(rows) if is_counted(row, label)]
            # Less the others' rows, not all: a group that has most of all would be compared with
            # itself.
            found = difference(
                [float(said[n] == label) for n in some], [rows[n].group == group for n in some]
            )
            results.append(Result(measure, f"{label} × {group}", found, 0.0))
    return [result for result in results if result.found.items]


def difference(values: Sequence[float], is_first: Sequence[bool]) -> Estimate:
    """Return by how much the mean of the first of two kinds of shares is larger than that of the
    second, with Newcombe's interval (1998, method 10), which is made of Wilson's. No items where
    one kind has none."""
    sides = [
        [x for x, first in zip(values, is_first, strict=True) if first is side]
        for side in (True, False)
    ]
    if not all(sides):
        return Estimate(math.nan, math.nan, math.nan, 0, 0)
    p, q = (float(np.mean(side)) for side in sides)
    # Newcombe: the lower end has the first's lower and the second's upper limit, the upper end the
    # other two.
    counts = [len(side) for side in sides]
    (p_low, p_high), (q_low, q_high) = (wilson(*pair) for pair in zip((p, q), counts, strict=True))
    return Estimate(
        p - q,
        p - q - math.hypot(p - p_low, q_high - q),
        p - q + math.hypot(p_high - p, q - q_low),
        counts[0],
        counts[0],
    )
