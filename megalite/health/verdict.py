"""Judges which nodes are unfit from the facts that all ranks reported. Pure functions: nothing is
asked of a rank."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from megalite.health.node import Facts
from megalite.utils.changes import changes, spelled

SLOW_PRODUCT, SLOW_LINK = 1.5, 2.0
"""Multiples of the median above which a matrix product or a link counts as slow."""

BELOW_EXPECTED = 1.5
"""Multiple of the expected time of an all-reduce above which it counts as slow. nccl-tests on sound
nodes differ from the model of planner/network.py by much less."""

NOTICEABLE_S = 0.002
"""Smallest excess over the median, in seconds, that counts as slow."""

CLOCK_S = 2.0
"""Tolerated difference of clocks, in seconds. Beyond it, file times and certificates begin to
mislead."""

SPARE_GB = 1.0
"""Free space in GiB that temporary files and caches need."""

NAMED = 5
"""Number of differing settings or files that a message names."""

SHARED = "run folder"
"""The disk that all nodes share (a key of `Facts.disk_gb`)."""


@dataclass(frozen=True)
class Problem:
    """Says what makes a node unfit. Problems of one `kind` are compared between nodes."""

    node: str
    kind: str
    text: str


def judge(
    facts: Sequence[Facts],
    clocks: Mapping[int, float],
    links: Mapping[tuple[str, str], float],
    checkpoint_gb: float,
    expected: Mapping[tuple[str, str], float] | None = None,
) -> list[Problem]:
    """Return the problems of all nodes, one for each node and kind.

    `facts` are the answers of the ranks. `clocks`: seconds since 1970 on each rank, read at one
    moment. `links`: seconds of an all-reduce between two nodes, or within one, infinite where it
    failed; in a ring of three or more, every node is in two with others. `checkpoint_gb`: GiB that
    a checkpoint takes. `expected`: seconds that links should take, where that is known."""
    found = [
        *_gpus(facts),
        *_disks(facts, checkpoint_gb),
        *_memory(facts),
        *_differences(facts),
        *_products(facts),
        *_clocks(facts, clocks),
        *_links({pair: seconds for pair, seconds in links.items() if pair[0] != pair[1]}),
        *_links_within({pair[0]: seconds for pair, seconds in links.items() if pair[0] == pair[1]}),
        *_against_expected(links, expected or {}),
    ]
    # Read backwards, so that of several ranks of a node the first one's problem stays.
    of_node = {(problem.node, problem.kind): problem for problem in reversed(found)}
    return list(of_node.values())[::-1]


def blames_nodes(problems: Sequence[Problem], nodes: Sequence[str]) -> list[str]:
    """Return the nodes that the run should start without.

    A problem that all `nodes` have is no node's fault. Of a single node every one of its `problems`
    counts, but not the run folder's, which other nodes would share."""
    having: defaultdict[str, set[str]] = defaultdict(set)
    for problem in problems:
        having[problem.kind].add(problem.node)
    own = set()
    for kind, bad in having.items():
        if bad != set(nodes) or (len(nodes) == 1 and kind != SHARED):
            own.add(kind)
    return sorted({problem.node for problem in problems if problem.kind in own})


def _gpus(facts: Sequence[Facts]) -> list[Problem]:
    found = [Problem(fact.node, "GPU", text) for fact in facts for text in fact.gpu_troubles]
    if not any(fact.gpu for fact in facts):  # a run on CPUs
        return found
    for node in {fact.node: None for fact in facts}:
        own = [fact.gpu for fact in facts if fact.node == node]
        distinct = gpus_of(own)
        if distinct < len(own):
            found.append(
                Problem(
                    node, "GPU count", f"{_count(distinct, 'GPU')} for {_count(len(own), 'rank')}"
                )
            )
    return found


def gpus_of(own: Sequence[str]) -> int:
    """Return how many GPUs some ranks have, whose `Facts.gpu` are `own`."""
    return len(set(filter(None, own)))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _disks(facts: Sequence[Facts], checkpoint_gb: float) -> list[Problem]:
    found = []
    for fact in facts:
        found += [Problem(fact.node, name, text) for name, text in fact.disk_troubles.items()]
        for name, free in fact.disk_gb.items():
            needed, what = SPARE_GB, "wanted are"
            if name == SHARED:
                needed, what = checkpoint_gb, "a checkpoint takes"
            if free < needed:
                room = f"{free:.2f} GB free"
                text = f"{name}: {room}, {what} {needed:.2f} GB"
                found.append(Problem(fact.node, name, text))
    return found


def _memory(facts: Sequence[Facts]) -> list[Problem]:
    # Compared with other nodes, not with a fixed need: what a run needs on the CPU is not known
    # beforehand.
    typical = median_low(fact.memory_gb for fact in facts)
    found = []
    for fact in facts:
        if fact.memory_gb < typical / 2:  # something else is running there
            text = f"{fact.memory_gb:.1f} GB of memory free, others have {typical:.1f} GB"
            found.append(Problem(fact.node, "memory", text))
    return found


def _differences(facts: Sequence[Facts]) -> list[Problem]:
    """Find nodes whose code, config or product differs from most others'. If opinions are even,
    rank 0's is right."""
    found = []
    kinds: dict[str, list[Any]] = {
        "code": [fact.code for fact in facts],
        "config": [fact.config for fact in facts],
        "result of a matrix product": [fact.product for fact in facts],
    }
    for kind, values in kinds.items():
        # As text, which can be counted and compared. Empty where a rank did not measure it.
        texts = [json.dumps(value, sort_keys=True) if value else "" for value in values]
        counts = Counter(text for text in texts if text)
        right = max(counts, key=lambda text: (counts[text], text == texts[0]), default="")
        for fact, text, value in zip(facts, texts, values, strict=True):
            if text and text != right:
                difference = f"another {kind} than most ranks{_named(value, right)}"
                found.append(Problem(fact.node, kind, difference))
    return found


def _named(value: Any, right: str) -> str:
    """Name the keys in which `value` differs from `right` (JSON); empty for a value without
    keys."""
    if not isinstance(value, dict):
        return ""
    found = changes(json.loads(right), value)
    named = [f"{each.key} {spelled(each.now)}, there {spelled(each.was)}" for each in found[:NAMED]]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return ": " + "; ".join(named) + more


def _products(facts: Sequence[Facts]) -> list[Problem]:
    times = [fact.product_s for fact in facts if fact.product_s]  # 0: not measured
    typical = median_low(times) if times else 0.0
    found = []
    for fact in facts:
        if _is_slow(fact.product_s, typical, SLOW_PRODUCT):
            here, others = fact.product_s * 1e3, typical * 1e3
            text = f"rank {fact.rank}: a matrix product takes {here:.1f} ms, others {others:.1f} ms"
            found.append(Problem(fact.node, "slow product", text))
    return found


def _clocks(facts: Sequence[Facts], clocks: Mapping[int, float]) -> list[Problem]:
    typical = median_low(clocks.values()) if clocks else 0.0
    found = []
    for fact in facts:
        ahead = clocks.get(fact.rank, typical) - typical
        if abs(ahead) > CLOCK_S:
            direction = "ahead" if ahead > 0 else "behind"
            text = f"its clock is {abs(ahead):.1f} s {direction}"
            found.append(Problem(fact.node, "clock", text))
    return found


def _links(links: Mapping[tuple[str, str], float]) -> list[Problem]:
    """Find slow nodes. A link has two ends, so a node is slow only if the better of its two links
    is."""
    best: dict[str, float] = {}
    for pair, seconds in links.items():
        for node in pair:
            best[node] = min(best.get(node, float("inf")), seconds)
    typical = median_low(best.values()) if best else 0.0
    found = []
    for node, seconds in best.items():
        if seconds == math.inf:
            found.append(Problem(node, "all-reduce", "all-reduces with its neighbours failed"))
        # Of two nodes on one link, nobody can say which one is slow.
        elif len(best) > 2 and _is_slow(seconds, typical, SLOW_LINK):
            here, others = seconds * 1e3, typical * 1e3
            text = (
                f"an all-reduce with its neighbours takes {here:.1f} ms, of others {others:.1f} ms"
            )
            found.append(Problem(node, "all-reduce", text))
    return found


def _links_within(seconds: Mapping[str, float]) -> list[Problem]:
    """Find nodes whose own ranks reduce slowly or not at all, by the seconds of each node."""
    typical = median_low(seconds.values()) if seconds else 0.0
    found = []
    for node, its in seconds.items():
        if its == math.inf:
            found.append(
                Problem(node, "all-reduce within", "an all-reduce of its own ranks failed")
            )
        elif _is_slow(its, typical, SLOW_LINK):
            text = f"an all-reduce of its own ranks takes {its * 1e3:.1f} ms, of others {typical * 1e3:.1f} ms"
            found.append(Problem(node, "all-reduce within", text))
    return found


def _against_expected(
    links: Mapping[tuple[str, str], float], expected: Mapping[tuple[str, str], float]
) -> list[Problem]:
    """Find nodes none of whose links to others comes near what it should give, or not the one
    within."""
    found = []
    for within in (True, False):
        kind = "bandwidth within" if within else "bandwidth"
        best: dict[str, tuple[float, float]] = {}
        for pair, should in expected.items():
            if (pair[0] == pair[1]) == within:
                for node in pair:
                    best[node] = min(
                        best.get(node, (math.inf, math.inf)), (links[pair] / should, links[pair])
                    )
        for node, (factor, seconds) in best.items():
            if BELOW_EXPECTED < factor < math.inf:  # one that failed is named elsewhere
                with_whom = "of its own ranks" if within else "with its neighbours"
                here, should = seconds * 1e3, seconds / factor * 1e3
                text = f"an all-reduce {with_whom} takes {here:.1f} ms, and should take {should:.1f} ms"
                found.append(Problem(node, kind, text))
    return found


def _is_slow(seconds: float, typical: float, factor: float) -> bool:
    return seconds > max(factor * typical, typical + NOTICEABLE_S)
