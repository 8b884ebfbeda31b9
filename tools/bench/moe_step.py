"""Tokens per second of a training step of a mixture of experts on the CPU, in bf16, beside
transformers with each of its implementations of experts, and beside a dense model of megalite's
with as many parameters for each token.

All train on the same random tokens with AdamW and clipping, and take turns, step by step, in one
process (see cpu_step.py)."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Any

import torch

from megalite.config import Config
from megalite.models import model_config, to_hf_config
from megalite.models.experts import RoutedConfig
from megalite.runtime.environment import set_defaults
from megalite.runtime.host_memory import keep_freed_memory
from peers import Step, batches, config_of, megalite_step, next_token_loss, optimized

CPU = torch.device("cpu")
THEIRS = ("grouped_mm", "eager")
"""transformers' implementations of experts that run on a CPU. `batched_mm` copies the weights of
its experts for every token: 40 GB at this size."""


def transformers_step(preset: str, experts: str) -> Step:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {
        key: value
        for key, value in to_hf_config(model_config({"preset": preset})).items()
        if value is not None
    }
    hf: Any = AutoConfig.for_model(**values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        hf, dtype=torch.bfloat16, experts_implementation=experts, trust_remote_code=False
    )
    return optimized(model, next_token_loss(model))


def dense_config(arguments: argparse.Namespace) -> Config:
    """A Llama whose MLPs are as large as the experts that a token visits."""
    routed = model_config({"preset": arguments.preset})
    assert isinstance(routed, RoutedConfig)
    inner = routed.experts_per_token * routed.expert_inner + routed.shared_inner
    values = {
        "family": "llama", "intermediate_size": inner, "num_kv_heads": routed.kv_heads,
        "tie_embeddings": str(routed.tie_embeddings).lower(),
    }  # fmt: skip
    same = (
        "vocab_size",
        "hidden_size",
        "num_layers",
        "num_attention_heads",
        "max_positions",
        "rope_theta",
    )
    values |= {name: getattr(routed, name) for name in same}
    arguments = argparse.Namespace(**vars(arguments) | {"preset": "llama-1m"})
    return config_of(arguments, [f"model.{name}={value}" for name, value in values.items()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="moe-100m-a25m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    set_defaults(deterministic=False)
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    steps: dict[str, Step] = {"megalite": megalite_step(config_of(arguments), CPU)}
    steps["megalite, dense of as many active parameters"] = megalite_step(
        dense_config(arguments), CPU
    )
    steps |= {f"transformers, {name}": transformers_step(arguments.preset, name) for name in THEIRS}
    print(
        f"{arguments.preset}, {arguments.batch} × {arguments.seq_length} tokens, bf16, {arguments.threads} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores\n"
    )
    times: dict[str, list[float]] = {name: [] for name in steps}
    next_batch = batches(arguments, CPU)
    for number in range(arguments.steps + 2):
        tokens, order = (
            next_batch(),
            [*steps][number % len(steps) :] + [*steps][: number % len(steps)],
        )
        for name in order:
            begin = time.perf_counter()
            steps[name](tokens)
            if number >= 2:  # the first steps allocate
                times[name].append(time.perf_counter() - begin)
    print(f"{'':48}{'ms a step':>10}{'tokens/s':>10}{'megalite is':>13}")
    for name, seconds in times.items():
        rate = arguments.batch * arguments.seq_length / statistics.median(seconds)
        ratio = statistics.median(
            theirs / ours for theirs, ours in zip(seconds, times["megalite"], strict=True)
        )
        print(f"{name:48}{1e3 * statistics.median(seconds):10.0f}{rate:10,.0f}{ratio:12.2f}×")


if __name__ == "__main__":
    main()
