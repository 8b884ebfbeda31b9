"""Times a mixture of experts whose rows travel between CPU ranks by all-to-all, and by all-gather: a
forward and a backward pass over the experts of a layer, from few tokens to many.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node=2 tools/bench/expert_dispatch.py

The two take turns, call by call. The figure of each is its quickest tenth's longest time, on the
slowest rank: what others do on the machine meanwhile only adds to it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from megalite.comm.mesh import ALONE, Axis, Fold
from megalite.models import model_config
from megalite.models.experts import Experts, RoutedConfig
from megalite.parallel import expert
from megalite.parallel.expert import ParallelExperts

WAYS = {"all-to-all": -1, "all-gather": 2**40}
"""What `GATHERED_BYTES` is set to."""


def make_layer(arguments: argparse.Namespace, axis: Axis) -> ParallelExperts:
    """Return this rank's experts. They are narrow: what is timed is the way to them."""
    config = model_config({
        "family": "mixtral", "vocab_size": 9, "hidden_size": arguments.hidden, "intermediate_size": 8, "num_layers": 1,
        "num_attention_heads": 1, "max_positions": 8, "num_experts": arguments.experts, "experts_per_token": 1,
    })  # fmt: skip
    assert isinstance(config, RoutedConfig)
    whole = Experts(config)
    layer = ParallelExperts(whole, Fold(axis, ALONE, ALONE, axis), own_tokens=True)
    for linear in (layer.gate_up, layer.down):
        local = linear.weight.detach().chunk(axis.size)[axis.rank].to(torch.bfloat16, copy=True)
        linear.weight = nn.Parameter(local.normal_(std=0.02))
    return layer


def make_pass(
    layer: ParallelExperts, tokens: int, arguments: argparse.Namespace
) -> Callable[[], None]:
    """Return a forward and backward pass over `tokens` tokens that visit any experts."""
    experts, visits = arguments.experts, arguments.visits
    x = torch.randn(1, tokens, arguments.hidden, dtype=torch.bfloat16, requires_grad=True)
    index = torch.rand(1, tokens, experts).topk(visits).indices.sort().values
    weight = torch.rand(1, tokens, visits, requires_grad=True)

    def run() -> None:
        layer(x, weight, index).sum().backward()

    return run


def time_ways(run: Callable[[], None], calls: int) -> dict[str, float]:
    """Return the seconds of a pass by each way, the same on all ranks."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(calls):
        for way, limit in WAYS.items():
            expert.GATHERED_BYTES = limit
            dist.barrier()
            began = time.perf_counter()
            run()
            times[way].append(time.perf_counter() - began)
    found = torch.tensor([sorted(each)[len(each) // 10] for each in times.values()])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return dict(zip(times, found.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--visits", type=int, default=2)
    parser.add_argument("--calls", type=int, default=50, help="of each way and size")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(dist.get_rank())
    axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, "expert")
    layer = make_layer(arguments, axis)
    for tokens in (1, 4, 16, 64, 256, 1024, 4096):
        gathered = (axis.size - 1) * tokens * arguments.visits * arguments.hidden * 2
        found = time_ways(make_pass(layer, tokens, arguments), arguments.calls)
        if axis.rank == 0:
            told = "  ".join(f"{way} {1e3 * seconds:8.2f} ms" for way, seconds in found.items())
            print(
                f"{axis.size} ranks, {tokens:5} tokens, {gathered / 1024:8,.0f} KiB  {told}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
