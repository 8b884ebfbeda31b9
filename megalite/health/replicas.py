"""Finds silent data corruption: ranks that must hold the same bits, and do not.

Every replica holds the weights. Weights that are not sharded are also held by every tensor rank,
tied ones by the first and last pipeline stage; the optimizer state likewise where ZeRO does not
shard it. Every `health.weights_check_every` steps, and before every checkpoint, each rank adds up
the bits of the tensors it shares with the same ranks. An all-gather exchanges these few checksums,
and the hosts compare them two steps later: only a save waits for the device. A flipped bit changes
a sum.

Weights are checked after the backward pass, before their update. By then they have served a step;
and under ZeRO the update would replace them with what their owner holds, which hides a fault.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from megalite.comm.collectives import all_gather
from megalite.comm.mesh import Mesh
from megalite.engine import Sharing
from megalite.health.late import Late

NAMED = 8
"""Number of ranks that a message names."""

KINDS = tuple(
    Sharing(replicas, holders, ends, of_experts)
    for of_experts, replicas, holders, ends in product((False, True), repeat=4)
    if replicas or holders or ends
)
"""All ways in which ranks can share a tensor."""


@dataclass(frozen=True)
class Disagreement:
    """Names a group of ranks that must hold the same bits, and those of them that differ."""

    ranks: tuple[int, ...]
    differ: tuple[int, ...]
    """The minority; all ranks of the group if there is no majority."""

    @property
    def is_certain(self) -> bool:
        """True if a majority agrees, so that `differ` are the faulty ranks."""
        return self.differ != self.ranks


class ReplicaCheck:
    """Compares checksums of the tensors that ranks share.

    Every rank has one and calls `begin` and `look` at the same places of the same steps."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._late: Late[int] = Late(mesh.device)

    def begin(self, step: int, copies: Iterable[tuple[Sharing, Tensor]]) -> None:
        """Sum up the bits of `copies` in step `step` and exchange the sums. A collective.

        `copies` are this rank's contiguous tensors with how they are shared, in an order that is
        the same on all ranks that hold them."""
        sums = [torch.zeros((), dtype=torch.int64, device=self._mesh.device) for _ in KINDS]
        for sharing, tensor in copies:
            # Tensors that nobody else holds have nothing to be compared with.
            if sharing in KINDS:
                place = KINDS.index(sharing)
                checksum = _as_integers(tensor).sum(dtype=torch.int64)
                # The factor makes the order matter, so that two swapped tensors show. int64 wraps
                # around.
                sums[place] = sums[place] * 31 + checksum
        # [world, KINDS] int64 on every rank: each compares all groups, and all come to one answer.
        table = all_gather(torch.stack(sums)[None], self._mesh.world, 0)
        self._late.add(step, step, table)

    def look(self, step: int, all_of_them: bool) -> tuple[int, list[Disagreement]]:
        """Return (step that was checked, its disagreements) of the first check by step `step` that
        found some.

        Checks are read some steps after `begin` (late.py), or `all_of_them` at once."""
        for checked, table in self._late.take(step, all_of_them):
            found = disagreements(table, self._mesh)
            if found:
                return checked, found
        return step, []


def _as_integers(tensor: Tensor) -> Tensor:
    """View the bits of a contiguous tensor as integers: int64 where its size allows, which is
    faster to add up.

    The choice depends on the size alone, not on the alignment, which may differ between ranks."""
    flat = tensor.detach().view(-1)
    if flat.nbytes % 8:
        return flat.view({1: torch.int8, 2: torch.int16}.get(flat.element_size(), torch.int32))
    # Not aligned to 8 bytes: a view as int64 is refused.
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    return flat.view(torch.int64)


def disagreements(table: Sequence[Sequence[int]], mesh: Mesh) -> list[Disagreement]:
    """Compare the checksums `table` [world][KINDS] of all ranks within each group that must be
    equal."""
    found = []
    for number, sharing in enumerate(KINDS):
        # Ranks with one key must have one checksum.
        groups: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
        for rank in range(len(table)):
            groups[_group_of(rank, sharing, mesh)].append(rank)
        for ranks in groups.values():
            counts = Counter(table[rank][number] for rank in ranks)
            (most, times), *others = counts.most_common()
            if not others:
                continue
            differ = ranks
            if 2 * times > len(ranks):
                differ = [rank for rank in ranks if table[rank][number] != most]
            found.append(Disagreement(tuple(ranks), tuple(differ)))
    return found


def describe(step: int, found: Sequence[Disagreement], hosts: Sequence[str]) -> str:
    """Say for a person what was `found` in `step`. `hosts` are the node names of all ranks."""
    texts = []
    for each in found:
        differ = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in each.differ[:NAMED])
        if len(each.differ) > NAMED:
            differ += f" and {len(each.differ) - NAMED} more"
        if each.is_certain:
            equal = len(each.ranks) - len(each.differ)
            texts.append(f"{differ} holds other bits than the {equal} ranks it must equal")
        else:
            texts.append(
                f"{differ} must hold the same bits and do not; without a majority, it may be any of them"
            )
    said = "; ".join(dict.fromkeys(texts))  # one fault may show in several groups
    return f"silent data corruption, found in step {step}: {said}. Test those nodes' memory, or leave them out"


def _group_of(rank: int, sharing: Sharing, mesh: Mesh) -> tuple[int, int, int]:
    """Return the same key for all ranks that hold a tensor of this `sharing` alike."""
    pipeline, replica, holder = mesh.place_of(
        rank, mesh.experts if sharing.of_experts else mesh.dense
    )
    # Tied embeddings live on the first and the last stage.
    if sharing.ends and pipeline == mesh.pipeline.size - 1:
        pipeline = 0
    if sharing.replicas:
        replica = 0
    if sharing.holders:
        holder = 0
    return pipeline, replica, holder
