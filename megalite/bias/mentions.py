"""Mentions of groups of people in a corpus beside what the model prefers: is a group that is spoken
of more often also what the model finds likelier, where the rest of a text is the same?"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalite.bias.intervals import Estimate, estimate, means_drawn, spearman
from megalite.bias.measures import Compared
from megalite.errors import DataError
from megalite.utils.outside import read_object

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
FEWEST = 4
"""Groups that an interval of a rank correlation needs."""


class Mention(NamedTuple):
    """How often a corpus speaks of a group, and how much a model prefers it."""

    group: str
    """AXIS/NAME."""
    documents: int
    relative: float
    """Logarithm to the base 2 of the documents over the geometric mean of the axis' groups."""
    preferred: Estimate
    """Nats by which texts of it are likelier than the mean of those that they are compared with."""


class Mentions(NamedTuple):
    """Holds what mentions and preferences have to do with each other."""

    found: list[Mention]
    correlation: Estimate
    """Spearman's, over groups, of the relative mentions and the preferences."""


def read_mentions(file: Path) -> dict[str, int]:
    """Return how many documents mention each group by the report.json of `megalite corpus`. Raise
    DataError for another file, or a corpus whose mentions were not counted."""
    groups = read_object(file, DataError).get("groups")
    named = groups.get("groups") if isinstance(groups, dict) else None
    if not isinstance(named, dict) or not named:
        raise DataError(
            f"{file} has no mentions of groups under `groups`; `megalite corpus` counts them in its stage `words`"
        )
    try:
        return {str(name): int(counts["documents"]) for name, counts in named.items()}
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{file}: groups.groups must tell the documents of each group") from None


def preferences(
    compared: Sequence[Compared], group_of: Mapping[str, str]
) -> dict[str, list[tuple[str, float]]]:
    """Return for each group the cluster of each text that mentions it, and by how many nats that is
    likelier than the mean of the texts that it is compared with. A group that all of them mention
    is not what they differ in."""
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for cluster, texts, scores in compared:
        mentioned = [
            {group_of[word] for word in WORD.findall(text.lower()) if word in group_of}
            for text in texts
        ]
        everywhere = set.intersection(*mentioned)
        mean = sum(scores) / len(scores)
        for groups, score in zip(mentioned, scores, strict=True):
            for group in groups - everywhere:
                found[group].append((cluster, score - mean))
    return dict(found)


def relate(preferred: Mapping[str, list[tuple[str, float]]], counts: Mapping[str, int]) -> Mentions:
    """Return mentions beside preferences, of the groups that have both and are not the only ones of
    their axis."""
    both = [group for group in counts if group in preferred]
    axes = [group.partition("/")[0] for group in both]
    groups = [group for group, axis in zip(both, axes, strict=True) if axes.count(axis) > 1]
    # One more of each, for groups that are never mentioned.
    logs = {group: float(np.log2(counts[group] + 1)) for group in groups}
    found = []
    for group in groups:
        # Within an axis: that more is said of women than of Buddhists says nothing of either.
        axis = [logs[x] for x in groups if x.partition("/")[0] == group.partition("/")[0]]
        clusters, nats = zip(*preferred[group], strict=True)
        found.append(
            Mention(group, counts[group], logs[group] - float(np.mean(axis)), estimate(nats, clusters))
        )  # fmt: skip
    return Mentions(found, _correlation(found, preferred))


def _correlation(
    found: Sequence[Mention], preferred: Mapping[str, list[tuple[str, float]]]
) -> Estimate:
    """Return Spearman's correlation with its interval, by a bootstrap that draws clusters of items
    and then groups: both are samples."""
    number = len(found)
    mentions_K = np.array([mention.relative for mention in found])
    nats_K = np.array([mention.preferred.value for mention in found])
    if number < 2:
        return Estimate(float("nan"), float("nan"), float("nan"), number, number)
    value = float(spearman(mentions_K, nats_K))
    if number < FEWEST:
        return Estimate(value, float("nan"), float("nan"), number, number)
    names = dict.fromkeys(name for mention in found for name, _ in preferred[mention.group])
    at = {name: place for place, name in enumerate(names)}
    sums_CK, counts_CK = np.zeros((2, len(at), number))
    for k, mention in enumerate(found):
        for name, nats in preferred[mention.group]:
            sums_CK[at[name], k] += nats
            counts_CK[at[name], k] += 1
    drawn_RK = means_drawn(sums_CK, counts_CK)
    generator = np.random.Generator(np.random.Philox(number))
    # With replacement: a group may come twice, with the nats of this draw's items.
    groups_RK = generator.integers(number, size=drawn_RK.shape)
    drawn_R = spearman(mentions_K[groups_RK], np.take_along_axis(drawn_RK, groups_RK, 1))
    # A draw that has one group alone has no ranks to compare, and is NaN.
    low, high = np.nanquantile(drawn_R, (0.025, 0.975))
    return Estimate(value, float(low), float(high), number, number)


def told(mentions: Mentions) -> dict[str, Any]:
    """Return mentions as JSON holds them."""
    return {
        "groups": [each._asdict() | {"preferred": each.preferred._asdict()} for each in mentions.found],
        "rank_correlation": mentions.correlation._asdict(),
    }  # fmt: skip
