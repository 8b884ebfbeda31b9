"""Every optimizer does what its reference does, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.engine.optimizers import MatrixOptimizer, Shard
from megalite.models.weights import Weight

STEPS = 20


def optimizer_of(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 0.02, "weight_decay": 0.1, **settings})


def train(config: OptimizerConfig, start: Tensor, grads: list[Tensor]) -> Tensor:
    """What `config` makes of a matrix in as many steps as there are gradients, on one process."""
    master, states = start.clone().flatten(), {name: torch.zeros(start.numel()) for name in config.STATES}
    optimizer = config.build()
    weight = Weight("layers.0.w", tuple(start.shape), ("w",), place=0)
    for number, grad in enumerate(grads, 1):
        shard = Shard(master, None, grad.flatten(), states, config.lr, config.weight_decay)
        common = optimizer.begin_step(torch.ones(()), torch.tensor(float(number), dtype=torch.float64))
        if isinstance(optimizer, MatrixOptimizer):
            seen = optimizer.advance_(shard, common).view(start.shape)
            parts = [optimizer.solve(part[None], torch.float32)[0] for part in seen.split(optimizer.split(weight))]
            optimizer.update_(shard, torch.cat(parts).flatten(), common)
        else:
            optimizer.update_(shard, common)
    return master.view(start.shape)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "moonlight"])
def test_muon_equals_torch(shape: tuple[int, int], nesterov: bool, scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(STEPS)]
    parameter = torch.nn.Parameter(start.clone())
    adjust = {"original": "original", "moonlight": "match_rms_adamw"}[scale]
    reference = torch.optim.Muon([parameter], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust)
    # torch iterates in bf16, whose rounding five steps amplify; here in fp32, as on fp32 weights.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for grad in grads:
        parameter.grad = grad
        reference.step()
    found = train(optimizer_of(name="muon", nesterov=nesterov, scale=scale), start, grads)
    torch.testing.assert_close(found, parameter.detach(), rtol=1e-4, atol=1e-5)
