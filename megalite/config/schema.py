"""The user's config: strict, frozen, never mutated; one field for each section, and what the
sections must be to each other. The sections are in the files beside this one. What follows from a
config on a given number of ranks is in `megalite.plan`.

Anything unknown or impossible raises `ConfigError`, which names the key, its value, what is allowed
and the nearest right spelling, so that the user can correct the file without reading code.
`config_file.py` reads configs from YAML."""

from __future__ import annotations

import yaml
from pydantic import Field, SerializeAsAny, model_validator

from megalite.config.data import DataConfig
from megalite.config.kernels import KernelsConfig
from megalite.config.model import LoraConfig, ModelConfig
from megalite.config.objective import Lengths, ObjectiveConfig
from megalite.config.observe import HookConfig, ObserveConfig, ProfileConfig
from megalite.config.optimizer import OptimizerConfig
from megalite.config.parallel import ParallelConfig
from megalite.config.run import CheckpointConfig, HealthConfig, RunConfig
from megalite.config.section import Section
from megalite.config.train import TrainConfig

MOST_TOKENS = 2**62
"""Limit on the tokens of a run, whose numbers have 64 bits."""


class Config(Section):
    """A whole config: one field for each section."""

    run: RunConfig
    # SerializeAsAny: pydantic would write the fields of the annotated class only, not those of the
    # kind.
    model: SerializeAsAny[ModelConfig]
    lora: LoraConfig | None = None
    data: DataConfig
    # Validated and not constructed: the default, too, is of the kind that its name asks for.
    objective: SerializeAsAny[ObjectiveConfig] = Field(
        default_factory=lambda: ObjectiveConfig.model_validate({})
    )
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig
    optimizer: SerializeAsAny[OptimizerConfig]
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()
    health: HealthConfig = HealthConfig()
    profile: ProfileConfig = ProfileConfig()
    kernels: KernelsConfig = KernelsConfig()
    hooks: tuple[SerializeAsAny[HookConfig], ...] = Field(
        (), description="What plugins do beside the steps, by name."
    )

    @model_validator(mode="after")
    def _tokens_are_steps(self) -> Config:
        # Validators run in the order of their definition: those below find the steps known.
        tokens = self.train.tokens
        return (
            self
            if tokens is None
            else self.of_samples(-(-tokens // self.sample_tokens), f"train.tokens {tokens}")
        )

    def of_samples(self, count: int, why: str) -> Config:
        """Return the config with `train.steps` for `count` samples, which `why` asks for. Raises
        ValueError where other steps are given, or do not go with the schedule."""
        train, steps = self.train, self.train.steps_for(count)
        # A config that a run has written holds both lengths; they differ only if one was changed since.
        if train.steps not in (0, steps):
            raise ValueError(
                f"train.steps {train.steps} and {why}, which is {steps} steps, are two lengths of the run; give one, "
                "and null for the other"
            )
        self.optimizer.schedule.check(steps)
        config = self.model_copy(update={"train": train.model_copy(update={"steps": steps})})
        config._tokens_can_be_counted()
        return config

    def _tokens_can_be_counted(self) -> None:
        if self.num_tokens > MOST_TOKENS:
            raise ValueError(
                f"the length of the run is more than {MOST_TOKENS:,} tokens, up to which they are counted: lower "
                "train.steps, .tokens or .epochs"
            )

    @model_validator(mode="after")
    def _model_has_projections(self) -> Config:
        # A config that a run has written has those that its objective asked for then.
        wanted = self.objective.projections(self.model)
        if self.model.projections == wanted:
            return self
        return self.model_copy(
            update={"model": self.model.model_copy(update={"projections": wanted})}
        )

    @model_validator(mode="after")
    def _objective_and_hooks_fit(self) -> Config:
        task, has_classes = self.model.task, self.model.has_classes
        if has_classes and not self.data.document_mask:
            raise ValueError(
                f"model.task: {task} needs data.document_mask: true, which keeps the rows of a sample apart"
            )
        if (task == "answers") != (self.objective.name == "answers"):
            raise ValueError(
                f"model.task: answers and objective.name: answers go together, not model.task: {task} and "
                f"objective.name: {self.objective.name}"
            )
        if has_classes and self.train.loss_chunk is not None:
            raise ValueError(
                f"model.task: {task} needs train.loss_chunk: null; there are too few classes for chunks to save memory"
            )
        if self.data.seq_length_warmup and (task != "causal" or self.objective.DATA != "text"):
            what = (
                f"model.task: {task}"
                if task != "causal"
                else f"objective.name: {self.objective.name}"
            )
            raise ValueError(
                f"data.seq_length_warmup would cut what {what} needs whole; leave it out"
            )
        # Told by what an objective overrides, not by its name: it may be a plugin's.
        if task == "seq2seq" and type(self.objective).lengths is ObjectiveConfig.lengths:
            raise ValueError(
                f"objective.name: {self.objective.name} has no source for the encoder of model.task: seq2seq; "
                "span_corruption makes one of texts, seq2seq takes that of rows"
            )
        hides_none = type(self.objective).corruption is ObjectiveConfig.corruption
        if task == "masked" and hides_none and self.objective.DATA != "pairs":
            raise ValueError(
                f"objective.name: {self.objective.name} hides no tokens, without which model.task: masked learns "
                "nothing; masked_lm does"
            )
        objective = self.objective
        if (
            not (objective.NEEDS == "losses" or objective.IN_CHUNKS)
            and self.train.loss_chunk is not None
        ):
            raise ValueError(
                f"objective.name: {self.objective.name} needs train.loss_chunk: null, not {self.train.loss_chunk}; it "
                f"takes the {self.objective.NEEDS.replace('_', ' ')} of all tokens at a time"
            )
        keeps_labels = self.model.task == "classification" or objective.DATA in ("pairs", "seq2seq")
        if self.data.augment and not keeps_labels:
            raise ValueError(
                f"data.augment changes texts whose labels stay true: of model.task: classification, or objective.name: "
                f"contrastive or seq2seq, not of model.task: {task} with objective.name: {objective.name}"
            )
        self.objective.check(self)
        for hook in self.hooks:
            hook.check(self)
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        if self.lora and self.model.hf is None:
            raise ValueError(
                "lora needs model.hf, the Hugging Face folder of the model that is adapted"
            )
        if self.lora and self.model.has_classes:
            raise ValueError(
                f"lora would leave the head of model.task: {self.model.task} as it is; train without it"
            )
        # Each of two stacks has positions of its own: neither may be too long by itself.
        _, source, target = self.lengths
        longer = {"data.seq_length": source or target, "the decoder's length": target}
        for name, length in longer.items():
            if length > self.model.max_positions:
                raise ValueError(
                    f"{name} {length} is longer than model.max_positions {self.model.max_positions}, the most that it "
                    "can be"
                )
        self._questions_fit()
        self._length_fits()
        return self

    def _questions_fit(self) -> None:
        """Raise ValueError if the model cannot be asked what `observe` wants to know in training."""
        for name, asked in (
            ("tasks", self.observe.tasks.names),
            ("samples", self.observe.samples.prompts),
        ):
            if asked and not self.data.tokenizer:
                raise ValueError(
                    f"observe.{name} needs data.tokenizer, to read the texts of {name}"
                )
            if asked and self.model.task != "causal":
                raise ValueError(
                    f"observe.{name} needs a model that answers, not model.task: {self.model.task}"
                )
        if self.observe.target_rows and not (
            self.objective.DATA == "seq2seq" and self.data.tokenizer and self._is_validated
        ):
            raise ValueError(
                "observe.target_rows needs objective.name: seq2seq, data.tokenizer, and data.valid or data.split"
            )

    def _length_fits(self) -> None:
        """Raise ValueError if the schedule, or what may end or repeat the training, does not fit."""
        schedule, lr = self.optimizer.schedule, self.optimizer.lr
        self._tokens_can_be_counted()
        if schedule.min_lr > lr:
            raise ValueError(
                f"optimizer.schedule.min_lr {schedule.min_lr} is above optimizer.lr {lr}"
            )
        if self.train.steps:
            schedule.check(self.train.steps)
        self._best_can_be_told()
        if self.observe.ladder and self.objective.name != "next_token":
            raise ValueError(
                f"observe.ladder predicts the loss of objective.name: next_token, not of {self.objective.name}"
            )
        if self.train.patience and not (self._is_validated and self.observe.eval_every):
            raise ValueError(
                "train.patience counts validations, which need data.valid or data.split, and observe.eval_every above 0"
            )
        health = self.health
        if self.train.epochs and self.data.order == "megatron":
            raise ValueError(
                "data.order: megatron has as many samples as are asked for; give train.steps or .tokens"
            )
        if (
            "rewind" in (health.not_finite, health.loss_spike, health.grad_norm_spike)
            and self.data.order == "megatron"
        ):
            raise ValueError(
                "data.order: megatron has no more samples than train.steps need, and so none in place of those that a "
                "`rewind` of health passes over; skip, or take another order"
            )

    @property
    def _is_validated(self) -> bool:
        return bool(self.data.valid or (self.data.split and self.data.split[1]))

    def _best_can_be_told(self) -> None:
        every, eval_every = self.checkpoint.every, self.observe.eval_every
        if self.checkpoint.keep_best == 0:
            return
        if not self._is_validated:
            raise ValueError(
                "checkpoint.keep_best goes by the validation loss, which needs data.valid or data.split"
            )
        # Without `every` the only checkpoint is that of the last step, which is always validated.
        if every and (not eval_every or every % eval_every):
            raise ValueError(
                f"checkpoint.keep_best needs a validation at each checkpoint, but checkpoint.every {every} is no "
                f"multiple of observe.eval_every {eval_every}"
            )

    @property
    def lengths(self) -> Lengths:
        """Return how many tokens belong to a sample."""
        return self.objective.lengths(self)

    @property
    def sample_tokens(self) -> int:
        """Return how many tokens of a sample the model sees, of both stacks where it has two."""
        return self.lengths.source + self.lengths.target

    @property
    def num_tokens(self) -> int:
        """Return the tokens of the whole run; 0 where its steps are not known yet."""
        return self.train.samples_after(self.train.steps) * self.sample_tokens

    def to_yaml(self) -> str:
        # Through JSON's types: YAML has none for paths and tuples.
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
