"""Distillation (Hinton et al. 2015): learn from the distributions of a frozen teacher, beside the
tokens themselves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Axis, Mesh
from megalite.config import Config, ModelConfig, ObjectiveConfig
from megalite.data.tokenizer import load_tokenizer
from megalite.data.tokenizer_files import tokenizer_file
from megalite.errors import ConfigError
from megalite.kernels.divergence import Columns, Divergence, divergence, linear_divergence
from megalite.models import model_config
from megalite.parallel.outputs import HiddenStates
from megalite.parallel.stage import Inputs, Output
from megalite.parallel.tensor import combine, enter, vocab_columns
from megalite.training.objectives import NextToken, Objective


class DistillConfig(ObjectiveConfig):
    """Divergence from a frozen teacher's distribution of every token that has a label, beside its
    cross-entropy."""

    name: Literal["distill"] = "distill"
    teacher: Path = Field(description="Hugging Face folder of the teacher, or a checkpoint.")
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="forward_kl: cover all that the teacher may say; reverse_kl: say only what it may say, which small "
        "students can do better; jsd: between the two (Jensen-Shannon).",
    )
    temperature: float = Field(
        1.0, gt=0, description="Both models' logits are divided by it, for the divergence only."
    )
    weight: float = Field(
        0.5, gt=0, le=1, description="Weight of the divergence; the cross-entropy has the rest."
    )

    NEEDS: ClassVar[Output] = "hidden_states"
    IN_CHUNKS: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        if config.model.task != "causal":
            raise ValueError(
                f"objective.name: distill needs model.task: causal, not {config.model.task}"
            )

    def frozen_model(self, config: Config) -> Path:
        return self.teacher

    def build(self, config: Config, mesh: Mesh) -> Objective:
        teacher = model_config({"hf": self.teacher})
        check_teacher(self.teacher, teacher, config)
        return Distill(self, mesh.tensor, min(teacher.vocab_size, config.model.vocab_size))


def check_teacher(folder: Path, teacher: ModelConfig, config: Config) -> None:
    """Raise ConfigError where the model in `folder` cannot teach that of `config`, because a token
    is another one to it."""
    named, model = f"objective.teacher = {folder}", config.model
    if teacher.task != "causal":
        raise ConfigError(f"{named} predicts no next token; its task is {teacher.task}")
    own, is_known = config.data.tokenizer, False
    if own is not None and tokenizer_file(folder) is not None:
        is_known = load_tokenizer(folder).fingerprint() == load_tokenizer(own).fingerprint()
        if not is_known:
            raise ConfigError(
                f"{named} has another tokenizer than data.tokenizer = {own}; distillation compares "
                "models token by token, and needs one tokenizer for both"
            )
    if teacher.vocab_size == model.vocab_size:
        return
    sizes = (
        f"{named} has vocab_size = {teacher.vocab_size}, and the trained model {model.vocab_size}"
    )
    if not is_known:
        raise ConfigError(
            f"{sizes}; that is the same vocabulary with other padding only where data.tokenizer and a tokenizer in the "
            "teacher's folder say so"
        )
    if config.parallel.tensor > 1:
        raise ConfigError(
            f"{sizes}; with parallel.tensor = {config.parallel.tensor} the two must be equal, for a rank to hold the "
            "same tokens of both"
        )


class Distill(NextToken):
    """Compare with the teacher in training; validation is of the cross-entropy alone, which other
    runs have too."""

    metrics: tuple[str, ...] = ("cross_entropy", "divergence")

    def __init__(self, config: DistillConfig, axis: Axis, num_common: int):
        """Learn as `config` says; `axis` is the tensor axis, and both models have the first
        `num_common` tokens."""
        super().__init__()
        self.wanted = Divergence(config.loss, config.temperature, config.weight)
        self.axis, self.num_common = axis, num_common

    def measure(self, out: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        assert isinstance(out, HiddenStates)
        assert inputs.frozen is not None
        assert inputs.labels_BT is not None
        teacher, labels_BT = inputs.frozen(), inputs.labels_BT
        head, of_teacher = out.chunked, teacher.chunked
        if head is not None and of_teacher is not None:
            losses_BT3 = linear_divergence(
                # Whole on every rank: only their gradient is to be summed, of all columns.
                enter(out.states_BTD, self.axis, sequence=False),
                head.weight,
                teacher.states_BTD,
                of_teacher.weight,
                labels_BT,
                head.rows,
                self._columns(head.weight.shape[0], head.vocab_size),
                self.wanted,
                head.wgrad_callback,
            )
        else:
            shards = out.head(out.states_BTD)
            logits_BTV = shards.padded_BTV
            columns = self._columns(logits_BTV.shape[-1], shards.vocab_size)
            teacher_BTV = teacher.head(teacher.states_BTD).padded_BTV
            losses_BT3 = divergence(logits_BTV, teacher_BTV, labels_BT, columns, self.wanted)
        losses_B3 = losses_BT3.sum(1)
        return losses_B3[:, 0], losses_B3[:, 1:].detach()

    def judge(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return NextToken().measure(out, inputs)

    def _columns(self, held: int, vocab_size: int) -> Columns:
        """Return the columns of the vocabulary of which this rank holds `held`."""
        axis = self.axis
        first, num_valid = vocab_columns(held, axis, vocab_size)
        _, num_common = vocab_columns(held, axis, self.num_common)
        both = partial(combine, axis=axis) if axis.size > 1 else None
        return Columns(first, num_valid, num_common, both, partial(all_reduce, axis=axis))
