"""Distillation beside what tests/tune/test_objectives.py compares on each layout: limits of the
divergences, whole runs, and teachers that cannot teach."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from chats import write_tokenizer
from megalite.config import Config
from megalite.errors import ConfigError
from megalite.kernels.divergence import Columns, Divergence, divergence
from megalite.kernels.loss import IGNORE
from megalite.models import model_config
from megalite.train import train
from megalite.training.distill import check_teacher
from small_runs import MODELS, make_config, metrics_of

KINDS = ("forward_kl", "reverse_kl", "jsd")
LABELS = torch.tensor([[3, IGNORE, 5, 1]])


def compare(
    student: torch.Tensor, teacher: torch.Tensor, wanted: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [1,4,3] and the gradient of the student's logits."""
    leaf = student.clone().requires_grad_()
    common = min(student.shape[-1], teacher.shape[-1])
    columns = Columns(0, student.shape[-1], common, None, lambda x: x)
    # The product's fresh output is overwritten.
    losses = divergence(leaf * 1, teacher, LABELS, columns, wanted)
    losses[..., 0].sum().backward()
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_nothing_to_learn_from_oneself(kind: Any) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 64) * 3
    losses, grad = compare(logits, logits, Divergence(kind, 2.0, 1.0))
    assert losses[..., 2].abs().max() < 1e-6  # fp32
    assert grad.abs().max() < 1e-6
    assert losses[0, 0, 1] == pytest.approx(
        F.cross_entropy(logits[0, :1], LABELS[0, :1]).item(), rel=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_padding_that_only_one_model_has_is_left_out(kind: Any) -> None:
    """The cross-entropy is still over all that the student can say."""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 70), torch.randn(1, 4, 64)
    wanted = Divergence(kind, 1.0, 0.5)
    losses, _ = compare(student, teacher, wanted)
    alike, _ = compare(student[..., :64].contiguous(), teacher, wanted)
    wide, _ = compare(teacher, student, wanted)
    narrow, _ = compare(teacher, student[..., :64].contiguous(), wanted)
    assert torch.equal(losses[..., 2], alike[..., 2])
    assert torch.equal(wide, narrow)
    assert losses[0, 0, 1] == pytest.approx(
        F.cross_entropy(student[0, :1], LABELS[0, :1]).item(), rel=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_without_a_label_have_no_gradient_whatever_their_logits(kind: Any) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 64), torch.randn(1, 4, 64)
    losses, grad = compare(student, teacher, Divergence(kind, 1.0, 0.5))
    student[0, 1] = torch.inf
    others, other_grad = compare(student, teacher, Divergence(kind, 1.0, 0.5))
    assert torch.equal(losses, others)
    assert torch.equal(grad, other_grad)
    assert not grad[0, 1].any()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a small run."""
    config = make_config(tmp_path_factory.mktemp("teacher"))
    train(config)
    return config.run.folder / "checkpoints" / "step-00000016"


def student_of(folder: Path, teacher: Path, *overrides: str) -> Config:
    return make_config(
        folder,
        "llama",
        f"objective={{name: distill, teacher: {teacher}}}",
        "train.steps=8",
        *overrides,
    )


def test_a_run_learns_from_its_teacher(tmp_path: Path, teacher: Path) -> None:
    narrow = ("model.hidden_size=16", "model.intermediate_size=24", "train.loss_chunk=24")
    config = student_of(tmp_path, teacher, *narrow)
    train(config)
    lines = metrics_of(config)
    steps = [line for line in lines if "loss" in line]
    for line in steps:
        assert line["loss"] == pytest.approx(
            (line["cross_entropy"] + line["divergence"]) / 2, rel=1e-5
        )
    assert steps[-1]["divergence"] < steps[0]["divergence"]
    assert {"valid_loss", "valid_perplexity"} <= lines[-1].keys()


def test_validation_is_of_the_cross_entropy_alone(tmp_path: Path, teacher: Path) -> None:
    """A student that is its own teacher, and has nothing to learn at a rate of 0, is validated as
    the teacher was."""
    still = ("optimizer.schedule={name: constant}", "optimizer.lr=1e-30", "train.steps=1")
    config = student_of(tmp_path, teacher, f"model={{hf: {teacher}}}", *still)
    train(config)
    lines = metrics_of(config)
    before = json.loads((teacher.parents[1] / "metrics.jsonl").read_text().splitlines()[-1])
    assert lines[0]["divergence"] < 1e-6
    assert lines[-1]["valid_loss"] == pytest.approx(before["valid_loss"], rel=1e-6)


def refusal(folder: Path, config: Config) -> str:
    with pytest.raises(ConfigError) as found:
        check_teacher(folder, model_config({"hf": folder}), config)
    return str(found.value)


def test_a_teacher_of_other_tokens_is_refused(tmp_path: Path, teacher: Path) -> None:
    other = dict(MODELS["llama"], vocab_size=128)
    config = make_config(tmp_path, other, f"objective={{name: distill, teacher: {teacher}}}")
    assert (
        f"objective.teacher = {teacher} has vocab_size = 97, and the trained model 128; that is"
        in refusal(teacher, config)
    )
    known = tmp_path / "teacher"
    known.mkdir()
    (known / "config.json").write_bytes((teacher / "config.json").read_bytes())
    tokenizer = write_tokenizer(known, vocab_size=300)
    data = config.data.model_copy(
        update={"tokenizer": write_tokenizer(tmp_path / "own", vocab_size=280)}
    )
    assert f"another tokenizer than data.tokenizer = {tmp_path / 'own'}" in refusal(
        known, config.model_copy(update={"data": data})
    )
    config = config.model_copy(update={"data": data.model_copy(update={"tokenizer": tokenizer})})
    # The same tokens, padded to another size.
    check_teacher(known, model_config({"hf": known}), config)
    over_ranks = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"tensor": 2})}
    )
    assert "with parallel.tensor = 2 the two must be equal" in refusal(known, over_ranks)


def test_classes_are_not_distilled(tmp_path: Path) -> None:
    classes = MODELS["llama"] | {"task": "classification", "labels": ["a", "b"]}
    asked = ("objective={name: distill, teacher: somewhere}", "data.document_mask=true")
    with pytest.raises(ConfigError, match=r"distill needs model\.task: causal, not classification"):
        make_config(tmp_path, classes, *asked)
