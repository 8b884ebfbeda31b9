"""What one GPU computes against what the CPU does, and that no step waits for it. `pytest --cuda`
on a machine with a GPU; elsewhere there is nothing to run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.health.numbers import Numbers
from megalite.health.replicas import ReplicaCheck
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.training.parts import RankModel, build, forward_backward

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no GPU, or pytest runs without --cuda"
)

SEED, STEPS, BATCH, LENGTH, VOCAB = 7, 3, 4, 64, 193
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "family": "llama", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 80, "num_layers": 3,
        "num_attention_heads": 4, "num_kv_heads": 2, "max_positions": LENGTH, "init_std": 0.1,
    },
    "gpt2": {
        "family": "gpt2", "vocab_size": VOCAB, "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4,
        "max_positions": LENGTH, "init_std": 0.1,
        "embedding_dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.1,
    },
}  # fmt: skip
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "micro-batches": ["train.micro_batch_size=1"],
    "zero-2": ["parallel.zero_stage=2", "train.micro_batch_size=2"],
    "documents": ["data.document_mask=true"],
    "recompute": ["train.recompute=full"],
    "loss-chunks": ["train.loss_chunk=50"],
    "bf16": ["train.precision=bf16"],
}
CASES = [(model, variant) for model in MODELS for variant in VARIANTS]
FP32 = [case for case in CASES if case[1] != "bf16"]


def config_of(model: str, variant: str) -> Config:
    return parse_config(
        {
            "run": {"name": "cuda"},
            "model": MODELS[model],
            "data": {"train": [{"path": "unused"}], "seq_length": LENGTH},
            "parallel": {"bucket_mb": 0.05},
            "train": {
                "steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": BATCH, "precision": "fp32",
                "seed": SEED,
            },
            # As in tests/parallel/test_parity.py: eps far above rounding, and clipping is active.
            "optimizer": {"lr": 1e-2, "eps": 1e-3, "clip": 0.5},
        },
        VARIANTS[variant],
    )  # fmt: skip


def batch_of(step: int, config: Config, device: torch.device) -> list[MicroBatch]:
    """As the loader gives it: for a GPU, in pinned memory. Some labels carry no loss."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[1, :9] = -100
    documents = (torch.rand(BATCH, LENGTH, generator=generator) < 0.1).long().cumsum(1)
    whole = (tokens[:, :-1].contiguous(), labels, torch.arange(BATCH) + step * BATCH, documents)
    rows = zip(*(x.split(config.train.micro_batch_size) for x in whole), strict=True)
    found = [MicroBatch(t, y, s, d if config.data.document_mask else None) for t, y, s, d in rows]
    return [micro.pinned() for micro in found] if device.type == "cuda" else found


def start(config: Config, device: torch.device) -> tuple[RankModel, Mesh]:
    plan = make_plan(config, weight_table(config.model), 1)
    mesh = make_mesh(plan, device)
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(SEED, Mesh.alone()))
    return parts, mesh


def take_step(
    parts: RankModel, mesh: Mesh, batch: Sequence[MicroBatch], numbers: Numbers | None = None
) -> tuple[Tensor, Tensor]:
    """(loss, gradient norm), for which nobody has waited."""
    loss = forward_backward(parts, list(batch), mesh, SEED)["loss"]
    if numbers is None:
        return loss, parts.engine.step(1e-2)
    norm = parts.engine.step(1e-2, numbers.update_gate(loss))
    numbers.note(1, 0)
    return loss, norm


def train(config: Config, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss and gradient norm of every step [STEPS,2], weights and moments after them), on the
    CPU."""
    parts, mesh = start(config, device)
    curve = [
        torch.stack(take_step(parts, mesh, batch_of(step, config, device))) for step in range(STEPS)
    ]
    owners = {weight.name: 0 for weight in weight_table(config.model)}
    kinds = ("weight", *parts.engine.states)
    state = {
        f"{kind} of {name}": x
        for kind in kinds
        for name, x in parts.engine.gather(kind, owners).items()
    }
    return torch.stack(curve).cpu(), {name: x.cpu() for name, x in state.items()}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize(("model", "variant"), FP32)
def test_equals_the_cpu(model: str, variant: str) -> None:
    """Within the project's bound for every layout: sums in another order differ by about 1e-7 per
    operation."""
    config = config_of(model, variant)
    curve, state = train(config, CUDA)
    wanted_curve, wanted_state = train(config, CPU)
    assert torch.allclose(curve, wanted_curve, rtol=1e-5, atol=0)
    assert state.keys() == wanted_state.keys()
    errors = {name: relative_error(x, wanted_state[name]) for name, x in state.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-5, f"{worst} is off by {errors[worst]:.1e} after {STEPS} steps"


@pytest.mark.parametrize("model", MODELS)
def test_bf16_follows_the_cpu(model: str) -> None:
    """Within 1e-2: bf16 itself rounds by 2^-9."""
    config = config_of(model, "bf16")
    (curve, state), (wanted, _) = train(config, CUDA), train(config, CPU)
    assert all(x.isfinite().all() for x in state.values())
    assert torch.allclose(curve[:, 0], wanted[:, 0], rtol=1e-2, atol=0)


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("model", "variant"), CASES)
def test_no_step_waits_for_the_device(model: str, variant: str) -> None:
    config = config_of(model, variant)
    batches = [batch_of(step, config, CUDA) for step in range(2)]
    parts, mesh = start(config, CUDA)
    numbers, check = Numbers(config.health, CUDA), ReplicaCheck(mesh)
    take_step(parts, mesh, batches[0], numbers)  # the first may: libraries start up
    with no_waiting():
        check.begin(1, parts.engine.copies())
        loss, norm = take_step(parts, mesh, batches[1], numbers)
    assert loss.isfinite()
    assert norm.isfinite()
    assert numbers.look(2, True) == []
