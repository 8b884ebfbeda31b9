"""Objectives that need more than each token's loss: logits in vocabulary shards, hidden states, or
a frozen teacher. Loss, metrics, validation and every gradient of a step on each layout, against a
plain statement on the clean model. So does next_token with a z-loss and smoothed labels, which is
content with losses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Axis, Mesh, make_mesh
from megalite.config import Config, ObjectiveConfig
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.errors import ConfigError
from megalite.models import family, model_config, to_hf_config, weight_table
from megalite.models.layers import IGNORE, Decoder
from megalite.parallel.outputs import HiddenStates, VocabShards
from megalite.parallel.stage import Inputs, Output
from megalite.plan import make_plan
from megalite.registry import objectives
from megalite.training.objectives import NextToken, Objective
from megalite.training.parts import build, forward, forward_backward
from ranks import run_ranks

SEED, BATCH, LENGTH, SMOOTHING, Z, SIZE = 7, 4, 32, 0.1, 0.05, 0.3
# Vocab 193 leaves a ragged shard, and over 4 ranks one of padding alone.
MODEL: dict[str, Any] = {
    "family": "llama", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": LENGTH, "init_std": 0.2,
}  # fmt: skip
TIED = MODEL | {"tie_embeddings": True}
CAPPED = MODEL | {"family": "gemma2", "head_dim": 12, "sliding_window": 16, "logit_softcap": 3.0}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, MODEL, {}),
    "tensor 2": (2, MODEL, {"tensor": 2}),
    "tensor 2, whole sequences": (2, MODEL, {"tensor": 2, "sequence": False}),
    "tensor 2, capped": (2, CAPPED, {"tensor": 2}),
    "pipeline 2": (2, MODEL, {"pipeline": 2}),
    "pipeline 2, tied": (2, TIED, {"pipeline": 2}),
    "pipeline 2, zero bubble": (2, MODEL, {"pipeline": 2, "schedule": "zero_bubble", "virtual": 2}),
    "context 2": (2, MODEL, {"context": 2}),
    "data 2, ZeRO-2": (2, MODEL, {"zero_stage": 2}),
    "tensor 4": (4, MODEL, {"tensor": 4}),
    "tensor 2, context 2": (4, MODEL, {"tensor": 2, "context": 2}),
}


def smooth_loss(logits: VocabShards, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return label smoothing with a z-loss, and the square of the normaliser alone, [B,T] each."""
    lse_BT = logits.log_sum_exp_BT
    mean_BT = logits.sum(logits.logits_BTV) / logits.vocab_size
    wrong_BT = (1 - SMOOTHING) * logits.cross_entropy(labels_BT) + SMOOTHING * (lse_BT - mean_BT)
    has_label = labels_BT != IGNORE
    square_BT = lse_BT.square() * has_label
    return wrong_BT * has_label + Z * square_BT, square_BT


class Smooth(NextToken):
    metrics: tuple[str, ...] = ("square",)
    judges: Output = "logits"

    def measure(self, out: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        assert inputs.labels_BT is not None
        loss_BT, square_BT = smooth_loss(out, inputs.labels_BT)
        return loss_BT.sum(1), square_BT.detach().sum(1, keepdim=True)


@objectives.register("smooth")
class SmoothConfig(ObjectiveConfig):
    """Label smoothing and a z-loss, from logits."""

    name: Literal["smooth"] = "smooth"
    NEEDS: ClassVar[Output] = "logits"

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return Smooth()


class Small(Smooth):
    judges: Output = "hidden_states"

    def measure(self, out: HiddenStates, inputs: Inputs) -> tuple[Tensor, Tensor]:
        loss_B, metrics = super().measure(out.head(out.states_BTD), inputs)
        is_here_BT1 = (inputs.labels_BT != IGNORE)[..., None]  # type: ignore[index]
        return loss_B + SIZE * (out.states_BTD.float() * is_here_BT1).square().mean(2).sum(
            1
        ), metrics


@objectives.register("small")
class SmallConfig(ObjectiveConfig):
    """The same, and hidden states that stay small."""

    name: Literal["small"] = "small"
    NEEDS: ClassVar[Output] = "hidden_states"

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return Small()


class Learn(NextToken):
    judges: Output = "logits"

    def measure(self, out: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Kullback-Leibler divergence of the model's distribution from the teacher's."""
        assert inputs.frozen is not None
        assert inputs.labels_BT is not None
        hidden = inputs.frozen()
        teacher_BTV, student_BTV = hidden.head(hidden.states_BTD).log_softmax(), out.log_softmax()
        loss_BT = out.sum(teacher_BTV.exp() * (teacher_BTV - student_BTV)) * (
            inputs.labels_BT != IGNORE
        )
        return loss_BT.sum(1), loss_BT.new_empty(len(loss_BT), 0)


@objectives.register("learn")
class LearnConfig(ObjectiveConfig):
    """Distillation from a frozen teacher, from whole logits."""

    name: Literal["learn"] = "learn"
    teacher: Path
    NEEDS: ClassVar[Output] = "logits"

    def frozen_model(self, config: Config) -> Path:
        return self.teacher

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return Learn()


SETTINGS = {"next_token": {"z_loss": Z, "label_smoothing": SMOOTHING}}
TEACHER = MODEL | {"hidden_size": 32, "intermediate_size": 40, "tie_embeddings": True}
"""Another model than the one that learns, of as many layers at least as there are stages."""


def write_teacher(folder: Path) -> Path:
    config = model_config(TEACHER)
    read, tensors = from_seed(SEED + 1, Mesh.alone()), {}
    for weight in weight_table(config):
        tensors |= weight.to_hf(read(weight, "weight", 0, weight.numel).view(weight.shape))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    return folder


def config_of(
    objective: str,
    model: dict[str, Any],
    parallel: dict[str, Any],
    folder: Path | None = None,
    **train: Any,
) -> Config:
    teacher = {"teacher": str(folder)} if objective == "learn" else {}
    return parse_config(
        {
            "run": {"name": "needs"},
            "model": model,
            "data": {"train": [{"path": "unused"}], "seq_length": LENGTH},
            "objective": {"name": objective} | SETTINGS.get(objective, {}) | teacher,
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
    """A third of the labels carries no loss, unevenly."""
    tokens = torch.randint(0, 193, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    for row in range(BATCH):
        labels[row, : row * 7] = IGNORE
    return MicroBatch(tokens[:, :-1], labels, torch.arange(BATCH))


def step_on_rank(
    rank: int, world_size: int, folder: Path, cases: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    return [step(folder, objective, layout) for objective, layout in cases]


def step(folder: Path, objective: str, layout: str) -> dict[str, Any]:
    """A training step's results and, before it, the sum of the losses of a validation."""
    ranks, model, parallel = LAYOUTS[layout]
    name, _, chunk = objective.partition(" in chunks of ")
    config = config_of(name, model, parallel, folder, loss_chunk=int(chunk) if chunk else None)
    table = weight_table(config.model)
    plan = make_plan(config, table, ranks)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(SEED, mesh))
    whole, rows = whole_batch(), torch.arange(BATCH).view(-1, mesh.data.size, 1)[:, mesh.data.rank]
    batch = [MicroBatch(whole.tokens[row], whole.labels[row], whole.samples[row]) for row in rows]
    parts.train(False)
    judged = torch.zeros(())
    for out, inputs, micro in forward(parts, batch, mesh, parts.objective.judges):
        judged += parts.objective.judge(out, parts.objective.complete(inputs, micro, "valid"))[
            0
        ].sum()
    judged = all_reduce(all_reduce(judged, mesh.replicas), mesh.pipeline)
    found = forward_backward(parts, batch, mesh, SEED)
    owners = {
        weight.name: plan.rank_at(
            next(s.index for s in plan.stages if s.holds(weight.place)) % plan.pipeline, 0, 0
        )
        for weight in table
    }
    metrics = {name: x.item() for name, x in found.items()} | {"judged": judged.item()}
    return {"metrics": metrics, "grads": parts.engine.gather("grad", owners)}


def clean_model(values: dict[str, Any], seed: int) -> Decoder:
    config = model_config(values)
    model = family(config.family).MODEL(config)
    parameters, read = dict(model.named_parameters()), from_seed(seed, Mesh.alone())
    with torch.no_grad():
        for weight in weight_table(config):
            parameters[weight.name].copy_(
                read(weight, "weight", 0, weight.numel).view(weight.shape)
            )
    return model


def plain(objective: str, model_values: dict[str, Any]) -> dict[str, Any]:
    """The same from whole logits, the whole batch at once, with torch alone. Validation of
    next_token is without what training adds to it."""
    model = clean_model(model_values, SEED)
    batch = whole_batch()
    states: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, arguments, out: states.append(out))
    logits, is_here = model(batch.tokens), batch.labels != IGNORE
    count = is_here.sum()
    lse = logits.logsumexp(-1)[is_here]
    losses = F.cross_entropy(
        logits[is_here], batch.labels[is_here], label_smoothing=SMOOTHING, reduction="sum"
    )
    loss = losses + Z * lse.square().sum()
    if objective == "small":
        loss = loss + SIZE * states[0][is_here].square().mean(1).sum()
    if objective == "learn":
        with torch.no_grad():
            target = clean_model(TEACHER, SEED + 1)(batch.tokens)[is_here].log_softmax(-1)
        loss = F.kl_div(logits[is_here].log_softmax(-1), target, log_target=True, reduction="sum")
    (loss / count).backward()
    metrics = {"loss": loss / count, "judged": loss}
    if objective.startswith("next_token"):
        alone = F.cross_entropy(logits[is_here], batch.labels[is_here], reduction="sum")
        metrics |= {"cross_entropy": alone / count, "judged": alone}
    elif objective != "learn":
        metrics["square"] = lse.square().mean()
    return {
        "metrics": {name: x.item() for name, x in metrics.items()},
        "grads": {name: parameter.grad for name, parameter in model.named_parameters()},
    }


CASES = [
    (objective, layout)
    for objective in ("smooth", "small", "learn", "next_token")
    for layout in LAYOUTS
]
CASES += [
    ("next_token in chunks of 5", layout)
    for layout in ("one process", "tensor 2", "pipeline 2, zero bubble", "context 2", "tensor 4")
]


@cache
def results(ranks: int) -> dict[tuple[str, str], list[dict[str, Any]]]:
    cases = [case for case in CASES if LAYOUTS[case[1]][0] == ranks]
    with TemporaryDirectory() as folder:
        of_ranks = run_ranks(ranks, step_on_rank, write_teacher(Path(folder)), cases)
    return {case: [found[number] for found in of_ranks] for number, case in enumerate(cases)}


@pytest.mark.parametrize(("objective", "layout"), CASES)
def test_objectives_that_need_more_are_the_same_on_every_layout(
    objective: str, layout: str
) -> None:
    ranks, model, _ = LAYOUTS[layout]
    found, wanted = results(ranks)[objective, layout], plain(objective, model)
    for rank in found:  # fp32 sums in another order, below and above
        assert rank["metrics"] == pytest.approx(wanted["metrics"], rel=1e-5)
    grads = {name: grad for rank in found for name, grad in rank["grads"].items()}
    assert grads.keys() == wanted["grads"].keys()
    for name, grad in grads.items():
        error = ((grad - wanted["grads"][name]).norm() / wanted["grads"][name].norm()).item()
        assert error <= 1e-5, f"gradient of {name} is off by {error:.1e}"


def test_chunks_of_the_loss_are_refused_where_all_logits_are_needed() -> None:
    with pytest.raises(
        ConfigError,
        match=r"smooth needs train\.loss_chunk: null, not 8; it takes the logits of all",
    ):
        config_of("smooth", MODEL, {}, loss_chunk=8)
    with pytest.raises(
        ConfigError, match=r"small needs train\.loss_chunk: null, not 8; it takes the hidden states"
    ):
        config_of("small", MODEL, {}, loss_chunk=8)


def test_a_frozen_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = config_of("learn", MODEL | {"max_positions": 64}, {}, write_teacher(tmp_path))
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_length": 64})})
    plan = make_plan(config, weight_table(config.model), 1)
    with pytest.raises(
        ConfigError, match=r"data\.seq_length = 64 is longer than the 32 positions of the model in "
    ):
        build(config, plan, make_mesh(plan, torch.device("cpu")))


def test_a_second_product_with_the_head_is_refused() -> None:
    """The engine counts on one gradient of its weight in a micro-batch."""
    states = HiddenStates(torch.zeros(1, 2, 3), lambda x: VocabShards(x, Axis(), 3))
    states.head(states.states_BTD)
    with pytest.raises(RuntimeError, match="once in a micro-batch"):
        states.head(states.states_BTD)
