"""The `optimizer:` section: what all optimizers have, which weights each of them takes, and the
schedules."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from megalite import registry
from megalite.config.section import Choice, Section
from megalite.errors import ConfigError
from megalite.registry import Registry

if TYPE_CHECKING:
    from megalite.engine.optimizers import MatrixOptimizer, Optimizer, SummingOptimizer
    from megalite.models.weights import Weight


EMA = "ema"
"""Name of the average of the weights, which a checkpoint holds beside the optimizer's states."""


BY_COUNTS = "by_counts"
"""What updates a router's selection bias, whichever optimizer a config asks for."""


class ScheduleConfig(Choice):
    """The learning rate over the steps: a linear warmup to the peak, then a decay from it to
    `min_lr`."""

    name: str = Field("cosine", description="Shape of the decay.")
    warmup_steps: int | float = Field(
        0, ge=0, description="Steps of the warmup; below 1: their share of all steps."
    )
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")

    KINDS: ClassVar[Registry[Any]] = registry.schedules

    @field_validator("warmup_steps")
    @classmethod
    def _steps_or_a_share(cls, steps: float) -> int | float:
        if steps >= 1 and steps != int(steps):
            raise ValueError("must be a whole number of steps, or a share of them below 1")
        # 1 is one step; the whole run cannot be warmup.
        return int(steps) if steps >= 1 else steps

    def warmup(self, num_steps: int) -> int:
        """Return the steps of the warmup in a run of `num_steps`."""
        share = self.warmup_steps
        # Rounded up: a share of a short run is a step at least.
        return math.ceil(share * num_steps) if 0 < share < 1 else int(share)

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        """Return the learning rate of a step after the warmup: `step`, counted from 1, of a run of
        `num_steps`. `peak` is the learning rate at the end of the warmup."""
        raise NotImplementedError

    def check(self, num_steps: int) -> None:
        """Raise ValueError when a run of `num_steps` is too short for the schedule."""


class ParameterGroup(Section):
    """Settings of some weights, chosen by their Hugging Face names."""

    match: str = Field(
        min_length=1,
        description="Pattern of Hugging Face names, with * and ?: '*.bias', 'model.embed_tokens.*'.",
    )
    lr: float = Field(
        1.0, ge=0, description="Factor of their learning rate. 0 keeps them as they are."
    )
    weight_decay: float | None = Field(None, ge=0, description="Their weight decay.")
    optimizer: str | None = Field(
        None, description="Which of the config's optimizers updates them: muon or adamw."
    )

    def takes(self, names: Sequence[str]) -> bool:
        """Return whether the group is that of a weight made of the Hugging Face tensors `names`.

        Raises ConfigError where it takes some of them only: they are one weight."""
        # Unlike `fnmatch`, which goes by the system, it tells capitals apart everywhere.
        taken = [fnmatch.fnmatchcase(name, self.match) for name in names]
        if any(taken) and not all(taken):
            raise ConfigError(
                f"optimizer.groups: match = {self.match!r} takes {names[taken.index(True)]} but not "
                f"{names[taken.index(False)]}; they are one weight here, and need the same settings"
            )
        return all(taken)


class Treatment(NamedTuple):
    """How a weight is updated. All weights of a bucket share it."""

    optimizer: str
    """Name of the member of `OptimizerConfig.members` that updates it."""
    lr: float
    """Factor of the learning rate that the schedule gives."""
    weight_decay: float


class QKClipConfig(Section):
    """Bound the attention logits by scaling the projections of queries and keys (MuonClip, Kimi
    K2)."""

    threshold: float = Field(
        100.0, gt=0, description="Largest logit that the heads may have had in a step."
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the queries in the scaling, as an exponent; the keys take the rest.",
    )


class Member(NamedTuple):
    """One of the optimizers that a config asks for."""

    build: Callable[[], Optimizer | MatrixOptimizer | SummingOptimizer]
    states: tuple[str, ...]
    """Names of the states it keeps for each weight."""
    lr: float
    """Factor of the learning rate that the schedule gives."""
    weight_decay: float


class OptimizerConfig(Choice):
    """Settings that every optimizer has."""

    name: str = Field("adamw", description="Which optimizer.")
    lr: float = Field(gt=0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.1, ge=0, description="Decoupled weight decay, of matrices and embeddings."
    )
    clip: float = Field(1.0, ge=0, description="Largest global gradient norm. 0 disables clipping.")
    schedule: SerializeAsAny[ScheduleConfig] = Field(
        default_factory=lambda: ScheduleConfig.model_validate({})
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights, which is validated beside them and kept in "
        "checkpoints. Lower in the first steps n: at most (1 + n)/(10 + n). null: none.",
    )
    qk_clip: QKClipConfig | None = Field(
        None,
        description="After each step, scale down the queries and keys of heads whose attention logits were above a "
        "threshold. null: no head is.",
    )
    groups: tuple[ParameterGroup, ...] = Field(
        (),
        description="Weights with settings of their own. The first group that matches a weight is used.",
    )

    state_dtype: Literal["fp32", "bf16", "8bit"] = Field(
        "fp32",
        description="What the states of matrices are held in: fp32, bf16, or 8 bits with a scale for each 256 numbers "
        "(Dettmers et al. 2022). Those of embeddings, norms and biases are fp32.",
    )

    KINDS: ClassVar[Registry[Any]] = registry.optimizers
    STATES: ClassVar[tuple[str, ...]] = ()
    """Names of the states it keeps for each weight: fp32 tensors of the weight's shape, zero at
    first. A checkpoint has files of each."""

    UNSIGNED: ClassVar[tuple[str, ...]] = ()
    """Those of the states that are never negative."""
    ELEMENTWISE: ClassVar[bool] = True
    """Whether each element of a weight is updated on its own, by all of the config's optimizers."""
    PASSES: ClassVar[int] = 0
    """Times that an update reads or writes each fp32 element of a weight beside one pass over
    weight, gradient and states."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        # A checkpoint has a file for each state, named after it.
        if taken := {"weight", "master", "grad", EMA}.intersection(cls.STATES):
            raise ConfigError(
                f"{cls.__name__}.STATES: {taken.pop()!r} is the name of something else in a checkpoint"
            )

    @model_validator(mode="after")
    def _states_are_elements(self) -> Self:
        if self.state_dtype != "fp32" and not self.ELEMENTWISE:
            raise ValueError(
                f"state_dtype = {self.state_dtype!r} is for optimizers that update each number on its own, such as "
                f"adamw; {self.name} has fp32"
            )
        return self

    @model_validator(mode="after")
    def _groups_name_members(self) -> Self:
        for group in self.groups:
            if group.optimizer is not None and group.optimizer not in self.members():
                known = ", ".join(self.members())
                raise ValueError(
                    f"groups: optimizer = {group.optimizer!r} is none of this config's: {known}"
                )
        return self

    def build(self) -> Optimizer | MatrixOptimizer | SummingOptimizer:
        """Return the optimizer that updates the weights."""
        raise NotImplementedError

    def members(self) -> Mapping[str, Member]:
        """Return the optimizers by name: this one, and those that work beside it on other
        weights."""
        return {self.name: Member(self.build, self.STATES, 1.0, self.weight_decay)}

    def member_of(self, weight: Weight) -> str:
        """Return the name of the member that updates `weight`, if no group says otherwise."""
        return self.name

    def takes(self, member: str, weight: Weight) -> bool:
        """Return whether a member can update `weight`."""
        return True

    def treatment(self, weight: Weight) -> Treatment:
        """Return how a weight is updated: as its member does, or as the first group says that
        matches it.

        Raises ConfigError for a group that takes only a part of the weight, or whose optimizer
        cannot take it."""
        if weight.by_counts:
            return Treatment(BY_COUNTS, 1.0, 0.0)
        if weight.held:
            # A rate of 0, and no decay, leave every bit as it is.
            return Treatment(self.member_of(weight), 0.0, 0.0)
        group = next((group for group in self.groups if group.takes(weight.hf)), None)
        name = (group and group.optimizer) or self.member_of(weight)
        if group and not self.takes(name, weight):
            raise ConfigError(
                f"optimizer.groups: match = {group.match!r} gives {weight.hf[0]} to optimizer {name!r}, which is for "
                "matrices only"
            )
        member = self.members()[name]
        # Norms and biases do not decay, unless a group says so.
        decay = member.weight_decay if weight.decay else 0.0
        lr = member.lr
        if group is not None:
            lr *= group.lr
            decay = decay if group.weight_decay is None else group.weight_decay
        # What a step takes off a weight, lr · decay, is the same at every width.
        by_width = self.width_factor(name, weight)
        return Treatment(name, lr * by_width, decay / by_width)

    def width_factor(self, member: str, weight: Weight) -> float:
        """Return the factor of the learning rate of a weight that a member updates, by how much
        wider it is than in the model that muP begins from. Raises ConfigError for an optimizer
        that has no rule for it."""
        if (weight.wider_in, weight.wider_out) != (1.0, 1.0):
            raise ConfigError(
                f"model.mup: optimizer.name = {self.name!r} has no learning rate by width; adamw and muon have"
            )
        return 1.0

    def keeps_fp32(self, weight: Weight) -> bool:
        """Return whether the states of `weight` are fp32: those of embeddings are, which rare
        tokens move in bursts, and small ones."""
        return self.state_dtype == "fp32" or weight.is_looked_up or not weight.row_shape

    def state_row(self, weight: Weight, state: str) -> Weight:
        """Return the row by which a checkpoint holds a state of `weight`: the weight's own, or of
        another shape that follows from it. Of these, which are to be small, every rank of the
        weight's pipeline stage has the whole."""
        return weight

    def products(self, weight: Weight) -> Sequence[tuple[int, int, int]]:
        """Return the matrix products [m, k] × [k, n] that an update of the whole `weight` takes, as
        (m, n, k)."""
        return ()

    def states_of(self, weight: Weight) -> tuple[str, ...]:
        """Return the names of the states that are kept for `weight`, its average among them."""
        if weight.by_counts:
            return self._average
        return self.members()[self.treatment(weight).optimizer].states + self._average

    @property
    def all_states(self) -> tuple[str, ...]:
        """Return the names of the states that are kept for some weights, each once."""
        return (
            tuple(dict.fromkeys(s for member in self.members().values() for s in member.states))
            + self._average
        )

    @property
    def _average(self) -> tuple[str, ...]:
        return (EMA,) if self.ema else ()
