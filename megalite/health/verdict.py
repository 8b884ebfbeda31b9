"""Which nodes are not fit, from what all ranks found out. No rank is asked anything here."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from megalite.changes import changes, shown
from megalite.health.node import Facts

SLOW_PRODUCT, SLOW_LINK = 1.5, 2.0
"""Times the median, from where a node is too slow to train with the others."""

NOTICEABLE_S = 0.002
"""Less than this is not called slow."""

CLOCK_S = 2.0
"""How far clocks may be apart. Files' times and certificates begin to mislead beyond."""

SPARE_GB = 1.0
"""That temporary files and caches need at least."""

NAMED = 5
"""Settings or files that differ."""

SHARED = "run folder"


@dataclass(frozen=True)
class Problem:
    node: str
    kind: str
    text: str


def judge(
    facts: Sequence[Facts], clocks: Mapping[int, float], links: Mapping[tuple[str, str], float], checkpoint_gb: float
) -> list[Problem]:
    """`clocks`: seconds since 1970 on each rank, read at one moment. `links`: seconds of an all-reduce between two
    nodes, infinite where it failed; each node is in two of them, if there are so many nodes. One problem of a kind and
    node is enough."""
    found = [
        *_gpus(facts),
        *_disks(facts, checkpoint_gb),
        *_memory(facts),
        *_differences(facts),
        *_products(facts),
        *_clocks(facts, clocks),
        *_links(links),
    ]
    return list({(problem.node, problem.kind): problem for problem in reversed(found)}.values())[::-1]


def blames_nodes(problems: Sequence[Problem], nodes: Sequence[str]) -> list[str]:
    """Nodes that the run could start without. What all have in common is no node's fault, nor is the run folder, which
    they share."""
    having: defaultdict[str, set[str]] = defaultdict(set)
    for problem in problems:
        having[problem.kind].add(problem.node)
    own = {kind for kind, bad in having.items() if bad != set(nodes) or (len(nodes) == 1 and kind != SHARED)}
    return sorted({problem.node for problem in problems if problem.kind in own})


def _gpus(facts: Sequence[Facts]) -> list[Problem]:
    troubles = [Problem(fact.node, "GPU", text) for fact in facts for text in fact.gpu_troubles]
    if not any(fact.gpus for fact in facts):
        return troubles
    return troubles + [
        Problem(fact.node, "GPU count", f"{fact.gpus} GPUs for {fact.ranks_here} ranks")
        for fact in facts
        if fact.gpus < fact.ranks_here
    ]


def _disks(facts: Sequence[Facts], checkpoint_gb: float) -> list[Problem]:
    found = []
    for fact in facts:
        found += [Problem(fact.node, name, text) for name, text in fact.disk_troubles.items()]
        for name, free in fact.disk_gb.items():
            needed, what = (checkpoint_gb, "a checkpoint takes") if name == SHARED else (SPARE_GB, "wanted are")
            if free < needed:
                found.append(Problem(fact.node, name, f"{name}: {free:.2f} GB free, {what} {needed:.2f} GB"))
    return found


def _memory(facts: Sequence[Facts]) -> list[Problem]:
    typical = median_low(fact.memory_gb for fact in facts)
    return [
        Problem(fact.node, "memory", f"{fact.memory_gb:.1f} GB of memory free, others have {typical:.1f} GB")
        for fact in facts
        if fact.memory_gb < typical / 2
    ]


def _differences(facts: Sequence[Facts]) -> list[Problem]:
    """What must be the same everywhere; most have it right, and the first rank where opinions are even."""
    found = []
    kinds: dict[str, list[Any]] = {
        "code": [fact.code for fact in facts],
        "config": [fact.config for fact in facts],
        "result of a matrix product": [fact.product for fact in facts],
    }
    for kind, values in kinds.items():
        texts = [json.dumps(value, sort_keys=True) if value else "" for value in values]
        counts = Counter(text for text in texts if text)
        right = max(counts, key=lambda text: (counts[text], text == texts[0]), default="")
        for fact, text, value in zip(facts, texts, values, strict=True):
            if text and text != right:
                found.append(Problem(fact.node, kind, f"another {kind} than most ranks{_named(value, right)}"))
    return found


def _named(value: Any, right: str) -> str:
    """Which keys differ; nothing of what has none."""
    if not isinstance(value, dict):
        return ""
    found = changes(json.loads(right), value)
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ": " + "; ".join(f"{each.key} {shown(each.now)}, there {shown(each.was)}" for each in found[:NAMED]) + more


def _products(facts: Sequence[Facts]) -> list[Problem]:
    times = [fact.product_s for fact in facts if fact.product_s]
    typical = median_low(times) if times else 0.0
    return [
        Problem(
            fact.node,
            "slow product",
            f"rank {fact.rank}: a matrix product takes {fact.product_s * 1e3:.1f} ms, others {typical * 1e3:.1f} ms",
        )
        for fact in facts
        if _is_slow(fact.product_s, typical, SLOW_PRODUCT)
    ]


def _clocks(facts: Sequence[Facts], clocks: Mapping[int, float]) -> list[Problem]:
    typical = median_low(clocks.values()) if clocks else 0.0
    found = []
    for fact in facts:
        ahead = clocks.get(fact.rank, typical) - typical
        if abs(ahead) > CLOCK_S:
            text = f"its clock is {abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}"
            found.append(Problem(fact.node, "clock", text))
    return found


def _links(links: Mapping[tuple[str, str], float]) -> list[Problem]:
    """A link has two ends: a node is slow when the better of its two links is."""
    best: dict[str, float] = {}
    for pair, seconds in links.items():
        for node in pair:
            best[node] = min(best.get(node, float("inf")), seconds)
    if len(best) < 3:  # of two nodes, nobody can say which one it is
        return []
    typical = median_low(best.values())
    return [
        Problem(
            node,
            "slow all-reduce",
            f"an all-reduce with its neighbours takes {seconds * 1e3:.1f} ms, of others {typical * 1e3:.1f} ms",
        )
        for node, seconds in best.items()
        if _is_slow(seconds, typical, SLOW_LINK)
    ]


def _is_slow(seconds: float, typical: float, factor: float) -> bool:
    return seconds > max(factor * typical, typical + NOTICEABLE_S)
