"""A training step of a Llama by megalite, and by what one would use instead: transformers, with
torch.compile or Liger.

All train on the same tokens with AdamW (decay on matrices only) and clipping by the global norm.
megalite keeps fp32 master weights and moments; the others train bf16 weights with bf16 moments,
which is less work and less memory.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.engine.optimizers.adamw import AdamWConfig
from megalite.models import model_config, weight_table
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward

OPTIMIZER = AdamWConfig(lr=1e-4)
Step = Callable[[Tensor], Tensor]
"""Takes tokens [B,T+1] on the device; gives the loss, for which nobody waits."""


def config_of(arguments: argparse.Namespace, overrides: Sequence[str] = ()) -> Config:
    batch = arguments.batch
    return parse_config(
        {
            "run": {"name": "bench"}, "model": {"preset": arguments.preset},
            "data": {"train": [{"path": "-"}], "seq_length": arguments.seq_length}, "optimizer": OPTIMIZER.model_dump(),
            "train": {"steps": 1, "global_batch_size": batch, "micro_batch_size": batch, "precision": "bf16"},
        },
        overrides,
    )  # fmt: skip


def megalite_step(config: Config, device: torch.device) -> Step:
    plan = make_plan(config, weight_table(config.model), 1)
    mesh = make_mesh(plan, device)
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(0, Mesh.alone(), device))

    def step(tokens: Tensor) -> Tensor:
        samples = torch.arange(len(tokens), device=device)
        rows = zip(
            *(x.split(config.train.micro_batch_size) for x in (tokens, samples)), strict=True
        )
        loss = forward_backward(
            parts, [MicroBatch(x[:, :-1], x[:, 1:], s) for x, s in rows], mesh, seed=0
        )["loss"]
        parts.engine.step(OPTIMIZER.lr)
        return loss

    return step


def transformers_step(
    preset: str,
    device: torch.device,
    compiled: bool = False,
    autocast: bool = False,
    liger: bool = False,
) -> Step:
    """With Liger, transformers is patched for the rest of the process."""
    if liger:
        importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_llama()
    from transformers import LlamaConfig, LlamaForCausalLM

    from megalite.models.llama import to_hf

    config: Any = model_config({"preset": preset})
    hf = LlamaConfig(**{k: v for k, v in to_hf(config).items() if v is not None})
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(
            hf, dtype=torch.float32 if autocast else torch.bfloat16
        )
    return optimized(model, next_token_loss(torch.compile(model) if compiled else model), autocast)


def next_token_loss(run: Any) -> Callable[[Tensor], Tensor]:
    """Return what gives the loss of tokens by transformers' model, or a compiled one."""
    # `labels` are shifted by transformers itself: of the same tokens, the last has no label.
    return lambda tokens: run(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss


def optimized(
    model: torch.nn.Module, loss_of: Callable[[Any], Tensor], autocast: bool = False
) -> Callable[[Any], Tensor]:
    """Return a training step of transformers' `model`; `loss_of` gives the loss of what a step is
    given."""
    device = next(model.parameters()).device
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": decay, "weight_decay": OPTIMIZER.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIMIZER.lr, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True
    )

    def step(batch: Any) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def batches(arguments: argparse.Namespace, device: torch.device) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = model_config({"preset": arguments.preset}).vocab_size
    shape = (arguments.batch, arguments.seq_length + 1)
    return lambda: torch.randint(vocab_size, shape, generator=generator).to(device)
