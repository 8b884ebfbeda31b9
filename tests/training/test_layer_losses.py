"""Losses that layers add to the objective: their means and every gradient on each layout, against
the clean model in one process."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.models import family, weight_table
from megalite.models.layer_loss import LayerLoss
from megalite.models.layers import IGNORE
from megalite.plan import make_plan
from megalite.training.parts import build, forward, forward_backward
from ranks import run_ranks

PACKAGE = Path(__file__).parents[1] / "plugin" / "package"
SEED, BATCH, LENGTH = 7, 4, 32
MODEL: dict[str, Any] = {
    "family": "blend", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": LENGTH, "init_std": 0.2, "num_experts": 3,
    "balance": 0.7, "router_z": 0.3,
}  # fmt: skip
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {}),
    "one process, recomputed": (1, {}, {"recompute": "full", "micro_batch_size": 2}),
    "tensor 2": (2, {"tensor": 2}, {"recompute": "full"}),
    "tensor 2, whole sequences": (2, {"tensor": 2, "sequence": False}, {}),
    "pipeline 2": (2, {"pipeline": 2}, {"recompute": "full"}),
    "pipeline 2, zero bubble": (2, {"pipeline": 2, "schedule": "zero_bubble", "virtual": 2}, {}),
    "context 2": (2, {"context": 2}, {}),
    "data 2, ZeRO-2": (2, {"zero_stage": 2}, {"recompute": "full"}),
    "data 2, DeepSpeed": (2, {"engine": "deepspeed", "zero_stage": 3}, {}),
    "tensor 2, context 2": (4, {"tensor": 2, "context": 2}, {}),
}


def config_of(parallel: dict[str, Any], train: dict[str, Any], **model: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "layer-losses"},
            "model": MODEL | model,
            "data": {"train": [{"path": "unused"}], "seq_length": LENGTH},
            "parallel": {"bucket_mb": 0.05, **parallel},
            "train": {
                "steps": 2,
                "global_batch_size": BATCH,
                "micro_batch_size": 1,
                "precision": "fp32",
                **train,
            },
            "optimizer": {"lr": 1e-2},
        }
    )


def whole_batch() -> MicroBatch:
    """A third of the labels carries no loss, unevenly; a layer's own loss counts all tokens."""
    tokens = torch.randint(0, 193, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    for row in range(BATCH):
        labels[row, : row * 7] = IGNORE
    return MicroBatch(tokens[:, :-1], labels, torch.arange(BATCH))


def on_rank(
    rank: int, world_size: int, function: Callable[..., Any], calls: list[tuple[str, ...]]
) -> list[Any]:
    """Call a function where the plugin is installed. The process of the tests does not know it, for
    other tests."""
    sys.path.insert(0, str(PACKAGE))
    return [function(*call) for call in calls]


def step(layout: str) -> dict[str, Any]:
    """The second of two training steps with the same weights, after a validation."""
    ranks, parallel, train = LAYOUTS[layout]
    config = config_of(parallel, train)
    table = weight_table(config.model)
    plan = make_plan(config, table, ranks)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(SEED, mesh))
    whole = whole_batch()
    rows = torch.arange(BATCH).view(-1, mesh.data.size, plan.micro_batch_size)[:, mesh.data.rank]
    batch = [MicroBatch(whole.tokens[row], whole.labels[row], whole.samples[row]) for row in rows]
    forward_backward(parts, batch, mesh, SEED)
    parts.engine.step(0.0)
    parts.train(False)
    list(forward(parts, batch, mesh))
    found = forward_backward(parts, batch, mesh, SEED)
    owners = {
        weight.name: plan.rank_at(
            next(s.index for s in plan.stages if s.holds(weight.place)) % plan.pipeline, 0, 0
        )
        for weight in table
    }
    return {
        "metrics": {name: x.item() for name, x in found.items()},
        "grads": parts.engine.gather("grad", owners),
    }


def plain() -> dict[str, Any]:
    """The same on whole rows, with the losses written out and torch alone."""
    config = config_of({}, {})
    model = family("blend").MODEL(config.model)
    parameters, read = dict(model.named_parameters()), from_seed(SEED, Mesh.alone())
    with torch.no_grad():
        for weight in weight_table(config.model):
            parameters[weight.name].copy_(
                read(weight, "weight", 0, weight.numel).view(weight.shape)
            )
    scores: list[Tensor] = []
    for layer in model.layers.values():
        layer.mlp.router.register_forward_hook(lambda module, arguments, out: scores.append(out))
    batch = whole_batch()
    loss = F.cross_entropy(
        model(batch.tokens).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE
    )
    # Switch Transformers' loss for each row: 1 where all experts get as many tokens and as much of
    # them.
    balance = sum(
        3 * (F.one_hot(of.argmax(-1), 3).float().mean(1) * of.softmax(-1).mean(1)).sum(-1).mean()
        for of in scores
    )
    router_z = sum(of.logsumexp(-1).square().mean() for of in scores)
    (loss + 0.7 * balance + 0.3 * router_z).backward()
    metrics = {"loss": loss, "layer_loss/balance": balance / 4, "layer_loss/router_z": router_z / 4}
    return {
        "metrics": {name: x.item() for name, x in metrics.items()},
        "grads": {name: parameter.grad for name, parameter in parameters.items()},
    }


@cache
def results(ranks: int, engine: str) -> dict[str, list[dict[str, Any]]]:
    """DeepSpeed has ranks of its own, since it replaces functions of torch."""
    layouts = [
        name for name, layout in LAYOUTS.items() if (layout[0], engine_of(name)) == (ranks, engine)
    ]
    each = [(layout,) for layout in layouts]
    of_ranks = run_ranks(ranks, on_rank, step, each, deepspeed=engine == "deepspeed")
    return {layout: [found[number] for found in of_ranks] for number, layout in enumerate(layouts)}


@cache
def reference() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(1, on_rank, plain, [()])[0][0]
    return found


def engine_of(layout: str) -> str:
    return str(LAYOUTS[layout][1].get("engine", "native"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_of_layers_are_the_same_on_every_layout(layout: str) -> None:
    if engine_of(layout) == "deepspeed":
        pytest.importorskip("deepspeed")
    found, wanted = results(LAYOUTS[layout][0], engine_of(layout))[layout], reference()
    for rank in found:  # fp32 sums in another order, below and above
        assert rank["metrics"] == pytest.approx(wanted["metrics"], rel=1e-5)
    grads = {name: grad for rank in found for name, grad in rank["grads"].items()}
    assert grads.keys() == wanted["grads"].keys()
    for name, grad in grads.items():
        error = ((grad - wanted["grads"][name]).norm() / wanted["grads"][name].norm()).item()
        assert error <= 1e-5, f"gradient of {name} is off by {error:.1e}"


def step_without_labels() -> tuple[dict[str, float], float]:
    """What a step finds, and the norm of its gradient."""
    config = config_of({}, {})
    plan = make_plan(config, weight_table(config.model), 1)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(SEED, mesh))
    whole = whole_batch()
    found = forward_backward(
        parts, [MicroBatch(whole.tokens, whole.labels * 0 + IGNORE, whole.samples)], mesh, SEED
    )
    return {name: x.item() for name, x in found.items()}, parts.engine.step(1.0).item()


def test_without_any_label_nothing_is_learned() -> None:
    """A step whose loss is NaN and whose gradient is 0 is no bad step, but one without labels."""
    found, norm = run_ranks(1, on_rank, step_without_labels, [()])[0][0]
    assert len(found) == 3
    assert all(map(math.isnan, found.values()))
    assert norm == 0


def test_outside_of_a_step_a_loss_does_nothing() -> None:
    loss, x = LayerLoss("balance", 1.0), nn.Parameter(torch.ones(2, 3, 4))
    assert loss(x, x.sum(-1)) is x
