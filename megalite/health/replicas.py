"""Finds silent data corruption: ranks that must hold the same bits, and do not.

Weights are held by every replica, those that are not cut also by every tensor rank, tied ones by both ends of a
pipeline; so is the optimizer state, where it is not shared out. Every `health.weights_check_every` steps, and before
every checkpoint, each rank adds up the bits of what it shares with the same ranks, all ranks tell each other these few
sums, and the hosts compare them two steps later: no device is waited for but before a save. A flipped bit changes a
sum.

The weights are looked at after the backward pass, before their update: they have served a step by then, and where
replicas share out the optimizer, the update replaces them by what another rank holds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from megalite.engine import Sharing
from megalite.health.late import Late
from megalite.mesh import Mesh
from megalite.parallel.collectives import all_gather

NAMED = 8
"""Ranks, in what a person is told."""

KINDS = tuple(Sharing(*flags) for flags in product((False, True), repeat=3))[1:]


@dataclass(frozen=True)
class Disagreement:
    """Ranks that must hold the same bits, and hold others."""

    ranks: tuple[int, ...]
    differ: tuple[int, ...]
    """Those that are in the minority; all of them, where there is no majority."""

    @property
    def is_certain(self) -> bool:
        return self.differ != self.ranks


class ReplicaCheck:
    """Every rank has one, and begins and looks at the same places of the same steps."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._late: Late[int] = Late(mesh.device)

    def begin(self, step: int, copies: Iterable[tuple[Sharing, Tensor]]) -> None:
        """`copies`: contiguous tensors of this rank, in an order that is the same on all that hold them too."""
        sums = [torch.zeros((), dtype=torch.int64, device=self._mesh.device) for _ in KINDS]
        for sharing, tensor in copies:
            if sharing in KINDS:
                # The factor tells apart two tensors that are swapped; sums wrap around.
                place = KINDS.index(sharing)
                sums[place] = sums[place] * 31 + _words(tensor).sum(dtype=torch.int64)
        table = all_gather(torch.stack(sums)[None], self._mesh.world, 0)
        self._late.add(step, step, table)

    def look(self, step: int, all_of_them: bool) -> tuple[int, list[Disagreement]]:
        """In step `step`: what was begun some steps ago, or all of it. (The step in which ranks disagreed, how.)"""
        for checked, table in self._late.take(step, all_of_them):
            found = disagreements(table, self._mesh)
            if found:
                return checked, found
        return step, []


def _words(tensor: Tensor) -> Tensor:
    """The bits of a contiguous tensor as whole numbers: long ones where its size allows, which are added up faster. Not
    where its place in memory allows, which may differ between ranks."""
    flat = tensor.detach().view(-1)
    if flat.nbytes % 8:
        return flat.view(torch.int16 if flat.element_size() == 2 else torch.int32)
    return (flat.clone() if flat.storage_offset() * flat.element_size() % 8 else flat).view(torch.int64)


def disagreements(table: Sequence[Sequence[int]], mesh: Mesh) -> list[Disagreement]:
    """table: [world][KINDS], the sums of every rank."""
    found = []
    for number, sharing in enumerate(KINDS):
        groups: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        for rank in range(len(table)):
            groups[_group_of(rank, sharing, mesh)].append(rank)
        for ranks in groups.values():
            counts = Counter(table[rank][number] for rank in ranks)
            (most, times), *others = counts.most_common()
            if others:
                differ = [rank for rank in ranks if table[rank][number] != most] if 2 * times > len(ranks) else ranks
                found.append(Disagreement(tuple(ranks), tuple(differ)))
    return found


def describe(step: int, found: Sequence[Disagreement], hosts: Sequence[str]) -> str:
    """hosts: of every rank."""
    texts = []
    for each in found:
        differ = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in each.differ[:NAMED])
        differ += f" and {len(each.differ) - NAMED} more" if len(each.differ) > NAMED else ""
        if each.is_certain:
            texts.append(f"{differ} holds other bits than the {len(each.ranks) - len(each.differ)} ranks it must equal")
        else:
            texts.append(f"{differ} must hold the same bits and do not; without a majority, it may be any of them")
    return (
        f"silent data corruption, found in step {step}: {'; '.join(dict.fromkeys(texts))}. Test those nodes' memory, "
        "or leave them out"
    )


def _group_of(rank: int, sharing: Sharing, mesh: Mesh) -> tuple[int, int, int]:
    pipeline, replica, tensor = mesh.place_of(rank)
    if sharing.ends and pipeline == mesh.pipeline.size - 1:
        pipeline = 0
    return pipeline, 0 if sharing.replicas else replica, 0 if sharing.tensor else tensor
