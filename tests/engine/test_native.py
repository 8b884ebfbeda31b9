"""The native engine in one process: what it begins with, and what it makes of the gradients of a
step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.engine import Engine
from megalite.engine.buckets import BucketState
from megalite.engine.native import NativeEngine
from megalite.models import from_hf_config, weight_table
from megalite.plan import make_plan
from megalite.training.parts import RankModel, build
from small_runs import make_config
from tiny_models import CASES


def parts_of(tmp_path: Path, *overrides: str, model: str | dict[str, Any] = "llama") -> RankModel:
    config = make_config(tmp_path, model, *overrides)
    plan = make_plan(config, weight_table(config.model), 1)
    parts = build(config, plan, make_mesh(plan, torch.device("cpu")))
    parts.engine.load(from_seed(3, Mesh.alone()))
    return parts


def pass_back(parts: RankModel, unused: str = "", micro_batches: int = 1) -> None:
    """Backward passes whose gradients are all 1."""
    parts.engine.begin(micro_batches)
    for _ in range(micro_batches):
        for name, parameter in parts.stages[0].model.named_parameters():
            if name != unused:
                parameter.sum().backward()
    parts.engine.finish()


def gathered(engine: Engine, kind: str, parts: RankModel) -> dict[str, Tensor]:
    names = [name for name, _ in parts.stages[0].model.named_parameters()]
    return engine.gather(kind, dict.fromkeys(names, 0))


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_weight_that_no_token_used_has_a_gradient_of_0(tmp_path: Path, zero_stage: int) -> None:
    """Not that of the step before; and those beside it in its bucket, which is never full, are
    reduced nonetheless."""
    parts, unused = (
        parts_of(tmp_path, f"parallel.zero_stage={zero_stage}"),
        "layers.0.mlp_norm.weight",
    )
    pass_back(parts)
    parts.engine.step(1e-3)
    pass_back(parts, unused, micro_batches=2)
    for name, grad in gathered(parts.engine, "grad", parts).items():
        assert torch.equal(grad, torch.full_like(grad, 2.0 * (name != unused))), name


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_every_bucket_is_reduced_once(tmp_path: Path, zero_stage: int) -> None:
    """Also those that still travel when the backward pass has ended."""
    parts = parts_of(tmp_path, f"parallel.zero_stage={zero_stage}", "parallel.bucket_mb=0.001")
    assert isinstance(parts.engine, NativeEngine)
    gradients, reduced = parts.engine.gradients, list[BucketState]()
    gradients.observer = lambda bucket, grads: reduced.append(bucket)
    model, tokens = parts.stages[0].model, torch.arange(9)[None]
    parts.engine.begin(1)
    parts.engine.backward(model.loss(model(tokens[:, :-1]), tokens[:, 1:]).sum())
    parts.engine.finish()
    assert Counter(map(id, reduced)) == Counter(map(id, gradients.buckets))


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_selection_biases_stay_in_fp32(tmp_path: Path, zero_stage: int) -> None:
    """In a bf16 model: moves of 0.0005 would be lost beside 0.25."""
    model = CASES["deepseek_v3"] | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "rms_norm_eps": 1e-6,
    }
    fields = from_hf_config(model) | {"router_bias_rate": 0.0005}
    parts = parts_of(
        tmp_path, "train.precision=bf16", f"parallel.zero_stage={zero_stage}", model=fields
    )
    name = "layers.1.mlp.router.bias"
    bias = dict(parts.stages[0].model.named_parameters())[name]
    with torch.no_grad():
        bias.fill_(0.25)
    pass_back(parts)
    norm = parts.engine.step(1e-3).item()
    others = [p.numel() for other, p in parts.stages[0].model.named_parameters() if other != name]
    assert norm == pytest.approx(sum(others) ** 0.5), "counts are no gradient"
    assert gathered(parts.engine, "weight", parts)[name].tolist() == pytest.approx(
        [0.2495] * 8, rel=1e-6
    )


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_gradients_are_scaled_down_to_the_limit_and_never_up(tmp_path: Path, clip: float) -> None:
    parts = parts_of(tmp_path, f"optimizer.clip={clip}")
    pass_back(parts)
    norm = parts.engine.step(1e-3).item()
    assert norm == pytest.approx(sum(p.numel() for p in parts.stages[0].parameters()) ** 0.5)
    # The first moment after a step is (1 - beta1) of the gradient.
    for moment in gathered(parts.engine, "exp_avg", parts).values():
        torch.testing.assert_close(moment, torch.full_like(moment, 0.1 * min(1.0, clip / norm)))


@pytest.mark.parametrize(
    ("precision", "begins"), [("fp32", {"weight": 1.25}), ("bf16", {"weight": 1.0, "master": 1.25})]
)
def test_weights_in_fp32_begin_as_the_master_weights(
    tmp_path: Path, precision: str, begins: dict[str, float]
) -> None:
    """Where a run in bf16 goes on in fp32, those are exact."""
    parts, stored = (
        parts_of(tmp_path, f"train.precision={precision}"),
        {"weight": 1.0, "master": 1.25},
    )
    parts.engine.load(
        lambda weight, kind, start, stop: torch.full((stop - start,), stored.get(kind, 0.0))
    )
    for kind, wanted in begins.items():
        for name, found in gathered(parts.engine, kind, parts).items():
            assert found.unique().tolist() == [wanted], (kind, name)
