"""The section `data`: sources, how they are mixed, and how samples are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from megalite.config.section import Section, at_home
from megalite.utils.urls import check_no_secret


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
        # Kept as text: a Path would make s3:/a of s3://a.
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
        # The set also finds two that begin at once: it has one less.
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
            # A sample is cut into pieces of one length, so that a step keeps its tokens.
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
        # Called for what it raises: each split's names must differ.
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
    # Paths may be URLs, whose parts are divided by slashes on every system.
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
