"""Tokens per second of a whole training step on the CPU, beside what one would use instead: transformers eager and
transformers + torch.compile, in bf16.

All train a Llama of one preset on the same random tokens, with AdamW (decay on matrices only) and clipping by the
global norm. megalite keeps fp32 master weights and moments; the others train bf16 weights with bf16 moments, which is
less work. They take turns, step by step, in one process, so that what else the machine does hits all alike.

--memory runs each in a process of its own and tells the peak of resident memory above what its imports take; there
transformers also trains fp32 weights under autocast, the way that keeps as much precision as megalite does.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.config import Config, OptimizerConfig
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.host_memory import keep_freed_memory
from megalite.mesh import ALONE, make_mesh
from megalite.models import model_config, weight_table
from megalite.observe.throughput import model_flops_per_token
from megalite.plan import make_plan
from megalite.train import build, forward_backward

OPTIMIZER = OptimizerConfig(lr=1e-4)
Step = Callable[[Tensor], float]


def config_of(arguments: argparse.Namespace) -> Config:
    batch = arguments.batch
    return parse_config(
        {
            "run": {"name": "bench"}, "model": {"preset": arguments.preset},
            "data": {"train": [{"path": "-"}], "seq_length": arguments.seq_length}, "optimizer": OPTIMIZER.model_dump(),
            "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": batch, "precision": "bf16"},
        }
    )  # fmt: skip


def megalite_step(config: Config) -> Step:
    batch = config.train.global_batch_size
    plan = make_plan(config, weight_table(config.model), 1)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(0, ALONE))

    def step(tokens: Tensor) -> float:
        micro = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.arange(batch), None)
        loss = forward_backward(parts, [micro], mesh, seed=0)
        parts.engine.step(OPTIMIZER.lr)
        return loss.item()

    return step


def transformers_step(preset: str, compiled: bool, autocast: bool = False) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    from megalite.models.llama import to_hf

    config: Any = model_config({"preset": preset})
    hf = LlamaConfig(**{k: v for k, v in to_hf(config).items() if v is not None})
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(hf, dtype=torch.float32 if autocast else torch.bfloat16)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": OPTIMIZER.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True)
    run: Any = torch.compile(model) if compiled else model

    def step(tokens: Tensor) -> float:
        # `labels` are shifted by transformers itself: of the same tokens, the last has no label.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = run(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make(name: str, arguments: argparse.Namespace) -> Step:
    if name == "megalite":
        return megalite_step(config_of(arguments))
    return transformers_step(arguments.preset, "compile" in name, "autocast" in name)


SPEED = ("megalite", "transformers", "transformers + torch.compile")
MEMORY = (*SPEED, "transformers, autocast of fp32 weights")


def batches(arguments: argparse.Namespace) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model_config({"preset": arguments.preset}).vocab_size
    return lambda: torch.randint(vocab_size, (arguments.batch, arguments.seq_length + 1), generator=generator)


def measure_speed(arguments: argparse.Namespace) -> None:
    steps = {name: make(name, arguments) for name in SPEED}
    times: dict[str, list[float]] = {name: [] for name in steps}
    next_batch = batches(arguments)
    for number in range(arguments.steps + 3):
        tokens = next_batch()
        for name in [*steps][number % len(steps) :] + [*steps][: number % len(steps)]:
            begin = time.perf_counter()
            steps[name](tokens)
            if number >= 3:  # the first steps allocate and compile
                times[name].append(time.perf_counter() - begin)
    ceiling = product_rate()
    tokens_a_step = arguments.batch * arguments.seq_length
    flops = model_flops_per_token(config_of(arguments))
    print(f"bf16 matrix product 2048 × 2048 × 2048: {ceiling / 1e9:,.0f} GFLOP/s\n")
    print(f"{'':32}{'ms a step':>12}{'tokens/s':>12}{'of ceiling':>12}{'megalite is':>14}")
    ours = statistics.median(times["megalite"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rate = tokens_a_step / median
        share = rate * flops / ceiling
        print(f"{name:32}{median * 1e3:12.0f}{rate:12,.0f}{share:12.1%}{median / ours:13.2f}×")


def product_rate() -> float:
    """FLOP/s of a bf16 matrix product, the median of many."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        begin = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2 * 2048**3 / statistics.median(seconds)


def measure_memory(name: str, arguments: argparse.Namespace) -> None:
    """Peak of resident memory, sampled every millisecond from building on."""
    process, peak, done = psutil.Process(), 0, threading.Event()
    import transformers  # noqa: F401, what it takes is not the step's

    base = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    step, next_batch = make(name, arguments), batches(arguments)
    for _ in range(3):
        step(next_batch())
    done.set()
    print(f"{name:44}{(peak - base) / 2**20:10,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="llama-32m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", nargs="?", const="all", help="measure memory instead, of all or of the one named")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `megalite train` does; here it serves all alike
    if arguments.memory and arguments.memory != "all":
        measure_memory(arguments.memory, arguments)
        return
    print(
        f"{arguments.preset}, {arguments.batch} × {arguments.seq_length} tokens, bf16, {arguments.threads} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    )
    if arguments.memory:
        for name in MEMORY:
            subprocess.run([sys.executable, *sys.argv[:-1], "--memory", name], check=True)
    else:
        measure_speed(arguments)


if __name__ == "__main__":
    main()
