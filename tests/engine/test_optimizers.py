"""Every optimizer does what its reference does, and what it is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.engine.optimizers import AllMatrices, MatrixOptimizer, Piece, Shard, SummingOptimizer
from megalite.errors import ConfigError
from megalite.kernels import newton_schulz
from megalite.kernels.newton_schulz import COEFFICIENTS, orthogonalize
from megalite.models.sharding import rectangles
from megalite.models.weights import Weight

STEPS = 20


def optimizer_of(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 0.02, "weight_decay": 0.1, **settings})


def train(config: OptimizerConfig, start: Tensor, grads: list[Tensor]) -> Tensor:
    """What `config` makes of a matrix in as many steps as there are gradients, on one process."""
    master, states = (
        start.clone().flatten(),
        {name: torch.zeros(start.numel()) for name in config.STATES},
    )
    optimizer = config.build()
    weight = Weight("layers.0.w", tuple(start.shape), ("w",), place=0)
    for number, grad in enumerate(grads, 1):
        shard = Shard(master, None, grad.flatten(), states, config.lr, config.weight_decay)
        common = optimizer.begin_step(
            torch.ones(()), torch.tensor(float(number), dtype=torch.float64)
        )
        if isinstance(optimizer, MatrixOptimizer):
            seen = optimizer.advance_(shard, common, torch.float32).view(start.shape)
            parts = [
                next(iter(optimizer.solve([part], torch.float32)))
                for part in seen.split(optimizer.split(weight))
            ]
            optimizer.update_(shard, torch.cat(parts).flatten(), common)
        else:
            optimizer.update_(shard, common)
    return master.view(start.shape)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("scale", ["original", "moonlight"])
def test_muon_equals_torch(
    shape: tuple[int, int], nesterov: bool, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(STEPS)]
    parameter = torch.nn.Parameter(start.clone())
    adjust = {"original": "original", "moonlight": "match_rms_adamw"}[scale]
    reference = torch.optim.Muon(
        [parameter], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust
    )
    # torch iterates in bf16, whose rounding five steps amplify; here in fp32, as on fp32 weights.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    for grad in grads:
        parameter.grad = grad
        reference.step()
    found = train(optimizer_of(name="muon", nesterov=nesterov, scale=scale), start, grads)
    torch.testing.assert_close(found, parameter.detach(), rtol=1e-4, atol=1e-5)


def plain_lion(start: Tensor, grads: list[Tensor]) -> Tensor:
    value, average = start.double(), torch.zeros_like(start).double()
    for grad in grads:
        value = value * (1 - 0.02 * 0.1) - 0.02 * (0.9 * average + 0.1 * grad).sign()
        average = 0.99 * average + 0.01 * grad
    return value.float()


def by_torch(
    kind: type[torch.optim.Optimizer], **settings: Any
) -> Callable[[Tensor, list[Tensor]], Tensor]:
    def run(start: Tensor, grads: list[Tensor]) -> Tensor:
        parameter = torch.nn.Parameter(start.double())
        optimizer = kind([parameter], lr=0.02, weight_decay=0.1, **settings)  # type: ignore[call-arg]
        for grad in grads:
            parameter.grad = grad.double()
            optimizer.step()
        return parameter.detach().float()

    return run


REFERENCES: dict[str, tuple[dict[str, Any], Callable[[Tensor, list[Tensor]], Tensor]]] = {
    "adamw": ({}, by_torch(torch.optim.AdamW, betas=(0.9, 0.95))),
    "sgd": ({"momentum": 0.8}, by_torch(torch.optim.SGD, momentum=0.8)),
    "sgd-nesterov": (
        {"name": "sgd", "nesterov": True},
        by_torch(torch.optim.SGD, momentum=0.9, nesterov=True),
    ),
    "sgd-plain": ({"name": "sgd", "momentum": 0.0}, by_torch(torch.optim.SGD)),
    "adagrad": ({}, by_torch(torch.optim.Adagrad)),
    "lion": ({}, plain_lion),
}


@pytest.mark.parametrize("case", REFERENCES)
def test_an_optimizer_equals_its_reference(case: str) -> None:
    settings, reference = REFERENCES[case]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 20, generator=generator)
    grads = [torch.randn(12, 20, generator=generator) for _ in range(STEPS)]
    found = train(optimizer_of(**{"name": case, **settings}), start, grads)
    # fp32 against float64, over 20 steps
    torch.testing.assert_close(found, reference(start, grads), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("shape", [(12, 20), (240,)])
def test_adafactor_equals_torch(shape: tuple[int, ...]) -> None:
    """A matrix that two ranks hold, cut within a row; from an embedding of zeros; its rate falls
    from step 4 on."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    start[:3] = 0.0
    grads = [torch.randn(shape, generator=generator) * (step + 1) for step in range(STEPS)]
    parameter = torch.nn.Parameter(start.double())
    reference = torch.optim.Adafactor([parameter], lr=0.5, weight_decay=0.1)
    config = optimizer_of(name="adafactor", lr=0.5)
    weight = Weight("layers.0.w", shape, ("w",), place=0)
    optimizer = config.members()[config.member_of(weight)].build()
    assert isinstance(optimizer, SummingOptimizer)
    master, variance = start.clone().flatten(), torch.zeros(240)
    matrices = all_matrices(optimizer, weight)
    for number, grad in enumerate(grads, 1):
        pieces = pieces_of(optimizer, weight, master, variance, grad.clone().flatten(), config)
        common = optimizer.begin_step(
            torch.ones(()), torch.tensor(float(number), dtype=torch.float64)
        )
        optimizer.update_(pieces, matrices, common, lambda flat: flat)
        parameter.grad = grad.double()
        reference.step()
    found = master.view(shape)
    # fp32 against float64, over 20 steps
    torch.testing.assert_close(found, parameter.detach().float(), rtol=1e-5, atol=2e-6)
    before = [x.clone() for x in (master, variance, *matrices.states.values())]
    pieces = pieces_of(optimizer, weight, master, variance, torch.full((240,), torch.nan), config)
    refused = optimizer.begin_step(torch.zeros(()), torch.ones((), dtype=torch.float64))
    optimizer.update_(pieces, matrices, refused, lambda flat: flat)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, (master, variance, *matrices.states.values()), strict=True)
    )


def all_matrices(optimizer: SummingOptimizer, weight: Weight) -> AllMatrices:
    rows, columns = weight.shape[0], weight.row_shape[0] if weight.row_shape else 1
    kept = {optimizer.ROW_STATE: torch.zeros(rows), optimizer.COLUMN_STATE: torch.zeros(columns)}
    states = {name: state for name, state in kept.items() if name}
    return AllMatrices(torch.tensor([rows]), torch.tensor([columns]), rows, columns, states)


def pieces_of(
    optimizer: SummingOptimizer,
    weight: Weight,
    master: Tensor,
    variance: Tensor,
    grad: Tensor,
    config: OptimizerConfig,
) -> list[Piece]:
    pieces = []
    for low, high in ((0, 107), (107, 240)):
        for found in rectangles(weight, 0, 1, low, high):
            master_, variance_, grad_ = (
                x[found.start : found.stop].view(found.rows[1] - found.rows[0], -1)
                for x in (master, variance, grad)
            )
            states = {} if optimizer.ROW_STATE else {"variance": variance_}
            pieces.append(
                Piece(
                    0,
                    slice(*found.rows),
                    slice(*found.columns),
                    master_,
                    None,
                    grad_,
                    states,
                    config.lr,
                    0.1,
                    True,
                )
            )
    return pieces


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adagrad", "lion"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_refused_step_changes_nothing(name: str, precision: torch.dtype) -> None:
    config, generator = optimizer_of(name=name), torch.Generator().manual_seed(0)
    weights = torch.randn(64, generator=generator).to(precision)
    master, grad = weights.float(), torch.full((64,), torch.nan)
    states = {state: torch.rand(64, generator=generator) for state in config.STATES}
    shard = Shard(
        master, None if precision == torch.float32 else weights, grad, states, config.lr, 0.1
    )
    before = [x.clone() for x in (weights, master, *states.values())]
    optimizer = config.build()
    common = optimizer.begin_step(torch.zeros(()), torch.ones((), dtype=torch.float64))
    if isinstance(optimizer, MatrixOptimizer):
        seen = optimizer.advance_(shard, common, optimizer.message_dtype(precision))
        (solved,) = optimizer.solve([seen.view(8, 8)], precision)
        optimizer.update_(shard, solved.flatten(), common)
    else:
        optimizer.update_(shard, common)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (weights, master, *states.values()), strict=True)
    )


@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(3, 48, 128), (2, 128, 48)])
def test_singular_values_come_near_to_one(coefficients: str, shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = torch.stack(list(orthogonalize(list(matrices), coefficients)))
    # As a batch they are multiplied by torch: on GPUs.
    together = newton_schulz._iterate(matrices, coefficients, 1.0)
    torch.testing.assert_close(together, found, rtol=1e-4, atol=1e-5)
    low, high = {"deepseek_v4": (0.999, 1.001)}.get(coefficients, (0.65, 1.25))
    values = torch.linalg.svdvals(found.double())
    assert low <= values.min()
    assert values.max() <= high
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    assert (found.double() * (u @ vh)).sum() / found.double().norm() / (u @ vh).norm() > 0.95, (
        "the singular vectors stay"
    )
    # Alone or among others, the same bits.
    assert torch.equal(found[0], next(orthogonalize([matrices[0].clone()], coefficients)))


def test_groups_have_settings_of_their_own() -> None:
    config = optimizer_of(
        name="muon",
        weight_decay=0.1,
        adamw={"lr": 0.002, "weight_decay": 0.3},
        groups=[
            {"match": "model.layers.0.*", "lr": 0.5},
            {"match": "*.weight", "weight_decay": 0.7, "optimizer": "adamw"},
        ],
    )
    first = Weight("layers.0.w", (4, 4), ("model.layers.0.a.weight",), place=0)
    second = Weight("layers.1.w", (4, 4), ("model.layers.1.a.weight",), place=1)
    bias = Weight("layers.1.b", (4,), ("model.layers.1.a.bias",), place=1, decay=False)
    assert config.treatment(first) == ("muon", 0.5, 0.1)
    assert config.treatment(second) == ("adamw", 0.1, 0.7)
    assert config.treatment(bias) == ("adamw", 0.1, 0.0)
    assert config.states_of(first) == ("momentum_buffer",)
    assert config.states_of(second) == ("exp_avg", "exp_avg_sq")
    fused = Weight(
        "layers.1.qkv",
        (8, 4),
        ("model.layers.1.q.weight", "model.layers.1.k.weight"),
        parts=(4, 4),
        place=1,
    )
    with pytest.raises(ConfigError, match=r"takes model\.layers\.1\.k\.weight but not"):
        optimizer_of(groups=[{"match": "*.k.weight"}]).treatment(fused)
    for name in ("muon", "adafactor"):
        config = optimizer_of(name=name, groups=[{"match": "*.bias", "optimizer": name}])
        with pytest.raises(
            ConfigError,
            match=rf"gives model\.layers\.1\.a\.bias to optimizer '{name}', which is for mat",
        ):
            config.treatment(bias)
    with pytest.raises(ValueError, match="optimizer = 'muon' is none of this config's: adamw"):
        optimizer_of(groups=[{"match": "*", "optimizer": "muon"}])
