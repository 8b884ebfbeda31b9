"""Predicts the time of messages between ranks: latency plus bytes over bandwidth (the α–β model,
Hockney 1994), with collectives as the rings that NCCL runs.

There are two kinds of hop: within a node (NVLink or PCIe) and between nodes. All groups of an axis
communicate at the same time, and every GPU has its own share of its node's network: a ring over k
GPUs of each node has k shares.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.plan import Plan
from megalite.planner.hardware import Hardware

BASE_US = 8.4
"""Latency in µs before the first byte of a collective: baseLat of ring/simple in NVIDIA/nccl
src/graph/tuning.cc."""

LINK_US = 3.4
"""Latency in µs of a hop within a node: hwLat of ring/simple over NVLink, the same file."""

LINK_SHARE = 0.8
"""Share of NVLink's datasheet bandwidth that rings reach: nccl-tests on 8 H100 show about 360 of
450 GB/s."""

NETWORK_SHARE = 0.9
"""Share of a network card's bandwidth that rings reach: nccl-tests over 400 Gbit/s InfiniBand show
45 to 48 of 50 GB/s."""


@dataclass(frozen=True)
class Group:
    """Describes a process group: its number of ranks, and how many of them share a node."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes the group spans."""
        return -(-self.ranks // self.per_node)


@dataclass(frozen=True)
class Network:
    """Computes the seconds of messages over the groups of a plan."""

    hardware: Hardware
    tensor: Group
    context: Group
    replicas: Group
    expert: Group
    expert_tensor: Group
    expert_replicas: Group
    pipeline_crosses_nodes: bool

    def gather(self, num_bytes: float, group: Group) -> float:
        """Return the seconds of an all-gather or a reduce-scatter whose whole tensor has
        `num_bytes`."""
        if group.ranks == 1 or num_bytes == 0:
            return 0.0
        hops = group.ranks - 1
        far = group.nodes - 1  # hops between nodes: the ring leaves every node once
        latency = BASE_US + (hops - far) * LINK_US + far * self.hardware.interconnect.latency_us
        return latency * 1e-6 + num_bytes * hops / group.ranks / self.bandwidth(group)

    def all_reduce(self, num_bytes: float, group: Group) -> float:
        """Return the seconds of a ring all-reduce, which is a reduce-scatter and an all-gather in
        one launch."""
        # One launch instead of two: the base latency counts once.
        return max(0.0, 2 * self.gather(num_bytes, group) - BASE_US * 1e-6)

    def all_to_all(self, num_bytes: float, group: Group, across: float | None = None) -> float:
        """Return the seconds in which every rank sends `num_bytes`, as much to each rank of the
        group, itself included. Between nodes it is as if there were `across` of them, where what
        arrives is spread within the node."""
        if group.ranks == 1 or num_bytes == 0:
            return 0.0
        # Shares of the bytes that stay in the node and that leave it; the two travel at the same
        # time.
        near = (group.per_node - 1) / group.ranks
        far = 1 - group.per_node / group.ranks
        if across is not None:
            near, far = (group.per_node - 1) / group.per_node, far * across / num_bytes
        latency = BASE_US + (self.hardware.interconnect.latency_us if far else LINK_US)
        return latency * 1e-6 + num_bytes * max(near / self._near, far / self._far)

    def spread_bandwidth(self, group: Group) -> float:
        """Return the bytes/s that a rank sends to others in an all-to-all, some of which are in its
        node."""
        if group.nodes == 1:
            return self._near
        near, far = group.per_node - 1, group.ranks - group.per_node
        return (group.ranks - 1) / max(near / self._near, far / self._far)

    def hand_over(self, num_bytes: float) -> float:
        """Return the seconds of a message from one pipeline rank to the next."""
        return self._message(num_bytes, self.pipeline_crosses_nodes)

    def ring_step(self, num_bytes: float) -> float:
        """Return the seconds for every context rank to pass `num_bytes` to its neighbour."""
        return self._message(num_bytes, self.context.nodes > 1)

    def _message(self, num_bytes: float, far: bool) -> float:
        hop = self.hardware.interconnect.latency_us if far else LINK_US
        return (BASE_US + hop) * 1e-6 + num_bytes / self.message_bandwidth(far)

    def message_bandwidth(self, far: bool) -> float:
        """Return the bandwidth in bytes/s from one GPU to another, of the same node or `far`."""
        return self._far if far else self._near

    def bandwidth(self, group: Group) -> float:
        """Return the bandwidth in bytes/s of each rank of a ring."""
        if group.nodes == 1:
            return self._near
        # The ring's traffic leaves the node through the network shares of all its GPUs there.
        return min(self._near, group.per_node * self._far)

    @property
    def _near(self) -> float:
        return self.hardware.link_bytes_s * LINK_SHARE

    @property
    def _far(self) -> float:
        return self.hardware.network_bytes_s * NETWORK_SHARE


def place(plan: Plan, hardware: Hardware) -> Network:
    """Find out which groups of a plan lie within a node.

    Ranks are numbered with the tensor axis innermost, then context, data, pipeline."""
    node = hardware.gpus_per_node

    def group(ranks: int, stride: int) -> Group:
        """Return the group of every `stride`-th rank."""
        # Every stride-th rank: so many of them lie on a node's neighbouring ranks.
        per_node = max(1, min(ranks, node // stride))
        return Group(ranks, per_node)

    stride = plan.replicas * plan.tensor
    experts = plan.experts
    return Network(
        hardware,
        tensor=group(plan.tensor, 1),
        context=group(plan.context, plan.tensor),
        replicas=group(plan.replicas, plan.tensor),
        expert=group(experts.expert, experts.tensor),
        expert_tensor=group(experts.tensor, 1),
        expert_replicas=group(plan.replicas_of(experts), experts.holders),
        pipeline_crosses_nodes=plan.pipeline * stride > node,
    )
