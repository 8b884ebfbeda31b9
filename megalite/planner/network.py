"""Messages between ranks: latency plus bytes over bandwidth (the α–β model, Hockney 1994), collectives as the rings
that NCCL runs them in.

Two kinds of hop: within a node (NVLink or PCIe) and between nodes. All groups of an axis communicate at the same time,
and every GPU has its own share of its node's network, so a ring over k GPUs of each node has k shares of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalite.plan import Plan
from megalite.planner.hardware import Hardware

BASE_US = 8.4
"""A collective before its first byte moves: baseLat of ring/simple in NVIDIA/nccl src/graph/tuning.cc."""

LINK_US = 3.4
"""A hop within a node: hwLat of ring/simple over NVLink, the same file."""

LINK_SHARE = 0.8
"""Share of NVLink's datasheet bandwidth that rings reach: nccl-tests on 8 H100 show about 360 of 450 GB/s."""

NETWORK_SHARE = 0.9
"""Share of a network card's bandwidth that rings reach: nccl-tests over 400 Gbit/s InfiniBand show 45 to 48 of 50
GB/s."""


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: how many, and how many of them share a node."""

    ranks: int
    per_node: int

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.per_node)


@dataclass(frozen=True)
class Network:
    hardware: Hardware
    tensor: Group
    context: Group
    replicas: Group
    pipeline_crosses_nodes: bool

    def gather(self, num_bytes: float, group: Group) -> float:
        """Seconds of an all-gather or a reduce-scatter whose whole tensor has `num_bytes`."""
        if group.ranks == 1 or num_bytes == 0:
            return 0.0
        hops, far = group.ranks - 1, group.nodes - 1
        latency = BASE_US + (hops - far) * LINK_US + far * self.hardware.interconnect.latency_us
        return latency * 1e-6 + num_bytes * hops / group.ranks / self.bandwidth(group)

    def all_reduce(self, num_bytes: float, group: Group) -> float:
        """Seconds: a ring all-reduce is a reduce-scatter and an all-gather in one."""
        return max(0.0, 2 * self.gather(num_bytes, group) - BASE_US * 1e-6)

    def hand_over(self, num_bytes: float) -> float:
        """Seconds from one pipeline rank to the next."""
        return self._message(num_bytes, self.pipeline_crosses_nodes)

    def ring_step(self, num_bytes: float) -> float:
        """Seconds for every context rank to pass `num_bytes` to its neighbour."""
        return self._message(num_bytes, self.context.nodes > 1)

    def _message(self, num_bytes: float, far: bool) -> float:
        hop = self.hardware.interconnect.latency_us if far else LINK_US
        return (BASE_US + hop) * 1e-6 + num_bytes / self.message_bandwidth(far)

    def message_bandwidth(self, far: bool) -> float:
        """Bytes/s of one GPU to another, within a node or beyond."""
        return self._far if far else self._near

    def bandwidth(self, group: Group) -> float:
        """Bytes/s of each rank of a ring."""
        return self._near if group.nodes == 1 else min(self._near, group.per_node * self._far)

    @property
    def _near(self) -> float:
        return self.hardware.link_bytes_s * LINK_SHARE

    @property
    def _far(self) -> float:
        return self.hardware.network_bytes_s * NETWORK_SHARE


def place(plan: Plan, hardware: Hardware) -> Network:
    """Where the groups of a plan lie: ranks are numbered with the tensor axis innermost, then context, data,
    pipeline."""
    node = hardware.gpus_per_node

    def group(ranks: int, stride: int) -> Group:
        return Group(ranks, max(1, min(ranks, node // stride)))

    stride = plan.replicas * plan.tensor
    return Network(
        hardware,
        tensor=group(plan.tensor, 1),
        context=group(plan.context, plan.tensor),
        replicas=group(plan.replicas, plan.tensor),
        pipeline_crosses_nodes=plan.pipeline * stride > node,
    )
