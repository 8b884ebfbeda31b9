"""Tokens per second and memory of a whole training step on one GPU, beside what one would use
instead: transformers with torch.compile, and with Liger's kernels where they are installed, in
bf16.

What trains what is said in peers.py. All take turns, step by step, in one process; the share of the
ceiling is that of a matrix product measured between their steps. Peak memory is what a step of each
takes beside its own weights and state, and these.

    python tools/bench/gpu_step.py --preset llama-1b --batch 2
    python tools/bench/gpu_step.py --preset llama-3b --batch 1 --apart      # an 80 GB GPU holds one of them at a time
    python tools/bench/gpu_step.py --preset llama-1m --seq-length 64 --device cpu      # to see that it runs

--apart runs each in a process of its own, one after the other; so does Liger, which patches
transformers for all. key=value changes megalite's config, such as train.loss_chunk=2048.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from ceilings import product_rate, seconds_of
from megalite.observe.throughput import model_flops_per_token
from peers import Step, batches, config_of, megalite_step, transformers_step

COMPILED, LIGER = "transformers + torch.compile", "transformers + Liger"
WARM_UP = 3  # steps that allocate and compile


@dataclass
class Measured:
    state_bytes: int = 0  # weights, gradients, optimizer states: what is held between steps
    step_bytes: int = 0  # and the most that a step takes beside them
    seconds: list[float] = field(default_factory=list)
    ceilings: list[float] = field(default_factory=list)
    """FLOP/s of a matrix product, measured before the steps, between them and after."""


def installed() -> list[str]:
    names = ["megalite"]
    if importlib.util.find_spec("transformers"):
        names.append(COMPILED)
        if importlib.util.find_spec("liger_kernel"):
            names.append(LIGER)
    return names


def make(name: str, arguments: argparse.Namespace) -> Step:
    if name == "megalite":
        return megalite_step(config_of(arguments, arguments.overrides), arguments.device)
    return transformers_step(
        arguments.preset, arguments.device, compiled=name == COMPILED, liger=name == LIGER
    )


def measure(names: list[str], arguments: argparse.Namespace) -> dict[str, Measured]:
    """All in this process, in turns."""
    device, next_batch = arguments.device, batches(arguments, arguments.device)
    steps: dict[str, Step] = {}
    found = {name: Measured() for name in names}
    for name in names:
        before = allocated(device)
        steps[name] = make(name, arguments)
        for _ in range(WARM_UP):
            steps[name](next_batch())
        gc.collect()
        found[name].state_bytes = allocated(device) - before
    for number in range(arguments.steps):
        tokens, turn = next_batch(), number % len(names)
        ceiling = product_rate(device)
        for name in names[turn:] + names[:turn]:
            before = allocated(device, forget_peak=True)
            step = partial(steps[name], tokens)
            found[name].seconds.append(seconds_of(step, device))
            found[name].step_bytes = max(found[name].step_bytes, peak(device) - before)
            found[name].ceilings.append(ceiling)
    return found


def allocated(device: torch.device, forget_peak: bool = False) -> int:
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize(device)
    if forget_peak:
        torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak(device: torch.device) -> int:
    return 0 if device.type == "cpu" else torch.cuda.max_memory_allocated(device)


def measure_apart(names: list[str], arguments: argparse.Namespace) -> dict[str, Measured]:
    found = {}
    for name in names:
        command = [sys.executable, *sys.argv, "--only", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name} failed, as said above", flush=True)
        else:
            found[name] = Measured(**json.loads(done.stdout.splitlines()[-1]))
    return found


def report(found: dict[str, Measured], arguments: argparse.Namespace) -> None:
    ceiling = statistics.median(rate for measured in found.values() for rate in measured.ceilings)
    tokens, flops = (
        arguments.batch * arguments.seq_length,
        model_flops_per_token(config_of(arguments, arguments.overrides)),
    )
    print(f"bf16 matrix product: {ceiling / 1e12:,.3g} TFLOP/s\n")
    print(
        f"{'':30}{'ms a step':>12}{'tokens/s':>12}{'TFLOP/s':>10}{'of ceiling':>12}{'peak GiB':>10}{'megalite is':>14}"
    )
    ours = found.get("megalite")
    for name, measured in found.items():
        seconds = statistics.median(measured.seconds)
        rate = tokens / seconds
        memory = (measured.state_bytes + measured.step_bytes) / 2**30
        times = f"{seconds / statistics.median(ours.seconds):.2f}×" if ours else ""
        print(
            f"{name:30}{seconds * 1e3:12.1f}{rate:12,.0f}{rate * flops / 1e12:10,.3g}{rate * flops / ceiling:12.1%}"
            f"{f'{memory:.1f}' if memory else '':>10}{times:>14}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of megalite's config")
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--batch", type=int, default=2, help="sequences of a step")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--apart", action="store_true", help="each in a process of its own")
    parser.add_argument(
        "--only", metavar="NAME", help="measure this one and print what was found as JSON"
    )
    arguments = parser.parse_args()
    if arguments.only:
        (measured,) = measure([arguments.only], arguments).values()
        print(json.dumps(asdict(measured)))
        return
    device = arguments.device
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    # transformers takes the preset alone, and would not be what a changed model is compared with.
    names = (
        ["megalite"]
        if any(each.startswith("model.") for each in arguments.overrides)
        else installed()
    )
    print(
        f"{arguments.preset}, {arguments.batch} × {arguments.seq_length} tokens, bf16, {machine}, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
        flush=True,
    )
    apart = arguments.apart or LIGER in names
    report(measure_apart(names, arguments) if apart else measure(names, arguments), arguments)


if __name__ == "__main__":
    main()
