"""Tokens a second of a model in bf16 and of the same model quantised to w8a8 and w4a16, for 1 and
for 8 sequences at a time, on the CPU.

Weights are random and prompts short: what is measured is decoding. Rounds take turns, and the best
of each is told, with its ratio to bf16's. `--linears` times the layers alone instead, by rows, from
which comes the number of rows up to which the int4 kernel is taken (`INT4_ROWS`)."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from serving import write_model

PROMPT, GROUP = 16, 128
SCHEMES = ("w8a8", "w4a16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="llama-125m")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--linears", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.linears:
        time_linears(arguments.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        folders = write_models(Path(folder), arguments.preset)
        measure(folders, arguments.tokens, arguments.rounds)


def write_models(folder: Path, preset: str) -> dict[str, Path]:
    """Write the model in bf16 and in each scheme."""
    from megalite.checkpoint.convert import write_model as write
    from megalite.kernels.schemes import make_scheme
    from megalite.quantization.run import quantised

    found = {"bf16": folder / "bf16"}
    write_model(found["bf16"], preset, torch.bfloat16)
    for scheme in SCHEMES:
        found[scheme] = folder / scheme
        write(quantised(found["bf16"], make_scheme(scheme, GROUP))[0], found[scheme])
    return found


def measure(folders: dict[str, Path], tokens: int, rounds: int) -> None:
    from megalite.infer.generate import Generator

    models = {
        name: Generator.open(folder, num_slots=8, max_length=PROMPT + tokens)
        for name, folder in folders.items()
    }
    for rows in (1, 8):
        best = dict.fromkeys(models, 0.0)
        for number in range(rounds + 1):
            for name, model in models.items():
                prompts = [[1 + (row + at) % 97 for at in range(PROMPT)] for row in range(rows)]
                requests = [model.request(prompt, tokens) for prompt in prompts]
                began = time.perf_counter()
                model.answer(requests)
                speed = rows * tokens / (time.perf_counter() - began)
                # The first round prepares what libraries keep.
                best[name] = max(best[name], speed if number else 0.0)
        for name, speed in best.items():
            megabytes = sum(file.stat().st_size for file in folders[name].glob("*.safetensors"))
            say(
                weights=name, rows=rows, tokens_per_s=round(speed, 1),
                ratio=round(speed / best["bf16"], 2), stored_mb=round(megabytes / 1e6),
            )  # fmt: skip


def time_linears(rounds: int) -> None:
    """Time a product of each kind by rows, of weights larger than the cache."""
    from megalite.infer import integer_linears
    from megalite.infer.packed import PackedLinear

    size = 4096
    numbers, scales = torch.randint(-8, 8, (size, size), dtype=torch.int8), torch.rand(size, 1)
    dense = torch.nn.Linear(size, size, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    int4 = integer_linears.Int4Linear(numbers, scales.expand(-1, size // GROUP), None)
    kinds: dict[str, Callable[[Any], Any]] = {
        "bf16": PackedLinear(dense),
        "int8": integer_linears.Int8Linear(numbers, scales, None),
        "int4, its kernel": lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, int4.weight, int4.group, int4.scales
        ),
        "int4, dequantised": lambda x: torch.nn.functional.linear(x, int4.dense()),
    }
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        x = torch.randn(rows, size, dtype=torch.bfloat16)
        best = dict.fromkeys(kinds, float("inf"))
        for _ in range(rounds):
            for name, kind in kinds.items():
                began = time.perf_counter()
                kind(x)
                best[name] = min(best[name], time.perf_counter() - began)
        times = {name: round(1e3 * best[name], 2) for name in kinds}
        say(rows=rows, milliseconds=times)


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
