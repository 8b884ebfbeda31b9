"""Time of a training step on the CPU of an encoder on masked tokens, and of an encoder-decoder on
targets, beside what one would use instead: transformers eager and transformers + torch.compile, in
bf16.

All train a BERT, or a T5, of about 30M parameters on the same random tokens, of which 15% are
masked, with AdamW (decay on matrices only) and clipping by the global norm; no dropout. They are
measured as `cpu_step.py` measures decoders: step by step in turns, with freed memory given back as
glibc does by itself, and kept as `megalite train` has it.

    python tools/bench/encoder_step.py [bert] [t5] [--batch 8] [--seq-length 512] [--short]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cpu_step import give_freed_memory_back
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.kernels.loss import IGNORE
from megalite.models import to_hf_config, weight_table
from megalite.plan import make_plan
from megalite.runtime.host_memory import keep_freed_memory
from megalite.training.parts import build, forward_backward
from peers import OPTIMIZER, optimized

CPU = torch.device("cpu")
SHARE, MASK = 0.15, 4
SIZES = {"vocab_size": 8192, "hidden_size": 512, "num_layers": 8, "num_attention_heads": 8}
SHORT = {"vocab_size": 512, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert"},
    "t5": {"family": "t5", "head_dim": 64, "feed_forward": "relu", "tie_embeddings": True, "scale_head": True},
}  # fmt: skip
OBJECTIVES: dict[str, dict[str, Any]] = {
    "bert": {"name": "masked_lm", "share": SHARE}, "t5": {"name": "seq2seq", "target_length": 0}
}  # fmt: skip
PEERS = ("transformers", "transformers + torch.compile")


class Batch(NamedTuple):
    """What a step learns from, [B,T] and [B,S] int64."""

    tokens: Tensor
    labels: Tensor
    source: Tensor | None = None


Step = Callable[[Batch], Tensor]


def config_of(name: str, arguments: argparse.Namespace) -> Config:
    sizes = SHORT if arguments.short else SIZES
    own = {"intermediate_size": 4 * sizes["hidden_size"], "max_positions": arguments.seq_length}
    own |= {"encoder_layers": sizes["num_layers"] // 2} if name == "t5" else {}
    objective = OBJECTIVES[name]
    if name == "t5":
        objective = objective | {"target_length": arguments.seq_length // 4}
    batch = arguments.batch
    return parse_config(
        {
            "run": {"name": "bench"}, "model": MODELS[name] | sizes | own, "objective": objective,
            "data": {
                "train": [{"path": "-"}], "seq_length": arguments.seq_length, "tokenizer": "-",
                "document_mask": name == "t5",
            },
            "optimizer": OPTIMIZER.model_dump(),
            "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": batch, "precision": "bf16"},
        }
    )  # fmt: skip


def batches(name: str, config: Config) -> Callable[[], Batch]:
    """Return what draws the next batch: masked tokens, or targets of sources."""
    generator = torch.Generator().manual_seed(0)
    rows, (_, source, target) = config.train.global_batch_size, config.lengths

    def drawn(length: int) -> Tensor:
        return torch.randint(5, config.model.vocab_size, (rows, length), generator=generator)

    def masked() -> Batch:
        tokens = drawn(target)
        is_masked = torch.rand(tokens.shape, generator=generator) < SHARE
        return Batch(tokens.masked_fill(is_masked, MASK), tokens.masked_fill(~is_masked, IGNORE))

    def answered() -> Batch:
        labels = drawn(target)
        return Batch(labels.roll(1, 1).index_fill(1, torch.tensor([0]), 0), labels, drawn(source))

    return answered if name == "t5" else masked


def megalite_step(config: Config) -> Step:
    plan = make_plan(config, weight_table(config.model), 1)
    mesh = make_mesh(plan, CPU)
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(0, Mesh.alone(), CPU))

    def step(batch: Batch) -> Tensor:
        micro = MicroBatch(
            batch.tokens, batch.labels, torch.arange(len(batch.tokens)), source=batch.source
        )
        loss = forward_backward(parts, [micro], mesh, seed=0)["loss"]
        parts.engine.step(OPTIMIZER.lr)
        return loss

    return step


def transformers_step(config: Config, compiled: bool) -> Step:
    import transformers

    hf = transformers.AutoConfig.for_model(**to_hf_config(config.model))
    torch.manual_seed(0)
    auto = (
        transformers.AutoModelForSeq2SeqLM
        if config.model.task == "seq2seq"
        else transformers.AutoModelForMaskedLM
    )
    model = auto.from_config(hf, dtype=torch.bfloat16).train()
    run = torch.compile(model) if compiled else model

    def loss_of(batch: Batch) -> Tensor:
        if batch.source is None:
            return run(input_ids=batch.tokens, labels=batch.labels).loss
        return run(
            input_ids=batch.source,
            decoder_input_ids=batch.tokens,
            labels=batch.labels,
            use_cache=False,
        ).loss

    return optimized(model, loss_of)


def measure(name: str, arguments: argparse.Namespace) -> None:
    config = config_of(name, arguments)
    peers = PEERS[:1] if arguments.no_compile else PEERS
    steps = {peer: transformers_step(config, "compile" in peer) for peer in peers}
    turns = {peer: (step, give_freed_memory_back) for peer, step in steps.items()}
    turns |= {f"{peer}, memory kept": (step, keep_freed_memory) for peer, step in steps.items()}
    turns |= {"megalite": (megalite_step(config), keep_freed_memory)}
    times: dict[str, list[float]] = {turn: [] for turn in turns}
    next_batch = batches(name, config)
    for number in range(arguments.steps + 3):
        batch = next_batch()
        at = number % len(turns)
        for turn in [*turns][at:] + [*turns][:at]:
            step, allocator = turns[turn]
            allocator()
            begin = time.perf_counter()
            step(batch)
            if number >= 3:  # the first steps allocate and compile
                times[turn].append(time.perf_counter() - begin)
    params = sum(weight.numel for weight in weight_table(config.model))
    lengths = " and ".join(str(x) for x in config.lengths[1:] if x)
    print(f"{name}, {params / 1e6:.1f}M parameters, {arguments.batch} × {lengths} tokens")
    for turn, seconds in times.items():
        pairs = zip(seconds, times["megalite"], strict=True)
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        print(f"{turn:44}{1e3 * statistics.median(seconds):10.0f} ms a step{ratio:8.2f}×")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[*MODELS], help="bert, t5 (default: both)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=512, help="of the encoder")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="transformers eager alone")
    parser.add_argument("--short", action="store_true", help="tiny models and few steps")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.batch, arguments.seq_length, arguments.steps = 2, 64, 2
    torch.set_num_threads(arguments.threads)
    print(
        f"bf16, {arguments.threads} threads, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores\n"
    )
    for name in arguments.models:
        measure(name, arguments)


if __name__ == "__main__":
    main()
