"""Step time of the native engine's ZeRO stages against torch's DistributedDataParallel, over gloo
ranks on this machine.

All train the same model from the same weights on the same batches with fp32 weights, fused AdamW
and clipping. They take turns, step by step, in one process group, so that what else the machine
does hits all alike; medians and ratios are printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import OptimizerConfig
from megalite.config_file import parse_config
from megalite.engine import Engine
from megalite.engine.optimizers.adamw import AdamWConfig
from megalite.models import family, model_config, weight_table
from megalite.models.layers import Decoder
from megalite.plan import make_plan
from megalite.training.parts import build

OPTIMIZER = AdamWConfig(lr=1e-3)
Step = Callable[[Tensor], float]


def ddp_step(preset: str) -> Step:
    config = model_config({"preset": preset})
    weights = weight_table(config)
    model = family(config.family).MODEL(config)
    read = from_seed(0, Mesh.alone())
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight in weights:
            parameters[weight.name].copy_(
                read(weight, "weight", 0, weight.numel).view(weight.shape)
            )
    decay = [parameters[w.name] for w in weights if w.decay]
    rest = [parameters[w.name] for w in weights if not w.decay]
    groups = [
        {"params": decay, "weight_decay": OPTIMIZER.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, fused=True)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(tokens: Tensor) -> float:
        loss = model.loss(wrapped(tokens[:, :-1]), tokens[:, 1:]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def native_parts(
    preset: str, zero_stage: int, ranks: int, optimizer: OptimizerConfig, precision: str
) -> tuple[Decoder, Engine]:
    config = parse_config(
        {
            "run": {"name": "bench"}, "model": {"preset": preset}, "data": {"train": [{"path": "-"}], "seq_length": 1},
            "parallel": {"zero_stage": zero_stage}, "optimizer": optimizer.model_dump(),
            "train": {"steps": 1, "global_batch_size": ranks, "precision": precision},
        }
    )  # fmt: skip
    plan = make_plan(config, weight_table(config.model), ranks)
    parts = build(config, plan, make_mesh(plan, torch.device("cpu")))
    parts.engine.load(from_seed(0, Mesh.alone()))
    return parts.stages[0].model, parts.engine


def native_step(
    preset: str,
    zero_stage: int,
    ranks: int,
    optimizer: OptimizerConfig = OPTIMIZER,
    precision: str = "fp32",
) -> Step:
    model, engine = native_parts(preset, zero_stage, ranks, optimizer, precision)

    def step(tokens: Tensor) -> float:
        loss = model.loss(model(tokens[:, :-1]), tokens[:, 1:]).mean()
        engine.begin(1)
        engine.backward(loss / ranks)
        engine.finish()
        engine.step(optimizer.lr)
        return loss.item()

    return step


def run(rank: int, ranks: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    steps = {
        f"native ZeRO-{stage}": native_step(arguments.preset, stage, ranks) for stage in (0, 1, 2)
    }
    steps = {"torch DDP": ddp_step(arguments.preset)} | steps
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, list[float]] = {name: [] for name in steps}
    vocab_size = model_config({"preset": arguments.preset}).vocab_size
    generator = torch.Generator().manual_seed(rank)
    for number in range(arguments.steps + 2):
        tokens = torch.randint(
            vocab_size, (arguments.batch, arguments.seq_length + 1), generator=generator
        )
        order = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        for name in order:
            dist.barrier()
            begin = time.perf_counter()
            losses[name].append(steps[name](tokens))
            dist.barrier()
            if number >= 2:  # the first steps allocate
                times[name].append(time.perf_counter() - begin)
    if rank == 0:
        report(arguments, ranks, times, losses)
    dist.destroy_process_group()


def report(
    arguments: argparse.Namespace,
    ranks: int,
    times: dict[str, list[float]],
    losses: dict[str, list[float]],
) -> None:
    print(
        f"{arguments.preset}, {ranks} gloo ranks, {arguments.batch} × {arguments.seq_length} tokens a rank, fp32, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    base = statistics.median(times["torch DDP"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        spread = statistics.quantiles(seconds, n=4)
        # The ratio of each step to DDP's step of the same turn: what slows a whole turn down
        # cancels.
        ratio = statistics.median(s / d for s, d in zip(seconds, times["torch DDP"], strict=True))
        print(
            f"{name:<15} median {median:.3f} s  quartiles {spread[0]:.3f} … {spread[2]:.3f}  "
            f"of medians {median / base:.2f}  median of ratios {ratio:.2f} × DDP  last loss {losses[name][-1]:.5f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-8m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="sequences a rank")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--port", type=int, default=29555)
    arguments = parser.parse_args()
    mp.spawn(run, (arguments.ranks, arguments.port, arguments), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
