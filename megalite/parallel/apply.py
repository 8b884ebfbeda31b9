"""What is done to a clean model, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from megalite.comm.mesh import Axis, Mesh
from megalite.config import TrainConfig
from megalite.kernels import library
from megalite.models.layers import CausalAttention, Decoder, Dropout
from megalite.models.weights import Weight
from megalite.parallel.rules import apply_rules, make_layout, vocab_size_of
from megalite.parallel.stage import cut
from megalite.parallel.tensor import ChunkedHead, PutOff
from megalite.plan import Plan, StageSpan


def apply_parallelism(
    model: Decoder,
    weights: Sequence[Weight],
    plan: Plan,
    span: StageSpan,
    mesh: Mesh,
    train: TrainConfig,
    later: PutOff | None = None,
) -> None:
    """Turn a clean model on the meta device into this rank's part of one stage of it, in place. `weights` is the whole
    table; `later` puts weight gradients off."""
    cut(model, span, tied=any(weight.place == "both" for weight in weights))
    # A compiler sees nothing of what linear modules do beside computing: inside of layers they stay plain.
    parents = [model] if train.compile else list(model.modules())
    apply_rules(parents, make_layout(model, weights, plan, mesh, later))
    if train.loss_chunk and span.last:
        apply_chunked_loss(model, weights, mesh.tensor, plan.sequence, train.loss_chunk)
    apply_recompute(model, train)
    if train.compile:
        compile_layers(model)


def compile_layers(model: Decoder) -> None:
    library.tell_compiler()
    for layer in model.layers.values():
        for module in layer.modules():
            if isinstance(module, Dropout):
                # Of products that wrap around int64 a compiler makes constants that do not fit.
                module.drop = torch.compiler.disable(module.drop)  # type: ignore[method-assign]
        layer.forward = torch.compile(layer.forward, dynamic=False)


def apply_chunked_loss(model: Decoder, weights: Sequence[Weight], axis: Axis, sequence: bool, rows: int) -> None:
    assert isinstance(model.head.weight, nn.Parameter)
    head = ChunkedHead(model.head.weight, axis, sequence, vocab_size_of(weights), rows)
    model.head, model.loss = head, nn.Identity()  # which is not asked
    model.losses = lambda x_BTD, labels_BT: head(model.norm(x_BTD), labels_BT)  # type: ignore[method-assign]


def apply_recompute(model: Decoder, train: TrainConfig) -> None:
    """Keep less for the backward pass, and compute it again there (Chen et al. 2016). `selective` (Korthikanti et al.
    2022) takes what is large and cheap: the element-wise part of an MLP (its `shrink`), and attention where it writes
    its probabilities out; SDPA never does."""
    for layer in list(model.layers.values())[: train.recompute_layers]:
        if train.recompute == "full":
            _recompute(layer, "forward")
        elif train.recompute == "selective":
            for module in layer.modules():
                if hasattr(module, "shrink"):
                    _recompute(module, "shrink")
                if isinstance(module, CausalAttention) and module.writes_scores:
                    _recompute(module, "forward")


def _recompute(module: nn.Module, method: str) -> None:
    # Dropout takes its masks from keys, so that there is no generator to be put back.
    again = partial(checkpoint, getattr(module, method), use_reentrant=False, preserve_rng_state=False)
    setattr(module, method, again)
