"""`megalite preflight CONFIG`: are all nodes fit for this run? Started as the run itself is, a process a rank.

Each rank looks at its own machine (node.py); then neighbouring nodes time an all-reduce, each with two others, so that
a slow node can be told from a slow neighbour; rank 0 judges (verdict.py) and says so. What ranks have to say goes over
the rendezvous store, not over collectives: a node that never answers is missed by name, not waited for.
"""

from __future__ import annotations

import datetime
import json
import math
import sys
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from statistics import median_low
from typing import Any

import rich.box
import rich.console
import torch
import torch.distributed as dist
from rich.table import Table

from megalite.config import Config
from megalite.data.checks import check_token_files
from megalite.exit_codes import Exit
from megalite.health.node import Facts, best_time, find_out
from megalite.health.verdict import Problem, blames_nodes, judge
from megalite.mesh import Launch, node_name
from megalite.models import weight_table
from megalite.plan import make_plan

PATIENCE_S = 120.0
"""For each of the two rounds of answers."""

MESSAGE_NUMBERS = 4 * 2**20
"""fp32 numbers of an all-reduce: 16 MB."""

SHOWN_NODES = 32

UNKNOWN = "?"
"""A node whose rank has not even given its name."""

Link = tuple[str, str]
TimedLink = tuple[str, str, float | None]
"""Two nodes, and the seconds an all-reduce between them takes; None where it failed."""


def preflight(config: Config, launch: Launch, store: dist.Store) -> Exit:
    """DONE; UNFIT where nodes are to be left out, and a line of the output is `--exclude=NODE,NODE`, which sbatch
    understands; MISTAKE where all nodes have the same problem. The same on all ranks. Raises ConfigError, and DataError
    for a token file that is damaged."""
    plan = make_plan(config, weight_table(config.model, config.lora), launch.world_size)
    check_token_files(config)
    board = _Board(store, launch)
    board.put("name", node_name())
    board.put("facts", asdict(find_out(config, launch)))
    leader = _Leader(board, launch.world_size) if launch.rank == 0 else None
    if leader:
        leader.call_a_meeting()
    call = board.hear("meeting")
    clock = time.time()  # all hear it at about the same moment
    if call["backend"]:
        nodes = {int(rank): node for rank, node in call["nodes"].items()}
        board.put("met", {"clock": clock, "links": _meet(nodes, call["backend"], launch, store)})
    if leader:
        # Of a weight in bf16: itself and three states in fp32.
        board.tell("status", leader.conclude(checkpoint_gb=14 * plan.num_params / 2**30))
    status = Exit(board.hear("status"))
    board.leave()
    return status


class _Board:
    """Where every rank pins what it has to say, for rank 0, and finds what rank 0 says to all."""

    def __init__(self, store: dist.Store, launch: Launch):
        self._store, self._launch = dist.PrefixStore("preflight", store), launch

    def put(self, what: str, value: object) -> None:
        self._store.set(f"{what}/{self._launch.rank}", json.dumps(value))

    def collect(self, what: str, patience_s: float | None = None) -> dict[int, Any]:
        """What each rank has put, of those that have in time (PATIENCE_S)."""
        ranks = range(self._launch.world_size)
        deadline = time.monotonic() + (PATIENCE_S if patience_s is None else patience_s)
        while not self._store.check([f"{what}/{rank}" for rank in ranks]) and time.monotonic() < deadline:
            time.sleep(0.05)
        there = [rank for rank in ranks if self._store.check([f"{what}/{rank}"])]
        self._heard = len(there)
        return {rank: json.loads(self._store.get(f"{what}/{rank}")) for rank in there}

    def tell(self, what: str, value: object) -> None:
        self._store.set(what, json.dumps(value))

    def hear(self, what: str) -> Any:
        # Rank 0 waits for others for so long, and they for rank 0 a little longer.
        self._store.wait([what], datetime.timedelta(seconds=2 * PATIENCE_S))
        return json.loads(self._store.get(what))

    def leave(self) -> None:
        """The store may live in rank 0, which goes last."""
        gone = self._store.add("gone", 1)
        deadline = time.monotonic() + 5.0
        while self._launch.rank == 0 and gone < self._heard and time.monotonic() < deadline:
            time.sleep(0.02)
            gone = self._store.add("gone", 0)


class _Leader:
    """Rank 0: hears all, and judges."""

    def __init__(self, board: _Board, world_size: int):
        self._board, self._world_size = board, world_size
        answers = board.collect("facts")
        self._facts = [Facts(**answer) for answer in answers.values()]
        self._nodes = board.collect("name", patience_s=0.0)
        self._heard = set(answers)
        self._complete = len(answers) == world_size

    def call_a_meeting(self) -> None:
        """None where a rank is missing: it would be waited for."""
        backend = "nccl" if all(fact.gpus >= fact.ranks_here for fact in self._facts) else "gloo"
        self._board.tell("meeting", {"backend": backend if self._complete else None, "nodes": self._nodes})

    def conclude(self, checkpoint_gb: float) -> Exit:
        met = self._board.collect("met") if self._complete else {}
        heard = set(met) if self._complete else self._heard
        problems = [
            Problem(self._nodes.get(rank, f"{UNKNOWN} of rank {rank}"), "answer", "gave no answer")
            for rank in range(self._world_size)
            if rank not in heard
        ]
        clocks = {rank: meeting["clock"] for rank, meeting in met.items()}
        links: dict[Link, float] = {}
        for meeting in met.values():
            for low, high, seconds in meeting["links"]:
                links[low, high] = max(links.get((low, high), 0.0), math.inf if seconds is None else seconds)
        problems += judge(self._facts, clocks, links, checkpoint_gb)
        return say(self._facts, clocks, links, problems)


def say(
    facts: Sequence[Facts], clocks: Mapping[int, float], links: Mapping[Link, float], problems: Sequence[Problem]
) -> Exit:
    """The table, a line a problem, and what to do."""
    nodes = sorted({fact.node for fact in facts} | {problem.node for problem in problems})
    bad = {problem.node for problem in problems}
    shown = nodes if len(nodes) <= SHOWN_NODES else sorted(bad)[:SHOWN_NODES]
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    if shown:
        console.print(_table([fact for fact in facts if fact.node in shown], clocks, links, bad))
    for problem in problems:
        console.print(f"{problem.node}: {problem.text}", soft_wrap=True, markup=False)
    for fact in facts:
        for remark in fact.gpu_remarks:
            console.print(f"{fact.node}: to be looked at: {remark}", soft_wrap=True, markup=False)
    blamed = blames_nodes(problems, nodes)
    if blamed:
        known = [node for node in blamed if not node.startswith(UNKNOWN)]
        console.print(f"--exclude={','.join(known)}" if known else "no node can be named", soft_wrap=True, markup=False)
        return Exit.UNFIT
    if problems:
        console.print("every node has this problem: other nodes would not help")
        return Exit.MISTAKE
    console.print(f"{len(nodes)} node{'s are' if len(nodes) > 1 else ' is'} fit")
    return Exit.DONE


def _table(
    facts: Sequence[Facts], clocks: Mapping[int, float], links: Mapping[Link, float], bad: Container[str]
) -> Table:
    """A row a node; of several ranks, what is worst."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    for name in ("node", "ranks", "GPUs", "memory GB", "disk GB", "product ms", "all-reduce ms", "clock s", ""):
        table.add_column(name, justify="left" if name in ("node", "") else "right")
    middle = median_low(clocks.values()) if clocks else 0.0
    for node in sorted({fact.node for fact in facts}):
        here = [fact for fact in facts if fact.node == node]
        free = [gb for fact in here for gb in fact.disk_gb.values()]
        of_links = [seconds for pair, seconds in links.items() if node in pair]
        skew = max((clocks[fact.rank] - middle for fact in here if fact.rank in clocks), key=abs, default=None)
        table.add_row(
            node,
            str(len(here)),
            str(here[0].gpus),
            f"{min(fact.memory_gb for fact in here):.1f}",
            f"{min(free):.1f}" if free else "-",
            f"{max(fact.product_s for fact in here) * 1e3:.2f}",
            f"{min(of_links) * 1e3:.1f}" if of_links else "-",
            "-" if skew is None else f"{skew:+.2f}",
            "[bold red]not fit[/]" if node in bad else "[green]fit[/]",
        )
    return table


def _meet(nodes: Mapping[int, str], backend: str, launch: Launch, store: dist.Store) -> list[TimedLink]:
    device = launch.device if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timed = []
    for link in links_of(nodes[launch.rank], sorted(set(nodes.values()))):
        ranks = [rank for rank, node in nodes.items() if node in link]
        own = dist.PrefixStore("-".join(link), store)
        timed.append((*link, _time_all_reduce(own, ranks.index(launch.rank), len(ranks), backend, device)))
    return timed


def _time_all_reduce(store: dist.Store, rank: int, world_size: int, backend: str, device: torch.device) -> float | None:
    """Between all that call it with the same store. None where it fails."""
    timeout = datetime.timedelta(seconds=PATIENCE_S / 4)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        numbers = torch.zeros(MESSAGE_NUMBERS, device=device)
        return best_time(lambda: dist.all_reduce(numbers), device, repeats=8)
    except RuntimeError:
        return None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def links_of(node: str, nodes: Sequence[str]) -> list[Link]:
    """Of nodes in a ring, the pairs one is in, in an order in which no two nodes wait for each other in a circle."""
    count = len(nodes)
    ring = {(min(i, (i + 1) % count), max(i, (i + 1) % count)): i for i in range(count) if count > 1}
    # Pairs that have no node in common meet at the same time: every other one; the last of an odd number by itself.
    order = sorted(ring, key=lambda pair: (ring[pair] == count - 1 and count % 2 == 1, ring[pair] % 2, ring[pair]))
    return [(nodes[low], nodes[high]) for low, high in order if node in (nodes[low], nodes[high])]
