"""`megalite preflight CONFIG`: checks whether all nodes are fit for a run. Started like the run
itself, one process a rank.

Each rank examines its own machine (node.py). Then neighbouring nodes time an all-reduce; every node
takes part in two, so that a slow node can be told from a slow neighbour, and before it in one of
its own ranks. Rank 0 judges (verdict.py) and prints the result. Answers travel over the rendezvous
store, not over collectives: a node that never answers is named, not waited for.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from statistics import median_low
from typing import Any

import rich.box
import rich.console
import torch.distributed as dist
from rich.table import Table

from megalite.comm.mesh import Launch, node_name
from megalite.config import Config
from megalite.data.checks import check_token_files
from megalite.health.link import Ranks, time_all_reduce, time_apart
from megalite.health.node import Facts, find_out
from megalite.health.verdict import Problem, blames_nodes, gpus_of, judge
from megalite.models import weight_table
from megalite.plan import Plan
from megalite.plan import plan as plan_of
from megalite.planner.hardware import Hardware, Interconnect, find_chip, find_interconnect
from megalite.planner.network import Group, place
from megalite.runtime.exit_codes import Exit

PATIENCE_S = 120.0
"""Time limit of each of the two rounds of answers, in seconds."""

MESSAGE_NUMBERS = {"gloo": 4 * 2**20, "nccl": 64 * 2**20}
"""Number of fp32 elements in the timed all-reduce: 16 MiB, or 256 MiB, in which GPUs reach their
links' bandwidth."""

APART = ("nccl",)
"""Backends that may end a process whose link is dead."""

SHOWN_NODES = 32
"""Largest number of nodes that the table shows in full; of more, only the unfit ones."""

UNKNOWN = "?"
"""Name of a node whose rank has not even given its name."""

Link = tuple[str, str]
"""Two nodes, the first in the ring's order before the second; or a node and itself, for the GPUs
within."""
TimedLink = tuple[str, str, float | None]
"""Two nodes and the seconds of an all-reduce between them; None where it failed."""


def preflight(
    config: Config, launch: Launch, store: dist.Store, interconnect: str | None = None
) -> Exit:
    """Check all nodes for the run of `config`, print what was found, and return the exit status,
    the same on all ranks.

    Returns DONE if all nodes are fit. UNFIT: some are not, and the output has a line
    `--exclude=NODE,NODE` that sbatch understands. MISTAKE: all nodes have the same problem.
    `launch` is this process's rank, `store` torchrun's rendezvous store. `interconnect` says what
    joins the nodes, a name or a file of `megalite plan`: then all-reduces of GPUs must come near
    what it gives. Raises ConfigError, and DataError for a damaged token file."""
    # First what all ranks find out alike: a mistake in the config needs no other node.
    plan = plan_of(config, launch.world_size)
    check_token_files(config)
    network = find_interconnect(interconnect) if interconnect else None
    board = _Board(store, launch)
    board.put("name", node_name())
    board.put("facts", asdict(find_out(config, launch)))
    leader = _Leader(board, launch.world_size) if launch.rank == 0 else None
    if leader:
        leader.call_a_meeting()
    call = board.hear("meeting")
    # Read when all ranks hear the same call, so that the clocks can be compared.
    clock = time.time()
    if call["backend"]:
        nodes = {int(rank): node for rank, node in call["nodes"].items()}
        links = _meet(nodes, call["backend"], launch, store)
        board.put("met", {"clock": clock, "links": links})
    if leader:
        checkpoint_gb = checkpoint_bytes(config) / 2**30
        board.tell("status", leader.conclude(checkpoint_gb, plan, network))
    status = Exit(board.hear("status"))
    board.leave()
    return status


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of all tensors in a checkpoint of the run: what is trained, and the
    optimizer's states, fp32."""
    # bf16 weights stand beside the fp32 ones that they are rounded from.
    each = 4 if config.train.precision == "fp32" else 2 + 4
    optimizer, total = config.optimizer, 0
    for weight in weight_table(config.model, config.lora):
        if not weight.frozen:
            rows = [optimizer.state_row(weight, state) for state in optimizer.states_of(weight)]
            total += each * weight.numel + 4 * sum(row.numel for row in rows)
    return total


class _Board:
    """Exchanges answers through the rendezvous store: every rank puts them up for rank 0, and rank
    0 tells all."""

    def __init__(self, store: dist.Store, launch: Launch):
        self._store = dist.PrefixStore("preflight", store)
        self._launch = launch

    def put(self, what: str, value: object) -> None:
        """Put up this rank's answer to a question, as JSON."""
        self._store.set(f"{what}/{self._launch.rank}", json.dumps(value))

    def collect(self, what: str, patience_s: float | None = None) -> dict[int, Any]:
        """Return the answers of the ranks that have put one up within `patience_s` (default
        PATIENCE_S), by rank."""
        keys = {rank: f"{what}/{rank}" for rank in range(self._launch.world_size)}
        if patience_s is None:
            patience_s = PATIENCE_S
        deadline = time.monotonic() + patience_s
        # Polled, because a blocking wait would not tell which ranks have answered by the deadline.
        while not self._store.check(list(keys.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        there = [rank for rank, key in keys.items() if self._store.check([key])]
        self._heard = len(there)
        return {rank: json.loads(self._store.get(keys[rank])) for rank in there}

    def tell(self, what: str, value: object) -> None:
        """Tell all ranks. Rank 0 calls it."""
        self._store.set(what, json.dumps(value))

    def hear(self, what: str) -> Any:
        """Wait for what rank 0 tells, and return it."""
        # Rank 0 collects for PATIENCE_S at most; the others wait longer than that for rank 0.
        self._store.wait([what], datetime.timedelta(seconds=2 * PATIENCE_S))
        return json.loads(self._store.get(what))

    def leave(self) -> None:
        """Leave. Rank 0 waits for the others for a moment, because the store may live in its
        process."""
        gone = self._store.add("gone", 1)
        deadline = time.monotonic() + 5.0
        while self._launch.rank == 0 and gone < self._heard and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = self._store.add("gone", 0)


class _Leader:
    """Collects the answers on rank 0 and judges them."""

    def __init__(self, board: _Board, world_size: int):
        """Wait for the facts of all ranks, PATIENCE_S at most."""
        self._board = board
        self._world_size = world_size
        answers = board.collect("facts")
        self._facts = [Facts(**answer) for answer in answers.values()]
        # Names are put up before the facts: they tell the node of a rank that got no further.
        self._nodes = board.collect("name", patience_s=0.0)
        self._heard = set(answers)
        self._complete = len(answers) == world_size

    def call_a_meeting(self) -> None:
        """Tell all ranks to time their links and over which backend. Calls it off (None) if a rank
        is missing, because the others would wait for it."""
        backend = None
        self._numel = 0
        if self._complete:
            # A GPU for each rank: NCCL refuses two on one. Their identities are the same on no two
            # nodes.
            have_gpus = gpus_of([fact.gpu for fact in self._facts]) == len(self._facts)
            backend = "nccl" if have_gpus else "gloo"
            self._numel = MESSAGE_NUMBERS[backend]
        self._board.tell("meeting", {"backend": backend, "nodes": self._nodes})

    def conclude(self, checkpoint_gb: float, plan: Plan, network: Interconnect | None) -> Exit:
        """Judge all answers and print the result. `checkpoint_gb`: GiB that a checkpoint of the
        run, whose layout is `plan`, takes. `network` joins the nodes, where that is known."""
        met = self._board.collect("met") if self._complete else {}
        heard = set(met) if self._complete else self._heard
        problems = []
        for rank in range(self._world_size):
            if rank not in heard:
                node = self._nodes.get(rank, f"{UNKNOWN} of rank {rank}")
                problems.append(Problem(node, "answer", "gave no answer"))
        clocks = {rank: meeting["clock"] for rank, meeting in met.items()}
        # Several ranks report a link; the slowest counts.
        links: dict[Link, float] = {}
        for meeting in met.values():
            for low, high, reported in meeting["links"]:
                seconds = math.inf if reported is None else reported
                links[low, high] = max(links.get((low, high), 0.0), seconds)
        expected = expected_times(self._facts, links, plan, network) if network else {}
        problems += judge(self._facts, clocks, links, checkpoint_gb, expected)
        speeds = bandwidths(self._facts, links, expected, 4 * self._numel)
        return say(self._facts, clocks, links, problems, speeds)


def bandwidths(
    facts: Sequence[Facts], links: Mapping[Link, float], expected: Mapping[Link, float], size: int
) -> dict[str, str]:
    """Return, for each node, the GB/s of the better of its links to neighbours, or within it where
    there are none, and beside it what is expected of that link, as far as that is known.

    It is bus bandwidth, as nccl-tests has it: of an all-reduce of `size` bytes over n ranks each
    link carries 2(n - 1)/n. `links` and `expected` are in seconds."""
    ranks = Counter(fact.node for fact in facts)
    found = {}
    for node in ranks:
        mine = [link for link in links if node in link]
        mine = [link for link in mine if link[0] != link[1]] or mine
        if not mine or not size:
            continue
        best = min(mine, key=links.__getitem__)
        count = sum(ranks[each] for each in set(best))
        carried = 2 * (count - 1) / count * size / 1e9
        found[node] = f"{carried / links[best]:.1f}"
        if best in expected:
            found[node] += f" of {carried / expected[best]:.1f}"
    return found


def expected_times(
    facts: Sequence[Facts], links: Container[Link], plan: Plan, network: Interconnect
) -> dict[Link, float]:
    """Return the seconds that the all-reduces of GPUs over `links` should take between nodes that
    `network` joins, within those of a known chip as well. Nodes of CPUs or of unknown chips are
    left out."""
    found: dict[Link, float] = {}
    ranks = Counter(fact.node for fact in facts if fact.gpu)
    chips = {fact.node: fact.chip for fact in facts if fact.gpu and fact.chip}
    for low, name in chips.items():
        hardware = Hardware(find_chip(name), network, ranks[low])
        for high in chips:
            if (low, high) in links:
                # Ranks of both nodes, or of the one where a link is within it; and how many of them
                # share a node.
                group = Group(ranks[low] + ranks[high] * (low != high), ranks[low])
                size = 4 * MESSAGE_NUMBERS["nccl"]
                found[low, high] = place(plan, hardware).all_reduce(size, group)
    return found


def say(
    facts: Sequence[Facts],
    clocks: Mapping[int, float],
    links: Mapping[Link, float],
    problems: Sequence[Problem],
    speeds: Mapping[str, str],
) -> Exit:
    """Print a table of the nodes, a line for each of the `problems` and what to do. Returns the
    exit status.

    `facts` are the answers that came, `clocks` the seconds since 1970 of each rank, `links` the
    seconds of each all-reduce and `speeds` what `bandwidths` says of the nodes."""
    # Silent ones have no facts.
    nodes = sorted({fact.node for fact in facts} | {problem.node for problem in problems})
    bad = {problem.node for problem in problems}
    shown = nodes if len(nodes) <= SHOWN_NODES else sorted(bad)[:SHOWN_NODES]
    width = None if sys.stdout.isatty() else 120  # of a file: rich would take 80
    console = rich.console.Console(highlight=False, width=width)
    if shown:
        rows = [fact for fact in facts if fact.node in shown]
        console.print(_table(rows, clocks, links, bad, speeds))
    for problem in problems:
        console.print(f"{problem.node}: {problem.text}", soft_wrap=True, markup=False)
    for fact in facts:
        for remark in fact.gpu_remarks:
            console.print(f"{fact.node}: to be looked at: {remark}", soft_wrap=True, markup=False)
    blamed = blames_nodes(problems, nodes)
    if blamed:
        known = [node for node in blamed if not node.startswith(UNKNOWN)]
        advice = f"--exclude={','.join(known)}" if known else "no node can be named"
        console.print(advice, soft_wrap=True, markup=False)
        return Exit.UNFIT
    if problems:
        console.print("every node has this problem: other nodes would not help")
        return Exit.MISTAKE
    are = "s are" if len(nodes) > 1 else " is"
    console.print(f"{len(nodes)} node{are} fit")
    return Exit.DONE


def _table(
    facts: Sequence[Facts],
    clocks: Mapping[int, float],
    links: Mapping[Link, float],
    bad: Container[str],
    speeds: Mapping[str, str],
) -> Table:
    """Build a table with one row a node. Of a node's ranks the worst value is shown, of its two
    links the better."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    for name in (
        "node",
        "ranks",
        "GPUs",
        "memory GB",
        "disk GB",
        "product ms",
        "all-reduce ms",
        "GB/s",
        "clock s",
        "",
    ):
        table.add_column(name, justify="left" if name in ("node", "") else "right")
    middle = median_low(clocks.values()) if clocks else 0.0
    for node in sorted({fact.node for fact in facts}):
        here = [fact for fact in facts if fact.node == node]
        memory = min(fact.memory_gb for fact in here)
        free = [gb for fact in here for gb in fact.disk_gb.values()]
        product = max(fact.product_s for fact in here)
        of_links = [
            seconds for pair, seconds in links.items() if node in pair and pair[0] != pair[1]
        ]
        skews = [clocks[fact.rank] - middle for fact in here if fact.rank in clocks]
        table.add_row(
            node,
            str(len(here)),
            str(gpus_of([fact.gpu for fact in here])),
            f"{memory:.1f}",
            f"{min(free):.1f}" if free else "-",
            f"{product * 1e3:.2f}",
            f"{min(of_links) * 1e3:.1f}" if of_links else "-",
            speeds.get(node, "-"),
            f"{max(skews, key=abs):+.2f}" if skews else "-",
            "[bold red]not fit[/]" if node in bad else "[green]fit[/]",
        )
    return table


def _meet(
    nodes: Mapping[int, str],
    backend: str,
    launch: Launch,
    store: dist.Store,
) -> list[TimedLink]:
    """Time an all-reduce with each neighbouring node of the ring, over all ranks of the two
    nodes."""
    device = str(launch.device) if backend == "nccl" else "cpu"
    timed = []
    here, ring = nodes[launch.rank], sorted(set(nodes.values()))
    for link in [(here, here), *links_of(here, ring)]:
        # Ascending on every rank, as rank 0 collected them: all see the same order of ranks within
        # the link.
        ranks = [rank for rank, node in nodes.items() if node in link]
        if len(ranks) == 1:
            continue
        # Much shorter than the round: three links that fail must still leave time to answer.
        rank, numel, timeout_s = ranks.index(launch.rank), MESSAGE_NUMBERS[backend], PATIENCE_S / 4
        meeting = Ranks("-".join(link), rank, len(ranks), backend, device, numel, timeout_s)
        seconds = (time_apart if backend in APART else time_all_reduce)(store, meeting)
        timed.append((*link, seconds))
    return timed


def links_of(node: str, nodes: Sequence[str]) -> list[Link]:
    """Return the pairs that `node` forms with its neighbours in the ring `nodes`, in the order to
    time them.

    The order is the same for all: no two nodes wait for each other in a circle."""
    count = len(nodes)
    ring: dict[tuple[int, int], int] = {}
    if count > 1:
        for i in range(count):
            after = (i + 1) % count
            ring[min(i, after), max(i, after)] = i

    # Even pairs meet first, then odd ones: pairs without a node in common meet at the same time. In
    # a ring of odd length the last pair touches both the first and the one before it, and comes by
    # itself.
    def turn(pair: tuple[int, int]) -> tuple[bool, int, int]:
        i = ring[pair]
        alone = i == count - 1 and count % 2 == 1
        return alone, i % 2, i

    pairs = [(nodes[low], nodes[high]) for low, high in sorted(ring, key=turn)]
    return [pair for pair in pairs if node in pair]
