"""Tokens per second of a whole training step on the CPU, beside what one would use instead:
transformers eager and transformers + torch.compile, in bf16.

All train a Llama of one preset on the same random tokens, with AdamW (decay on matrices only) and
clipping by the global norm. megalite keeps fp32 master weights and moments; the others train bf16
weights with bf16 moments, which is less work. They take turns, step by step, in one process, so
that what else the machine does hits all alike. `megalite train` has the C library keep freed memory
(megalite/runtime/host_memory.py); the others are measured as they come, and so too.

--memory runs each in a process of its own and tells the peak of resident memory above what its
imports take; there transformers also trains fp32 weights under autocast, the way that keeps as much
precision as megalite does.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import subprocess
import sys
import threading
import time

import psutil
import torch

from ceilings import product_rate
from megalite.observe.throughput import model_flops_per_token
from megalite.runtime.environment import set_defaults
from megalite.runtime.host_memory import keep_freed_memory
from peers import Step, batches, config_of, megalite_step, transformers_step

CPU = torch.device("cpu")


def make(name: str, arguments: argparse.Namespace) -> Step:
    if name == "megalite":
        return megalite_step(config_of(arguments), CPU)
    return transformers_step(arguments.preset, CPU, "compile" in name, "autocast" in name)


SPEED = ("megalite", "transformers", "transformers + torch.compile")
MEMORY = (*SPEED, "transformers, autocast of fp32 weights")


def give_freed_memory_back() -> None:
    """What glibc comes to by itself, once blocks as large as it watches for have been freed."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**25)
    libc.mallopt(-1, 2**26)
    libc.malloc_trim(0)


def measure_speed(arguments: argparse.Namespace) -> None:
    steps = {name: make(name, arguments) for name in SPEED}
    turns = {name: (steps[name], give_freed_memory_back) for name in SPEED[1:]}
    turns |= {f"{name}, memory kept": (steps[name], keep_freed_memory) for name in SPEED[1:]}
    turns |= {"megalite": (steps["megalite"], keep_freed_memory)}
    times: dict[str, list[float]] = {name: [] for name in turns}
    rates: list[float] = []
    next_batch = batches(arguments, CPU)
    for number in range(arguments.steps + 3):
        tokens, order = (
            next_batch(),
            [*turns][number % len(turns) :] + [*turns][: number % len(turns)],
        )
        for name in order:
            step, allocator = turns[name]
            allocator()
            begin = time.perf_counter()
            step(tokens)
            if number >= 3:  # the first steps allocate and compile
                times[name].append(time.perf_counter() - begin)
        rates.append(product_rate(CPU))
    ceiling = statistics.median(rates)
    tokens_a_step = arguments.batch * arguments.seq_length
    flops = model_flops_per_token(config_of(arguments))
    print(f"bf16 matrix product 2048 × 2048 × 2048: {ceiling / 1e9:,.0f} GFLOP/s\n")
    print(f"{'':44}{'ms a step':>10}{'tokens/s':>10}{'of ceiling':>12}{'megalite is':>13}")
    for name, seconds in times.items():
        rate = tokens_a_step / statistics.median(seconds)
        ratio = statistics.median(
            theirs / ours for theirs, ours in zip(seconds, times["megalite"], strict=True)
        )
        print(
            f"{name:44}{1e3 * tokens_a_step / rate:10.0f}{rate:10,.0f}{rate * flops / ceiling:12.1%}{ratio:12.2f}×"
        )


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
    if name == "megalite":
        keep_freed_memory()
    step, next_batch = make(name, arguments), batches(arguments, CPU)
    for _ in range(3):
        step(next_batch())
    done.set()
    print(f"{name:44}{(peak - base) / 2**20:10,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="llama-32m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--memory",
        nargs="?",
        const="all",
        help="measure memory instead, of all or of the one named",
    )
    arguments = parser.parse_args()
    set_defaults(deterministic=False)
    torch.set_num_threads(arguments.threads)
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
