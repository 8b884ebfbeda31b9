"""A whole training step with Muon beside the same with AdamW, over gloo ranks on this machine.

Both train the same model from the same weights on the same batches under ZeRO-1. They take turns, step by step, in
one process group, so that what else the machine does hits both alike; medians and ratios are printed. On a machine that
others use as well, go by the seconds of the CPU.

With --alone: what the engine does after the backward on one process, beside torch.optim.Muon for the same matrices,
fused torch.optim.AdamW for the rest, and clipping.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from zero_vs_ddp import native_parts, native_step

from megalite.config import OptimizerConfig
from megalite.models import model_config, weight_table
from megalite.models.weights import Weight
from megalite.runtime.host_memory import keep_freed_memory


class Times(NamedTuple):
    """Of a step of the first rank, its waiting for the other included."""

    seconds: float
    of_cpu: float
    """Seconds of all of its threads: what they wait for does not count, and other programs change it little."""


OPTIMIZERS = {"AdamW": {"name": "adamw", "lr": 1e-3}, "Muon": {"name": "muon", "lr": 4e-3}}


def run(rank: int, ranks: int, port: int, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    keep_freed_memory()
    steps = {
        name: native_step(
            arguments.preset,
            1,
            ranks,
            OptimizerConfig.model_validate(settings),
            arguments.precision,
        )
        for name, settings in OPTIMIZERS.items()
    }
    times: dict[str, list[Times]] = {name: [] for name in steps}
    vocab_size = model_config({"preset": arguments.preset}).vocab_size
    generator = torch.Generator().manual_seed(rank)
    for number in range(arguments.steps + 2):
        tokens = torch.randint(
            vocab_size, (arguments.batch, arguments.seq_length + 1), generator=generator
        )
        for name in list(steps)[:: 1 if number % 2 else -1]:
            dist.barrier()
            begin, cpu = time.perf_counter(), time.process_time()
            steps[name](tokens)
            dist.barrier()
            if number >= 2:  # the first steps allocate
                times[name].append(Times(time.perf_counter() - begin, time.process_time() - cpu))
    if rank == 0:
        report(arguments, ranks, times)
    dist.destroy_process_group()


def torch_optimizers(weights: Sequence[Weight]) -> Callable[[], None]:
    """Return clipping and torch's Muon and AdamW over random fp32 weights, fused ones in their parts, which megalite
    orthogonalises on their own, too. torch's Muon iterates in bf16."""
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.randn(shape, generator=generator))
        made.grad = torch.randn(shape, generator=generator)
        return made

    matrices, rest = [], []
    for weight in weights:
        if weight.is_matrix:
            matrices += [parameter(rows, *weight.row_shape) for rows in weight.row_groups]
        else:
            rest.append(parameter(*weight.shape))
    muon = torch.optim.Muon(matrices, lr=4e-3, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(matrices + rest, 1.0)
        muon.step()
        adamw.step()

    return step


def run_alone(arguments: argparse.Namespace) -> None:
    """Time the optimizers in turns, each after a pass over a few tokens, which is not timed."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments.port)}
    dist.init_process_group("gloo", rank=0, world_size=1)
    keep_freed_memory()
    optimizer = OptimizerConfig.model_validate(OPTIMIZERS["Muon"])
    model, engine = native_parts(arguments.preset, 0, 1, optimizer, arguments.precision)
    theirs = torch_optimizers(weight_table(model_config({"preset": arguments.preset})))
    tokens = torch.randint(100, (1, 65), generator=torch.Generator().manual_seed(0))

    def ours() -> None:
        engine.finish()
        engine.step(optimizer.lr)

    steps = {"torch": theirs, "megalite": ours}
    times: dict[str, list[Times]] = {name: [] for name in steps}
    for number in range(arguments.steps + 2):
        engine.begin(1)
        engine.backward(model.loss(model(tokens[:, :-1]), tokens[:, 1:]).mean())
        for name in list(steps)[:: 1 if number % 2 else -1]:
            begin, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            if number >= 2:
                times[name].append(Times(time.perf_counter() - begin, time.process_time() - cpu))
    report(arguments, 1, times)
    dist.destroy_process_group()


def report(arguments: argparse.Namespace, ranks: int, times: dict[str, list[Times]]) -> None:
    print(
        f"{arguments.preset}, {ranks} gloo ranks, {arguments.batch} × {arguments.seq_length} tokens a rank, "
        f"{arguments.precision}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    for what, number in (("seconds", 0), ("of the CPU", 1)):
        first, second = ([each[number] for each in of_one] for of_one in times.values())
        # The ratio of each step to the other's of the same turn: what slows a whole turn down cancels.
        ratio = statistics.median(b / a for a, b in zip(first, second, strict=True))
        medians = "  ".join(
            f"{name} {statistics.median(each):.3f}"
            for name, each in zip(times, (first, second), strict=True)
        )
        print(
            f"{what:<12} {medians}  least {min(first):.3f} and {min(second):.3f}: "
            f"{min(second) / min(first):.3f}  median of ratios {ratio:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-32m")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences a rank")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--port", type=int, default=29556)
    parser.add_argument("--alone", action="store_true", help="Muon's optimizer beside torch's")
    arguments = parser.parse_args()
    if arguments.alone:
        run_alone(arguments)
        return
    mp.spawn(run, (arguments.ranks, arguments.port, arguments), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
