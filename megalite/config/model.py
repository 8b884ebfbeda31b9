"""The sections `model` and `lora`: what is trained. A family adds settings of its own, in its file
of `megalite/models/`."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from megalite.config.section import Section
from megalite.errors import ConfigError

if TYPE_CHECKING:
    from megalite.models.architecture import Architecture

MOST_LAYERS = 10_000
"""Limit on `num_layers`. Every layer has rows in the table of weights, and a damaged config.json
may ask for any number."""

NUM_LABELS = {"single_label": (2, 2**16 - 2), "multi_label": (1, 62), "regression": (1, 1)}
"""How few and how many labels each `model.problem` has. A set of classes is the bits of one
label."""
ANSWER_LABELS = ("start", "end")
"""What the head of `model.task: answers` tells of each token: that an answer starts, or ends."""


class MupConfig(Section):
    """Initial values and learning rates by width (muP)."""

    base_hidden: int = Field(
        gt=0, description="Hidden size at which `optimizer.lr` and `init_std` are what they say."
    )


class ModelConfig(Section):
    """Settings that every family shares. Each file in `models/` adds the fields of its own
    family."""

    # Names in capitals and properties are not settings but belong to the family.

    family: str = Field(description="Architecture, by the model_type that Hugging Face has for it.")
    preset: str | None = Field(
        None, description="Preset: the file in configs/model/ that the other fields are taken from."
    )
    hf: Path | None = Field(
        None,
        description="Hugging Face folder whose weights training starts from, or the owner/name of a model in the hub's "
        "cache.",
    )
    vocab_size: int = Field(
        gt=0, description="Rows of the embedding: at least the tokenizer's tokens."
    )
    hidden_size: int = Field(gt=0, description="Width of the layers' inputs and outputs.")
    num_layers: int = Field(gt=0, le=MOST_LAYERS, description="Number of layers.")
    num_attention_heads: int = Field(gt=0, description="Heads of queries of a layer.")
    max_positions: int = Field(
        gt=0, description="Longest sequence the model is meant for, in tokens."
    )
    norm_eps: float = Field(1e-5, gt=0, description="Added to the variance in norms.")
    init_std: float = Field(0.02, gt=0, description="Standard deviation of initial weights.")
    tie_embeddings: bool = Field(False, description="Let the head share the embedding's weight.")
    mup: MupConfig | None = Field(
        None,
        description="Have the best learning rate be that of a narrower model: muP. null: it is as given at any width.",
    )
    projections: dict[int, int] = Field(
        {},
        description="Widths of a teacher, by the layers whose outputs are projected to them: objective.hidden sets it.",
    )
    task: Literal["causal", "masked", "seq2seq", "classification", "labels", "answers"] = Field(
        "causal",
        description="What the head predicts. causal: the next token; masked: the token that was masked (encoders); "
        "seq2seq: the next token of a target that answers a source (encoder-decoders); classification: a text's "
        "class; labels: that of each token; answers: where a text answers a question.",
    )
    labels: tuple[str, ...] = Field(
        (), description="Names of the classes, for task: classification or labels."
    )
    problem: Literal["single_label", "multi_label", "regression"] = Field(
        "single_label",
        description="What task: classification tells of a text. single_label: one of the classes; multi_label: any "
        "number of them; regression: a number, whose name is the one of `labels`.",
    )

    PREDICTS: ClassVar[Literal["causal", "masked", "seq2seq"]] = "causal"
    """The task of the family's own head, which predicts tokens."""
    START_TOKEN: ClassVar[int] = 0
    """Id of the token that a target begins with, for task: seq2seq."""
    CLASS_AT: ClassVar[Literal["first", "last"]] = "last"
    """Token of a text at which its class is told: where all of it has been seen."""

    SPARE: ClassVar[tuple[str, ...]] = ()
    """Hugging Face's names of tensors that files may have for other tasks, and that are not
    read."""
    COPIES: ClassVar[tuple[str, ...]] = ()
    """Those that files may have, and that must be copies of the embedding."""
    OLD_ENDS: ClassVar[Mapping[str, str]] = {}
    """Ends of tensors' names in older files, with what they are today."""
    OLD_STARTS: ClassVar[Mapping[str, str]] = {}
    """How tensors' names start in other files, with what that is here."""
    SPARE_STARTS: ClassVar[tuple[str, ...]] = ()
    """How the names of tensors start that belong to other parts of a larger model, and that are not
    read."""

    @model_validator(mode="before")
    @classmethod
    def _labels_of_answers(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("task") == "answers":
            # A config that was written by a run has them already.
            return values | {"labels": values.get("labels") or ANSWER_LABELS}
        return values

    @classmethod
    def with_files(cls, fields: dict[str, Any], names: Container[str]) -> dict[str, Any]:
        """Return the `fields` that config.json gives, corrected by the `names` of the tensors
        stored beside it."""
        return fields

    @property
    def has_classes(self) -> bool:
        """Return whether the head predicts classes, and no tokens."""
        return self.task in ("classification", "labels", "answers")

    @property
    def has_token_types(self) -> bool:
        """Return whether tokens of a second text are embedded as of another type than those of a
        first."""
        return False

    @property
    def highest_label(self) -> int:
        """Return the largest label in files, plus 1; see `megalite/data/formats.py`."""
        # A number is stored as the 32 bits of a float.
        if self.problem == "regression":
            return 2**32 - 1
        if self.task == "answers":  # both bits: an answer of one token
            return 3
        return 2 ** len(self.labels) if self.problem == "multi_label" else len(self.labels) or 1

    @property
    def bias_rate(self) -> float | None:
        """Return how much a step moves the selection biases of routers (`Weight.by_counts`). None:
        there are none."""
        return None

    @property
    def predictor_weight(self) -> float:
        """Return the weight of the mean loss of predictors of further tokens (the architecture's
        `predictors`)."""
        return 0.0

    def without_predictors(self) -> ModelConfig:
        """Return the config of the model alone, as generation takes it."""
        return self

    def starts_of_spare(self, names: Container[str]) -> tuple[str, ...]:
        """Return how the names of tensors start that are not read, of all `names` in the files."""
        return self.SPARE_STARTS

    def describe(self) -> Architecture:
        """Describe what each layer computes. Every family's config says it; raises ConfigError
        where one does not."""
        raise ConfigError(
            f"model.family = {self.family!r} does not describe its layers, which a plan and the count of FLOPs need: "
            f"{type(self).__name__} must have a method `describe` (docs/extend/family.md)"
        )

    @cached_property
    def architecture(self) -> Architecture:
        """Return the description, made once. Raises ConfigError where it has another number of
        layers."""
        found = self.describe()
        if len(found.layers) != self.num_layers:
            raise ConfigError(
                f"model.family = {self.family!r} describes {len(found.layers)} layers for "
                f"num_layers = {self.num_layers}"
            )
        return found

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        copied = super().model_copy(update=update, deep=deep)
        # The cached description is of the fields before the update.
        copied.__dict__.pop("architecture", None)  # pydantic copies it as it stands
        return copied


class LoraConfig(Section):
    """Train low-rank adapters beside the weights of a Hugging Face model instead of the weights (Hu
    et al. 2021)."""

    rank: int = Field(16, gt=0, description="Rank of an update: columns of its two matrices.")
    alpha: float = Field(32.0, gt=0, description="Updates are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of adapters.")
    targets: tuple[str, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="Hugging Face's names of modules. all-linear: all linear modules but the head.",
    )
    rslora: bool = Field(False, description="Scale by alpha / √rank instead (Kalajdzievski 2023).")
    dora: bool = Field(
        False,
        description="Also train the magnitude of each output feature of the adapted modules, apart from their "
        "direction (DoRA, Liu et al. 2024).",
    )
    quantize_base: Literal["nf4", "int8"] | None = Field(
        None,
        description="Hold the model's linear modules in few bits while adapters are trained (QLoRA): nf4, 4 bits with "
        "double quantisation, or int8. null: in the precision of training.",
    )
    adapter: Path | None = Field(
        None,
        description="Folder of a PEFT adapter to continue from; it gives the settings left out here.",
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_several(cls, targets: Any) -> Any:
        # PEFT's files have either form.
        return (targets,) if isinstance(targets, str) else targets

    @model_validator(mode="after")
    def _no_dropout_with_dora(self) -> Self:
        if self.dora and self.dropout:
            raise ValueError(
                f"dropout = {self.dropout} must be 0 with dora, which adapts the product of what is not dropped"
            )
        return self

    @property
    def scale(self) -> float:
        # Divided by √rank, the size of an update does not shrink as the rank grows.
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
