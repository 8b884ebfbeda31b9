"""Distillation (Hinton et al. 2015): learn from the distributions of a frozen teacher, beside the
tokens themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megalite.checkpoint.match import digests_of
from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.config import Config, ModelConfig, ObjectiveConfig
from megalite.config.section import Section
from megalite.data.dataset import RowSource, Split
from megalite.data.loader import Batches, MadeBatches, MicroBatch
from megalite.data.mixture import Mixture
from megalite.data.teacher_logits import TeacherLogits
from megalite.data.tokenizer import load_tokenizer
from megalite.data.tokenizer_files import tokenizer_file
from megalite.errors import ConfigError, DataError
from megalite.kernels.divergence import (
    Columns,
    Divergence,
    compared,
    divergence,
    linear_compared,
    linear_divergence,
)
from megalite.kernels.top_divergence import TopComparison, TopTokens
from megalite.models import model_config
from megalite.models.context_cut import take
from megalite.parallel.outputs import HiddenStates
from megalite.parallel.stage import Inputs, Output, Stage
from megalite.parallel.tensor import combine, enter, vocab_columns
from megalite.training.hidden import HiddenMatch, HiddenPair, match_layers
from megalite.training.objectives import NextToken, Objective
from megalite.utils.changes import spelled

if TYPE_CHECKING:
    from megalite.plan import Plan
    from megalite.training.parts import RankModel
    from megalite.training.run import Run


class OnPolicyConfig(Section):
    """Have the student write answers that it learns from."""

    share: float = Field(
        0.5, gt=0, le=1, description="Share of the samples whose answers the student writes."
    )
    max_tokens: int = Field(
        128, ge=1, description="Longest answer; it is never longer than the row it stands in."
    )
    temperature: float = Field(1.0, gt=0, description="Temperature that answers are drawn at.")
    slots: int = Field(
        8, ge=1, description="Answers that are written at a time, where there is a KV cache."
    )


class DistillConfig(ObjectiveConfig):
    """Divergence from a frozen teacher's distribution of every token that has a label, beside its
    cross-entropy."""

    name: Literal["distill"] = "distill"
    teacher: Path | None = Field(
        None, description="Hugging Face folder of the teacher, or a checkpoint."
    )
    teacher_logits: Path | None = Field(
        None,
        description="Folder of the teacher's likeliest tokens, which `megalite teacher-logits` makes. They are learned "
        "from instead, without the teacher in memory.",
    )
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

    hidden: tuple[HiddenPair, ...] = Field(
        (), description="Pairs of layers whose outputs are compared as well."
    )

    on_policy: OnPolicyConfig | None = Field(
        None,
        description="Learn from answers that the student writes itself. null: from the data alone.",
    )

    NEEDS: ClassVar[Output] = "hidden_states"
    IN_CHUNKS: ClassVar[bool] = True

    def check(self, config: Config) -> None:
        if config.model.task != "causal":
            raise ValueError(
                f"objective.name: distill needs model.task: causal, not {config.model.task}"
            )
        if self.on_policy is not None:
            self._check_on_policy(config)
        if self.teacher_logits is not None:
            self._check_cached(config)
        elif self.teacher is None:
            raise ValueError(
                "objective.name: distill needs objective.teacher, a model, or objective.teacher_logits, what one said"
            )

    def _check_on_policy(self, config: Config) -> None:
        """Raise ValueError for settings that do not go with answers of the student."""
        for key, value, only, why in (
            ("objective.teacher_logits", self.teacher_logits, None, "the teacher is asked about new answers"),
            ("objective.weight", self.weight, 1, "the cross-entropy of what it says itself teaches a student nothing"),
            ("data.document_mask", config.data.document_mask, True, "an answer sees its own row alone"),
        ):  # fmt: skip
            if value != only:
                wanted, found = (
                    spelled(str(x) if isinstance(x, Path) else x) for x in (only, value)
                )
                raise ValueError(f"objective.on_policy needs {key}: {wanted}, not {found}: {why}")

    def _check_cached(self, config: Config) -> None:
        """Raise ValueError for settings that make other samples than the teacher has seen."""
        for name, value, only in (
            ("fim", config.data.fim, None), ("augment", config.data.augment, None),
            ("seq_length_warmup", config.data.seq_length_warmup, ()), ("order", config.data.order == "megatron", False),
        ):  # fmt: skip
            if value != only:
                raise ValueError(
                    f"objective.teacher_logits is of the samples of one epoch, which data.{name} changes; leave it "
                    "out, or give objective.teacher alone"
                )

    def projections(self, model: ModelConfig) -> dict[int, int]:
        if not self.hidden:
            return {}
        if self.teacher is None or self.teacher_logits is not None:
            raise ValueError(
                "objective.hidden needs objective.teacher in memory, and no objective.teacher_logits, which has no "
                "hidden states"
            )
        teacher = model_config({"hf": self.teacher})
        for number, pair in enumerate(self.hidden):
            for name, count in (("student", model.num_layers), ("teacher", teacher.num_layers)):
                if (layer := getattr(pair, name)) >= count:
                    raise ValueError(
                        f"objective.hidden[{number}].{name} = {layer} is none of its layers, which are 0 to {count - 1}"
                    )
        students = [pair.student for pair in self.hidden]
        if len(set(students)) < len(students):
            raise ValueError(f"objective.hidden names a student's layer twice, in {students}")
        width = teacher.hidden_size
        return {} if width == model.hidden_size else dict.fromkeys(sorted(students), width)

    def refuses(self, config: Config) -> str:
        parallel = config.parallel
        if self.on_policy and parallel.engine != "native":
            return f"objective.on_policy needs parallel.engine: native, not {parallel.engine}"
        if self.on_policy and parallel.expert > 1:
            return (
                f"objective.on_policy needs parallel.expert: 1, not {parallel.expert}: ranks that share experts would "
                "have to write answers in step"
            )
        if not self.hidden:
            return ""
        if parallel.pipeline > 1:
            return (
                f"objective.hidden needs parallel.pipeline: 1, not {parallel.pipeline}: layers of student and teacher "
                "that are compared may be on different ranks"
            )
        if parallel.engine != "native":
            return f"objective.hidden needs parallel.engine: native, not {parallel.engine}"
        if config.lora is not None and config.model.projections:
            return (
                "objective.hidden needs lora: null where teacher and student differ in width: adapters alone are "
                "trained, and no projections"
            )
        return ""

    def match_layers(
        self, stages: Sequence[Stage], plan: Plan, mesh: Mesh
    ) -> tuple[HiddenMatch, ...]:
        return match_layers(self.hidden, stages, plan, mesh) if self.hidden else ()

    def frozen_model(self, config: Config) -> Path | None:
        return None if self.teacher_logits else self.teacher

    def made_of_tokens(self) -> str:
        return "objective.teacher_logits" if self.teacher_logits else ""

    def check_data(self, config: Config, data: Mapping[Split, Mixture | None]) -> None:
        train = data["train"]
        if train and self.teacher_logits:
            self.open(config, train)
        for source in train.sources if train and self.on_policy else ():
            if not isinstance(source, RowSource):
                raise DataError(
                    f"{source.dataset.prefix} is plain text, which has no answers; objective.on_policy needs rows, "
                    "such as `megalite preprocess --format chat` makes"
                )

    def open(self, config: Config, train: Mixture) -> TeacherLogits:
        """Open the teacher's likeliest tokens of the samples of `train`. Raise DataError or
        ConfigError where they are of something else."""
        assert self.teacher_logits is not None
        setting = f"objective.teacher_logits = {self.teacher_logits}"
        found = TeacherLogits(self.teacher_logits, train, setting)
        about, own, size = found.about, config.data.tokenizer, config.model.vocab_size
        its = about["tokenizer"]
        if own is not None and its is not None and its != load_tokenizer(own).fingerprint():
            raise ConfigError(f"{setting} is of another tokenizer than data.tokenizer = {own}")
        if about["vocab_size"] > size or (about["vocab_size"] < size and None in (own, its)):
            raise ConfigError(
                f"{setting} is of {about['vocab_size']} tokens, and the trained model has vocab_size = {size}"
            )
        if about["temperature"] != self.temperature:
            raise ConfigError(
                f"{setting} is of objective.temperature = {about['temperature']}, not {self.temperature}; put it back, "
                "or make it anew"
            )
        if self.teacher and self.teacher.is_dir() and digests_of(self.teacher) != about["teacher"]:
            raise ConfigError(
                f"{setting} is of another teacher than objective.teacher = {self.teacher}; make it anew, or set "
                "objective.teacher: null"
            )
        return found

    def batches(self, source: Batches, run: Run, parts: RankModel) -> Batches:
        if self.teacher_logits:
            assert isinstance(parts.objective, Distill)
            parts.objective.cached = self.open(run.config, source.mixture)
        if self.on_policy:
            from megalite.training.on_policy import StudentAnswers  # which needs all of inference

            return MadeBatches(source, StudentAnswers(self.on_policy, run, parts))
        return source

    def build(self, config: Config, mesh: Mesh) -> Objective:
        if self.teacher_logits is not None:
            return Distill(self, mesh, None)
        assert self.teacher is not None
        teacher = model_config({"hf": self.teacher})
        check_teacher(self.teacher, teacher, config)
        return Distill(self, mesh, min(teacher.vocab_size, config.model.vocab_size))


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

    def __init__(self, config: DistillConfig, mesh: Mesh, num_common: int | None):
        """Learn as `config` says on this rank of `mesh`. Both models have the first `num_common`
        tokens; None: what is `cached` says it."""
        super().__init__()
        self.wanted = Divergence(config.loss, config.temperature, config.weight)
        self.axis, self.num_common = mesh.tensor, num_common
        self.is_last = mesh.pipeline.rank == mesh.pipeline.size - 1
        self.cached: TeacherLogits | None = None
        """What the teacher said, where it is not in memory."""

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        # Only ranks with the last stage compare: the others need not read the files.
        if self.cached is None or split != "train" or not self.is_last:
            return inputs
        found = self.cached.read(micro.samples.numpy(), micro.labels.numpy())
        device, index = inputs.tokens_BT.device, inputs.places.index_BT
        # This context rank's tokens of the whole sequence.
        said = [take(torch.from_numpy(x).to(device, non_blocking=True), index) for x in found]
        return replace(inputs, top=TopTokens(*said))

    def measure(self, out: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        assert isinstance(out, HiddenStates)
        assert inputs.labels_BT is not None
        losses_B3 = self._losses(out, inputs, inputs.labels_BT).sum(1)
        return losses_B3[:, 0], losses_B3[:, 1:].detach()

    def _losses(self, out: HiddenStates, inputs: Inputs, labels_BT: Tensor) -> Tensor:
        """Return the loss to minimise of every token, its cross-entropy and the divergence,
        [B,T,3]."""
        head, top = out.chunked, inputs.top
        teacher = inputs.frozen() if inputs.frozen else None
        of_teacher = teacher.chunked if teacher else None
        if head is not None and (top or of_teacher):
            # Whole on every rank: only their gradient is to be summed, of all columns.
            x_BTD = enter(out.states_BTD, self.axis, sequence=False)
            columns = self._columns(head.weight.shape[0], head.vocab_size)
            if top:
                return linear_compared(
                    x_BTD, head.weight, labels_BT, head.rows, self._against(top, columns),
                    head.wgrad_callback,
                )  # fmt: skip
            assert teacher is not None
            assert of_teacher is not None
            return linear_divergence(
                x_BTD, head.weight, teacher.states_BTD, of_teacher.weight, labels_BT, head.rows,
                columns, self.wanted, head.wgrad_callback,
            )  # fmt: skip
        shards = out.head(out.states_BTD)
        logits_BTV = shards.padded_BTV
        columns = self._columns(logits_BTV.shape[-1], shards.vocab_size)
        if top:
            return compared(logits_BTV, labels_BT, self._against(top, columns))
        assert teacher is not None
        teacher_BTV = teacher.head(teacher.states_BTD).padded_BTV
        return divergence(logits_BTV, teacher_BTV, labels_BT, columns, self.wanted)

    def _against(self, top: TopTokens, columns: Columns) -> TopComparison:
        """Return the comparison with what the teacher said of a micro-batch, [B,T,K]."""
        flat = TopTokens(top.ids.flatten(0, 1), top.log_p.flatten(0, 1), top.rest.flatten())
        return TopComparison(flat.normalised(), columns, self.wanted)

    def judge(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return NextToken().measure(out, inputs)

    def _columns(self, held: int, vocab_size: int) -> Columns:
        """Return the columns of the vocabulary of which this rank holds `held`."""
        axis = self.axis
        num_common = self.cached.about["vocab_size"] if self.cached else self.num_common
        assert num_common is not None
        first, num_valid = vocab_columns(held, axis, vocab_size)
        _, common = vocab_columns(held, axis, num_common)
        both = partial(combine, axis=axis) if axis.size > 1 else None
        return Columns(first, num_valid, common, both, partial(all_reduce, axis=axis))
