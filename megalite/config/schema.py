"""The user's config: strict, frozen, never mutated. What follows from it on a given number of ranks
is in `plan.py`.

Anything unknown or impossible raises `ConfigError`, which names the key, its value, what is allowed
and the nearest right spelling, so that the user can correct the file without reading code.
`config_file.py` reads configs from YAML."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import yaml
from pydantic import (
    Field,
    SerializeAsAny,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from megalite import registry
from megalite.config.optimizer import OptimizerConfig
from megalite.config.section import Choice, Section, at_home
from megalite.errors import ConfigError
from megalite.registry import Registry
from megalite.utils.counts import parse_count
from megalite.utils.urls import check_no_secret, check_webhook

if TYPE_CHECKING:
    from megalite.comm.mesh import Mesh
    from megalite.data.dataset import Split
    from megalite.data.loader import Batches
    from megalite.data.mixture import Corruption
    from megalite.data.stacks import Views
    from megalite.data.tokenizer import Tokenizer
    from megalite.models.architecture import Architecture
    from megalite.training.hooks import Hook
    from megalite.training.objectives import Objective
    from megalite.training.parts import RankModel
    from megalite.training.run import Run

MOST_LAYERS = 10_000
"""Limit on `num_layers`. Every layer has rows in the table of weights, and a damaged config.json
may ask for any number."""


class RunConfig(Section):
    """Name and folder of the run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="Name of the run, and of its folder below `dir`.",
    )
    dir: Path = Field(Path("runs"), description="Folder that the folders of runs are in.")

    @property
    def folder(self) -> Path:
        return self.dir / self.name


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


class Source(Section):
    """One source of tokenized documents."""

    path: str = Field(
        description="PREFIX of PREFIX.bin and PREFIX.idx: a path, or a URL such as s3://bucket/data/a."
    )
    name: str | None = Field(
        None, description="Name in metrics and `phases`. Defaults to the last part of the path."
    )
    weight: float = Field(
        1.0,
        gt=0,
        description="Weight relative to the other sources; `data.weights` says whether of tokens or of epochs.",
    )

    @field_validator("path", mode="before")
    @classmethod
    def _as_text(cls, path: Any) -> Any:
        return at_home(str(path) if isinstance(path, Path) else path)

    @model_validator(mode="after")
    def _no_secret(self) -> Source:
        # Checked for the whole section: an error about a single value would repeat the value.
        check_no_secret(self.path)
        return self


class Phase(Section):
    """Other weights of the sources, from some step on."""

    after_step: int = Field(gt=0, description="Last step of the phase before.")
    weights: dict[str, float] = Field(
        min_length=1,
        description="Weight of each train source by its name. 0, or left out, takes none of it.",
    )

    @field_validator("weights")
    @classmethod
    def _some_weight(cls, weights: dict[str, float]) -> dict[str, float]:
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError("weights must not be negative, and one must be above 0")
        return weights


class ShortPhase(Section):
    """Shorter sequences, up to some step."""

    seq_length: int = Field(gt=0, description="Tokens of a sequence, which divide data.seq_length.")
    until_step: int = Field(gt=0, description="Last step with sequences of this length.")


class FillInTheMiddleConfig(Section):
    """Fill-in-the-middle: reorder documents so that a causal model learns to fill a gap (Bavarian
    et al. 2022)."""

    rate: float = Field(0.5, gt=0, le=1, description="Share of the documents that are reordered.")
    spm_rate: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the reordered documents whose suffix comes before the prefix.",
    )
    tokens: tuple[str, str, str] = Field(
        ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        description="Names that data.tokenizer has for the prefix, middle and suffix tokens.",
    )


class AugmentConfig(Section):
    """Augmentation: change words of labelled texts, in other ways in every epoch (Wei and Zou
    2019). Only in training; labels stay as they are."""

    share: float = Field(0.5, gt=0, le=1, description="Share of the texts that are changed.")
    swap: float = Field(
        0.0, ge=0, le=1, description="Share of the words that change places with another."
    )
    delete: float = Field(0.0, ge=0, lt=1, description="Share of the words that are left out.")
    synonyms: float = Field(
        0.0, ge=0, le=1, description="Share of the words in synonym_file that another replaces."
    )
    synonym_file: Path | None = Field(
        None, description="Text file: words of a line, parted by commas, stand for one another."
    )
    noise: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the words that are misspelt: letters exchanged, left out, doubled or replaced.",
    )
    counterfactual: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the rows, whatever `share` is, in which each word of pair_file becomes its counterpart.",
    )
    pair_file: Path | None = Field(
        None,
        description="Text file: the two words of a line, parted by a comma, become each other.",
    )

    @model_validator(mode="after")
    def _does_something(self) -> AugmentConfig:
        if (self.synonyms > 0) != (self.synonym_file is not None):
            raise ValueError("`synonyms`, a share above 0, and `synonym_file` go together")
        if (self.counterfactual > 0) != (self.pair_file is not None):
            raise ValueError("`counterfactual`, a share above 0, and `pair_file` go together")
        if not (self.swap or self.delete or self.synonyms or self.noise or self.counterfactual):
            raise ValueError(
                "give `swap`, `delete`, `synonyms`, `noise` or `counterfactual` a share above 0"
            )
        return self


class Lengths(NamedTuple):
    """Holds how many tokens belong to a sample."""

    read: int
    """Tokens that are read for it."""
    source: int
    """Tokens that an encoder sees; 0 where there is none beside the decoder."""
    target: int
    """Tokens at which something is predicted."""


DataKind = Literal["text", "preference", "pairs", "seq2seq", "answers"]
"""Kind of data that an objective learns from: `preference` is pairs of answers, the chosen one
first, side by side in a sample; `pairs` likewise of texts that belong together; `seq2seq` is rows
of a source and its target."""


class ObjectiveConfig(Choice):
    """The loss that training minimises. A model with a classification head learns its classes, by
    `next_token`."""

    name: str = Field("next_token", description="Which objective.")

    KINDS: ClassVar[Registry[Any]] = registry.objectives
    DATA: ClassVar[DataKind] = "text"
    """Kind of data it trains on."""
    HAS_REFERENCE: ClassVar[bool] = False
    """Whether it compares with the frozen model of model.hf."""

    NEEDS: ClassVar[Literal["losses", "logits", "hidden_states", "final_states"]] = "losses"
    """What it needs of the last stage in training: each token's loss, the logits in vocabulary
    shards, the hidden states that the head takes, or those of the model without a head."""
    IN_CHUNKS: ClassVar[bool] = False
    """Whether it takes hidden states a few tokens at a time where train.loss_chunk asks for it."""

    def check(self, config: Config) -> None:
        """Raise ValueError, naming the setting, when the rest of a config does not go with this
        objective."""

    def predicted(self) -> float:
        """Return the share of the tokens of which the head is computed, about."""
        return 1.0

    def frozen_model(self, config: Config) -> Path | None:
        """Return the Hugging Face folder of a frozen model that runs beside the trained one, or
        None; `Inputs.frozen` gives the objective what it computes."""
        return None

    def corruption(
        self, config: Config, tokenizer: Tokenizer | None, split: Split
    ) -> Corruption | None:
        """Return what makes inputs and labels of the tokens that are read for `split`; None: each
        token's label is the one that follows, or a class. `tokenizer` is the config's. Raise
        DataError where it lacks a token."""
        return None

    def lengths(self, config: Config) -> Lengths:
        """Return how many tokens belong to a sample of a config."""
        return Lengths(config.data.seq_length, 0, config.data.seq_length)

    def stacks(self, config: Config, tokenizer: Tokenizer | None, split: Split) -> Views:
        """Return what makes a source and a target of the tokens that are read for `split`, for an
        encoder-decoder. `tokenizer` is the config's. Raise DataError where it lacks a token."""
        raise NotImplementedError

    def files(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the model, as JSON by the name of the file."""
        return {}

    def batches(self, source: Batches, run: Run, parts: RankModel) -> Batches:
        """Return the batches to train on: those that `source` reads, or others that are made of
        them."""
        return source

    def build(self, config: Config, mesh: Mesh) -> Objective:
        """Return the objective on this rank of `mesh`."""
        raise NotImplementedError


class DataConfig(Section):
    """Data to train and validate on, and how samples are made of it."""

    train: tuple[Source, ...] = Field(
        min_length=1, description="What is trained on: token files, mixed by their weights."
    )
    valid: tuple[Source, ...] = Field((), description="What validation measures the loss on.")
    test: tuple[Source, ...] = Field(
        (), description="What the loss is measured on once, after the last step."
    )
    split: tuple[float, float, float] | None = Field(
        None,
        description="Shares of each train source's documents for train, valid and test, instead of files of their own.",
    )
    seq_length: int = Field(gt=0, description="Tokens of a sample.")
    seq_length_warmup: tuple[ShortPhase, ...] = Field(
        (),
        description="Shorter sequences at first, ever longer ones: each sample is cut into as many as make seq_length. "
        "Samples, tokens a step and memory stay as they are.",
    )
    order: Literal["shuffle", "sequential", "megatron"] = Field(
        "shuffle",
        description="Order of training samples. megatron: that of Megatron-LM's GPTDataset for this seed.",
    )
    packing: Literal["concat", "best_fit"] = Field(
        "concat",
        description="concat: documents one after another, cut anywhere; best_fit: as few documents cut as possible,"
        " then padded. Rows of labelled data are never cut.",
    )
    long_rows: Literal["refuse", "drop", "cut"] = Field(
        "refuse", description="What to do with rows of labelled data that are longer than a sample."
    )
    weights: Literal["tokens", "epochs"] = Field(
        "tokens",
        description="What a weight is. tokens: a share of all tokens; epochs: how often the source itself is gone "
        "through.",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Values above 1 even out the sources' shares: each is raised to the power 1/temperature.",
    )
    phases: tuple[Phase, ...] = Field(
        (), description="Other weights of the sources, later in training."
    )
    document_mask: bool = Field(
        False, description="Tokens attend only to their own document, and its positions begin at 0."
    )
    border_loss: bool = Field(
        True, description="Also predict a document's first token, from the document before it."
    )
    fim: FillInTheMiddleConfig | None = None
    augment: AugmentConfig | None = None
    tokenizer: Path | None = Field(
        None, description="Folder of the tokenizer, which is copied into every checkpoint."
    )

    @field_validator("split")
    @classmethod
    def _shares(cls, split: tuple[float, float, float] | None) -> tuple[float, float, float] | None:
        if split is not None and (min(split) < 0 or split[0] <= 0):
            raise ValueError("shares must not be negative, and the share of train must be above 0")
        return split

    @model_validator(mode="after")
    def _one_way_to_split(self) -> DataConfig:
        if self.split is not None and (self.valid or self.test):
            raise ValueError(
                "give either `split` or files of their own under `valid` and `test`, not both"
            )
        return self

    @model_validator(mode="after")
    def _orders_fit(self) -> DataConfig:
        steps = [phase.after_step for phase in self.phases]
        if sorted(set(steps)) != steps:
            raise ValueError(
                f"each of `phases` must begin later than the one before, but they begin after {steps}"
            )
        if self.order == "megatron":
            others = {"packing": "concat", "phases": (), "weights": "tokens", "temperature": 1.0}
            for name, own in others.items():
                if getattr(self, name) != own:
                    raise ValueError(
                        f"order: megatron is Megatron-LM's, which has no `{name}`; leave it at {own!r}"
                    )
        if self.fim and not self.tokenizer:
            raise ValueError("fim needs `tokenizer`, which knows the ids of its tokens")
        if self.augment and not self.tokenizer:
            raise ValueError("augment needs `tokenizer`, which makes words of tokens and back")
        return self

    @model_validator(mode="after")
    def _sequences_grow(self) -> DataConfig:
        phases = self.seq_length_warmup
        # Each phase with the one behind it; None behind the last.
        for phase, after in zip(phases, [*phases[1:], None], strict=False):
            if self.seq_length % phase.seq_length or phase.seq_length == self.seq_length:
                raise ValueError(
                    f"seq_length_warmup: seq_length {phase.seq_length} must divide data.seq_length {self.seq_length}, "
                    "and be less"
                )
            if after and (
                after.seq_length <= phase.seq_length or after.until_step <= phase.until_step
            ):
                raise ValueError(
                    f"seq_length_warmup: each phase must be longer and end later than the one before, but {after} "
                    f"follows {phase}"
                )
        if phases and self.fim:
            raise ValueError(
                "seq_length_warmup would cut documents that fim has reordered; leave one of them out"
            )
        return self

    def length_of(self, step: int) -> int:
        """Return the tokens of a sequence in a step, counted from 1."""
        return next(
            (phase.seq_length for phase in self.seq_length_warmup if step <= phase.until_step),
            self.seq_length,
        )

    @property
    def seq_lengths(self) -> tuple[int, ...]:
        """Return the lengths that sequences have one after another."""
        return (*(phase.seq_length for phase in self.seq_length_warmup), self.seq_length)

    @model_validator(mode="after")
    def _names_are_known(self) -> DataConfig:
        for sources in (self.train, self.valid, self.test):
            names_of(sources)
        known = names_of(self.train)
        for phase in self.phases:
            for name in phase.weights:
                if name not in known:
                    raise ValueError(
                        f"phases name a source {name!r}; those of train are {', '.join(known)}"
                    )
        return self


def names_of(sources: Sequence[Source]) -> list[str]:
    """Return the name of each source: its `name`, the last part of its path, or the whole path
    where those of two are the same. Raises ValueError where two have one name: metrics, phases and
    what was consumed go by these names."""
    last = [source.name or source.path.rstrip("/").rpartition("/")[2] for source in sources]
    names = [
        source.name or (source.path if last.count(name) > 1 else name)
        for source, name in zip(sources, last, strict=True)
    ]
    if twice := next((name for name in names if names.count(name) > 1), None):
        first, second = [number for number, name in enumerate(names) if name == twice][:2]
        raise ValueError(
            f"sources {first} and {second} are both named {twice!r}; give each a `name` of its own"
        )
    return names


class OffloadConfig(Section):
    """What DeepSpeed keeps outside of the GPU's memory."""

    optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the optimizer's state is kept."
    )
    parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where the weights are kept. Needs zero_stage: 3."
    )
    nvme_path: Path | None = Field(
        None, description="Folder on a fast disk of each node, for nvme."
    )

    @model_validator(mode="after")
    def _nvme_has_a_path(self) -> OffloadConfig:
        if "nvme" in (self.optimizer, self.parameters) and self.nvme_path is None:
            raise ValueError("nvme needs nvme_path, a folder on a fast disk of each node")
        return self


class ParallelConfig(Section):
    """How the model is spread over the ranks. Data parallelism takes the ranks that these leave
    over."""

    tensor: int = Field(1, gt=0, description="Tensor-parallel ranks, which share every matrix.")
    sequence: bool = Field(
        True,
        description="Sequence parallelism: also split norms and dropout along the sequence. No effect at tensor: 1.",
    )
    tensor_overlap: bool = Field(
        False,
        description="Overlap the collectives of sequence parallelism with matrix products, between GPUs of one host "
        "(Megatron's --tp-comm-overlap).",
    )
    pipeline: int = Field(
        1, gt=0, description="Pipeline-parallel ranks, which each hold some of the layers."
    )
    virtual: int = Field(
        1,
        gt=0,
        description="Groups of layers on each pipeline rank. Values above 1 interleave them.",
    )
    schedule: Literal["1f1b", "interleaved", "zero_bubble"] = Field(
        "1f1b", description="Order of a pipeline's passes. interleaved needs virtual above 1."
    )
    stage_layers: tuple[int, ...] | None = Field(
        None,
        description="Layers of each of the pipeline × virtual stages. Balanced by cost where left out.",
    )
    context: int = Field(1, gt=0, description="Context-parallel ranks, which share every sequence.")
    context_method: Literal["ring", "ulysses"] = Field(
        "ring",
        description="How they attend. ring: keys and values travel around; ulysses: each rank gets all tokens of some "
        "heads, which context × tensor must divide.",
    )
    expert: int = Field(
        1,
        gt=0,
        description="Expert-parallel ranks, which each hold some of the experts. They are the tensor, context and data "
        "ranks of a pipeline stage once more.",
    )
    expert_tensor: int | None = Field(
        None,
        gt=0,
        description="Ranks that share every matrix of an expert. null: as many as tensor ranks.",
    )
    engine: Literal["native", "deepspeed"] = Field(
        "native", description="What reduces gradients and updates weights."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="What the data ranks shard. 0: nothing; 1: optimizer state; 2: also gradients; 3: also weights.",
    )
    offload: OffloadConfig = OffloadConfig()
    bucket_mb: float | None = Field(
        None,
        gt=0,
        description="Size of a bucket of gradients, which are reduced at once, in MB of fp32. null: 1 for each "
        "replica, and 40 at least.",
    )
    elastic: bool = Field(
        False,
        description="Continue with fewer nodes where some are lost. micro_batch_size is then an upper limit.",
    )


class BatchRampConfig(Section):
    """A global batch size that grows over the first samples (as Megatron-LM's
    --rampup-batch-size)."""

    start: int = Field(gt=0, description="Sequences per optimizer step at first.")
    increment: int = Field(gt=0, description="Sequences by which it grows at a time.")
    samples: int = Field(
        gt=0,
        description="Samples after which it is train.global_batch_size; it grows evenly up to it.",
    )


class Fp8Config(Section):
    """Compute the products of the layers' linear modules in fp8: x · Wᵀ and both gradients. Weights,
    gradients, optimizer states and checkpoints stay as they are without it."""

    recipe: Literal["current", "rowwise", "blockwise", "mxfp8"] = Field(
        "blockwise",
        description="Numbers that share a scale. blockwise: 128 of activations and gradients, 128 × 128 of weights; "
        "mxfp8: 32; rowwise: a row; current: a whole matrix.",
    )
    first_last_bf16: tuple[int, int] = Field(
        (1, 1), description="How many of the first and of the last layers stay as they are."
    )
    exclude: tuple[str, ...] = Field(
        (), description="Hugging Face's names of modules that stay as they are, such as down_proj."
    )

    @field_validator("first_last_bf16")
    @classmethod
    def _not_negative(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if min(layers) < 0:
            raise ValueError("numbers of layers must not be negative")
        return layers


class TrainConfig(Section):
    """Length, batch size, precision and memory of training."""

    steps: int = Field(
        0,
        gt=0,
        description="Optimizer steps of the whole run; the schedule spans them. They follow from `tokens` or `epochs` "
        "where one of these is given.",
    )
    tokens: int | None = Field(
        None,
        gt=0,
        description="Length of the run in tokens, such as 300B, rounded up to whole steps.",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="Length of the run in times that all samples of the train sources are as many as it takes, rounded "
        "up to whole steps.",
    )
    patience: int | None = Field(
        None,
        gt=0,
        description="Validations without a new lowest loss after which the run ends early. null: it does not.",
    )
    stop_at: int | None = Field(
        None, gt=0, description="Save and exit after this step, to be resumed later."
    )
    global_batch_size: int = Field(
        gt=0, description="Sequences per optimizer step, over all ranks."
    )
    batch_ramp: BatchRampConfig | None = None
    micro_batch_size: int = Field(1, gt=0, description="Sequences per forward pass of one rank.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="Number format of passes. bf16 keeps weights, gradients and moments in fp32 as well.",
    )
    fp8: Fp8Config | None = None
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="Activations to recompute in the backward pass. selective: what is large and cheap; full: all "
        "of a layer.",
    )
    recompute_layers: int | None = Field(
        None, gt=0, description="How many of each stage's first layers to recompute. null: all."
    )
    compile: bool = Field(
        False,
        description="Run torch.compile on each layer. Not with tensor or context parallelism.",
    )
    loss_chunk: int | None = Field(
        None,
        gt=0,
        description="Number of tokens whose logits exist at a time, at the cost of a second GEMM with the head. "
        "null: all.",
    )
    deterministic: bool = Field(
        False,
        description="Compute the same bits in every run on GPUs too, as on CPUs: no operation adds in the order in "
        "which its parts arrive. Attention's backward pass takes longer.",
    )
    seed: int = Field(
        1234, ge=0, description="Seed of initial weights, order of samples and dropout."
    )

    @model_validator(mode="before")
    @classmethod
    def _no_steps_yet(cls, values: Any) -> Any:
        # A config that was written before its steps were known has `steps: null`; see the
        # serializer below.
        if isinstance(values, dict) and values.get("steps", 0) is None:
            return {name: value for name, value in values.items() if name != "steps"}
        return values

    @field_validator("tokens", mode="before")
    @classmethod
    def _with_a_unit(cls, tokens: Any) -> Any:
        return int(parse_count(tokens)) if isinstance(tokens, str) else tokens

    @field_serializer("steps")
    def _steps_that_are_known(self, steps: int) -> int | None:
        # Inside, 0 stands for steps that are not known yet: `epochs` needs the data to be counted.
        return steps or None

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name)]
        if not given:
            raise ValueError("give the length of the run: steps, tokens or epochs")
        # `steps` may be given beside one of these: a written config has both, and `of_samples`
        # compares them.
        if given[-2:] == ["tokens", "epochs"]:
            raise ValueError(
                f"tokens {self.tokens} and epochs {self.epochs} are two lengths of the run; give one"
            )
        return self

    @model_validator(mode="after")
    def _ramp_ends(self) -> TrainConfig:
        ramp, whole = self.batch_ramp, self.global_batch_size
        if ramp and (ramp.start >= whole or (whole - ramp.start) % ramp.increment):
            raise ValueError(
                f"batch_ramp grows from {ramp.start} by {ramp.increment} at a time, which never makes "
                f"global_batch_size {whole}"
            )
        return self

    @property
    def batch_sizes(self) -> list[tuple[int, int]]:
        """Return the global batch sizes that a run has one after another, each with the samples
        from which on it is: those of the run before the step."""
        ramp, whole = self.batch_ramp, self.global_batch_size
        if ramp is None:
            return [(whole, 0)]
        sizes = range(ramp.start, whole + 1, ramp.increment)
        # Rounded up. The last size, the whole one, comes after exactly `ramp.samples`.
        return [
            (size, -(-number * ramp.samples // (len(sizes) - 1)))
            for number, size in enumerate(sizes)
        ]

    def batch_size(self, samples: int) -> int:
        """Return the global batch size of the step that follows the first `samples` samples."""
        return max(size for size, since in self.batch_sizes if since <= samples)

    def samples_after(self, steps: int) -> int:
        """Return how many samples the run has trained on after `steps` steps."""
        return self._walk(steps, None)[1]

    def steps_for(self, samples: int) -> int:
        """Return the fewest steps that train on `samples` samples."""
        return self._walk(None, samples)[0]

    def _walk(self, most_steps: int | None, until: int | None) -> tuple[int, int]:
        """Return the steps and samples of a run of `most_steps` steps, or until it has at least
        `until` samples."""
        sizes, steps, samples = self.batch_sizes, 0, 0
        # Each size with the samples at which the next one begins; the last has no end.
        for (size, _), (_, end) in zip(sizes, [*sizes[1:], (0, None)], strict=True):
            goal = end if until is None else until if end is None else min(end, until)
            # A step that begins below `goal` is made in full, with this size.
            count = None if goal is None else max(0, -(-(goal - samples) // size))
            if most_steps is not None:
                count = most_steps - steps if count is None else min(count, most_steps - steps)
            assert count is not None
            steps, samples = steps + count, samples + count * size
        return steps, samples

    @model_validator(mode="after")
    def _layers_of_something(self) -> TrainConfig:
        if self.recompute_layers is not None and self.recompute == "none":
            raise ValueError("recompute_layers needs recompute: selective or full")
        return self


class KernelsConfig(Section):
    """Implementation of each fused operation. `auto`: megalite's own kernels where they are built,
    else plain torch."""

    norm: str = Field("auto", description="Implementation: auto, megalite, torch or apex.")
    rope: str = Field("auto", description="Implementation: auto, megalite or torch.")
    activation: str = Field("auto", description="Implementation: auto, megalite or torch.")
    attention: str = Field(
        "auto", description="Implementation: auto, megalite, torch or flash_attn."
    )
    loss: str = Field("auto", description="Implementation: auto, megalite or torch.")
    weight_gradient: str = Field("auto", description="Implementation: auto, megalite or torch.")
    experts: str = Field("auto", description="Implementation: auto, megalite or torch.")
    fp8: str = Field("auto", description="Implementation: auto, megalite or torch.")
    optimizer: str = Field("auto", description="Implementation: auto, megalite or torch.")

    @field_validator("*")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        own, key = implementations(str(info.field_name)), f"{info.field_name}."
        if name not in own and key + name not in registry.kernels:
            added = [
                other.removeprefix(key)
                for other in registry.kernels.names()
                if other.startswith(key)
            ]
            raise ValueError(f"is not known; {registry.hint(name, [*own, *added])}")
        return name


def implementations(operation: str) -> tuple[str, ...]:
    """Return the implementations of an operation that exist without a plugin."""
    libraries = {"norm": "apex", "attention": "flash_attn"}
    return ("auto", "megalite", "torch", *filter(None, [libraries.get(operation)]))


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and what a run resumes from."""

    every: int = Field(
        1000, ge=0, description="Steps between checkpoints. 0 saves after the last step only."
    )
    keep: int = Field(
        3,
        gt=0,
        description="Number of newest valid checkpoints to keep; one more where no step has followed any of them yet.",
    )
    keep_best: int = Field(
        0,
        ge=0,
        description="Number of checkpoints with the lowest validation loss to keep beside those.",
    )
    resume: Literal["auto", "never"] | Path = Field(
        "auto",
        description="auto: resume from the newest valid checkpoint of this run. Or the folder of a checkpoint to "
        "begin from, or to go back to.",
    )

    @field_validator("resume")
    @classmethod
    def _word_or_path(cls, resume: str | Path) -> str | Path:
        # A word that is misspelt, such as `nevr`, would be taken for the path of a folder.
        if isinstance(resume, Path) and len(resume.parts) < 2 and not resume.exists():
            raise ValueError("must be 'auto', 'never' or the folder of a checkpoint")
        return resume


class WandbConfig(Section):
    """Logging to Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = Field(
        "disabled", description="Whether it is sent, kept in the run's folder, or off."
    )
    project: str = Field("megalite", description="Project that the run is shown in.")
    entity: str | None = Field(None, description="User or team. null: the account's own.")
    group: str | None = Field(None, description="Group of the run. A sweep's trials have its name.")
    tags: tuple[str, ...] = Field((), description="Labels of the run.")


class MlflowConfig(Section):
    """Logging to an MLflow tracking server."""

    tracking_uri: str = Field(
        "",
        description="The server, such as http://mlflow:5000. Empty disables. Credentials come from the environment.",
    )
    experiment: str = Field("megalite", description="Experiment that the run is shown in.")

    @field_validator("tracking_uri")
    @classmethod
    def _server(cls, uri: str) -> str:
        check_no_secret(uri)
        if uri and not uri.startswith(("http://", "https://")):
            raise ValueError(
                "must be the http:// or https:// URL of a tracking server, which `mlflow server` starts"
            )
        return uri


class PrometheusConfig(Section):
    """Metrics of training for Prometheus, from the first rank."""

    port: int | None = Field(
        None, ge=1, le=65535, description="Port that answers to Prometheus. null: none."
    )
    textfile: Path | None = Field(
        None,
        description="File for node-exporter's textfile collector, ending in .prom. null: none.",
    )

    @field_validator("textfile")
    @classmethod
    def _as_collected(cls, path: Path | None) -> Path | None:
        if path is not None and path.suffix != ".prom":
            raise ValueError("must end in .prom: node-exporter reads no other file")
        return path


class TasksConfig(Section):
    """Tasks of lm-evaluation-harness, evaluated by the model in training on its ranks."""

    names: tuple[str, ...] = Field(
        (), description="Names of tasks, groups or tags, or YAML files. Empty disables."
    )
    every: int = Field(
        1000, ge=0, description="Steps between evaluations. 0 evaluates at the end only."
    )
    include_path: Path | None = Field(None, description="Folder with more tasks.")
    limit: int | None = Field(
        None, gt=0, description="Documents of each task to evaluate. All where left out."
    )


class SamplesConfig(Section):
    """Answers of the model in training to fixed prompts, by its likeliest tokens."""

    prompts: tuple[str, ...] = Field((), description="Texts to go on with. Empty disables.")
    every: int = Field(100, ge=0, description="Steps between answers. 0 answers at the end only.")
    max_tokens: int = Field(64, gt=0, description="Length limit of an answer, in tokens.")


class ObserveConfig(Section):
    """What is logged and evaluated in training."""

    log_every: int = Field(
        1,
        gt=0,
        description="Steps between lines of a log file, each with the mean loss of the steps since the one before; "
        "metrics.jsonl has every step.",
    )
    eval_every: int = Field(
        100, ge=0, description="Steps between validations. 0 validates at the end only."
    )
    eval_batches: int = Field(
        20, gt=0, description="Global batches of one validation, the same ones every time."
    )
    layers_every: int = Field(
        0,
        ge=0,
        description="Steps between measurements of each layer: the norm of its gradients, the root mean square of its "
        "output, its largest attention logit, what fp8 makes zero. 0 disables.",
    )
    noise_scale_every: int = Field(
        0, ge=0, description="Steps between measurements of the gradient noise scale. 0 disables."
    )
    tasks: TasksConfig = TasksConfig()
    samples: SamplesConfig = SamplesConfig()
    target_rows: int = Field(
        0,
        ge=0,
        description="Validation rows whose targets an encoder-decoder gives at every validation, by the likeliest "
        "tokens, to be compared by BLEU, chrF and ROUGE. 0 disables.",
    )
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()
    prometheus: PrometheusConfig = PrometheusConfig()
    webhook: str = Field(
        "",
        description="Address that is told when the run ends or dies, as Slack and Mattermost take it; $NAME takes it "
        "from that environment variable. Empty disables.",
    )
    tensorboard: bool = Field(False, description="Write the metrics for TensorBoard, too.")

    @field_validator("webhook")
    @classmethod
    def _keeps_secrets(cls, address: str) -> str:
        check_webhook(address)
        return address


Policy = Literal["report", "skip", "rewind", "stop"]


class HealthConfig(Section):
    """How hangs, stragglers and bad numbers are found, and what follows."""

    hang_timeout_s: float = Field(
        300.0,
        ge=0,
        description="Seconds without progress after which the run writes a hang report and exits. 0 disables.",
    )
    straggler_factor: float = Field(
        1.25,
        gt=1,
        description="Report a rank as a straggler when its compute time exceeds this multiple of its peers' median.",
    )
    straggler_every: int = Field(
        10, gt=0, description="Steps between comparisons of the ranks' compute times."
    )
    not_finite: Literal["skip", "rewind", "stop"] = Field(
        "skip",
        description="What to do about a loss or gradient that is not finite. skip: the step updates nothing; "
        "rewind: the run returns to its newest checkpoint and passes over that batch; stop: the run "
        "exits, saved as before that step.",
    )
    loss_spike: Policy = Field(
        "report",
        description="The same for a loss far above those of the last 128 steps. report: only report it.",
    )
    grad_norm_spike: Policy = Field("report", description="The same for a gradient norm.")
    spike_sigmas: float = Field(
        6.0, gt=0, description="Standard deviations above the mean that make a value a spike."
    )
    bad_steps_limit: int = Field(
        10,
        gt=0,
        description="Steps skipped in a row, or rewinds to one checkpoint, after which the run exits.",
    )
    weights_check_every: int = Field(
        100,
        ge=0,
        description="Steps between bitwise comparisons of what ranks must hold alike. 0 disables.",
    )

    def patience_s(self, phase: str) -> float:
        """Return how many seconds a rank that waits for no other may go without progress. Training
        steps are steady; a first step may compile, and loading, validating and saving may be one
        long piece of work."""
        return self.hang_timeout_s * (1 if phase == "training" else 4)

    @property
    def collective_timeout_s(self) -> float:
        """Return the timeout of collectives in seconds: long enough that the watchdog reports
        first, since it knows more."""
        return max(1800.0, 6 * self.hang_timeout_s)


class ProfileConfig(Section):
    """Traces of some steps, for chrome://tracing or https://ui.perfetto.dev."""

    steps: tuple[int, ...] = Field(
        (), description="Steps to record: [first, last]. Empty disables."
    )
    ranks: tuple[int, ...] = Field((0,), description="Ranks that write a trace.")
    memory: bool = Field(False, description="Also record every allocation.")
    tensors: tuple[int, ...] = Field(
        (),
        description="Steps whose weights and gradients are written to RUN/tensors, for `megalite parity`.",
    )

    @field_validator("steps")
    @classmethod
    def _first_and_last(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if len(steps) not in (0, 2) or (steps and not 1 <= steps[0] <= steps[1]):
            raise ValueError("must be [first, last] with 1 <= first <= last, or empty")
        return steps


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
        return (targets,) if isinstance(targets, str) else targets

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class HookConfig(Choice):
    """Something that a plugin does beside the steps of a run."""

    name: str = Field(description="Which hook, as its plugin registers it.")

    KINDS: ClassVar[Registry[Any]] = registry.hooks

    def check(self, config: Config) -> None:
        """Raise ValueError, naming the setting, when the rest of a config does not go with this
        hook."""

    def build(self, run: Run, parts: RankModel) -> Hook:
        """Return this rank's hook."""
        raise NotImplementedError


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
        if train.steps not in (0, steps):
            raise ValueError(
                f"train.steps {train.steps} and {why}, which is {steps} steps, are two lengths of the run; give one, "
                "and null for the other"
            )
        self.optimizer.schedule.check(steps)
        return self.model_copy(update={"train": train.model_copy(update={"steps": steps})})

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
        if schedule.min_lr > lr:
            raise ValueError(
                f"optimizer.schedule.min_lr {schedule.min_lr} is above optimizer.lr {lr}"
            )
        if self.train.steps:
            schedule.check(self.train.steps)
        self._best_can_be_told()
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
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
