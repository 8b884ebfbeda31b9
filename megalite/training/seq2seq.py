"""Objectives of encoder-decoders: tell what a target goes on with, given its source."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Axis, Mesh
from megalite.config import Config, DataKind, Lengths, ObjectiveConfig, Section
from megalite.data.dataset import Split
from megalite.data.stacks import (
    Denoisers,
    Part,
    PrefixLM,
    SourceAndTarget,
    SpanCorruption,
    Views,
    lengths_of,
    num_hidden,
    span_lengths,
)
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.models.layers import IGNORE
from megalite.parallel.outputs import VocabShards
from megalite.parallel.stage import Inputs, Output
from megalite.training.objectives import NextToken, Objective, sum_by_document
from megalite.utils.keys import key_of

SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Seq2Seq(NextToken):
    """Cross-entropy of the target's tokens. Validation also tells how many of them are the
    likeliest one, and how many whole targets: those that greedy decoding gives exactly."""

    judges: Output = "logits"
    num_judged = 3

    def __init__(self, context: Axis):
        """Take the axis whose ranks have parts of each target."""
        super().__init__()
        self.context = context

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        labels_BT = inputs.labels_BT
        assert labels_BT is not None
        losses_BT, has_label_BT = out.cross_entropy(labels_BT), labels_BT != IGNORE
        is_right_BT = has_label_BT & (out.target(labels_BT) >= out.largest_BT)
        document_BT, whole_BT = inputs.places.document_BT, inputs.places.whole_document_BT
        document_BT = torch.zeros_like(labels_BT) if document_BT is None else document_BT
        # As many on every rank that has a part of them.
        count = int((document_BT if whole_BT is None else whole_BT).max()) + 1
        labels_BD, right_BD = (
            all_reduce(sum_by_document(x.float(), document_BT, count), self.context)
            for x in (has_label_BT, is_right_BT)
        )
        # All of these ranks know all targets, and one of them counts.
        there_BD = (labels_BD > 0) & (self.context.rank == 0)
        whole_B = (there_BD & (labels_BD == right_BD)).sum(1)
        return losses_BT.sum(1), torch.stack(
            (is_right_BT.sum(1), there_BD.sum(1), whole_B), 1
        ).float()

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        right, targets, whole = judged.tolist()
        shares = {"accuracy": right / max(count, 1.0), "exact": whole / max(targets, 1.0)}
        return super().summary(loss, count, judged) | shares


class SourceObjectiveConfig(ObjectiveConfig):
    """What objectives of encoder-decoders have in common."""

    def check(self, config: Config) -> None:
        data = config.data
        if config.model.task != "seq2seq":
            raise ValueError(
                f"objective.name: {self.name} needs an encoder-decoder, not model.task: {config.model.task}"
            )
        if data.fim or not data.border_loss:
            raise ValueError(
                f"objective.name: {self.name} has no use for data.fim and .border_loss; leave them out"
            )
        if data.order == "megatron":
            raise ValueError(
                f"objective.name: {self.name} needs data.order: shuffle or sequential, not megatron"
            )

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return Seq2Seq(mesh.context)


class Denoiser(Section):
    """One of the things that are done to the text."""

    density: float = Field(gt=0, lt=1, description="Share of the tokens that are hidden.")
    mean_length: float | None = Field(
        ge=1, description="Mean length of a hidden span, in tokens. null: the end of the text."
    )
    share: float = Field(1.0, gt=0, description="How often it is done, beside the others'.")
    mode: str | None = Field(None, description="Token that its sources begin with.")


UL2 = tuple(
    Denoiser(density=density, mean_length=length)
    for density, length in (
        (0.15, 3.0), (0.15, 8.0), (0.5, 3.0), (0.5, 8.0), (0.15, 64.0), (0.5, 64.0), (0.25, None)
    )
)  # fmt: skip
"""The seven denoisers of Tay et al. 2022, table 1."""


class SpanCorruptionConfig(SourceObjectiveConfig):
    """Cross-entropy of spans that are hidden from the encoder. Which these are is another choice in
    every epoch."""

    name: Literal["span_corruption"] = "span_corruption"
    density: float = Field(0.15, gt=0, lt=1, description="Share of the tokens that are hidden.")
    mean_length: float | None = Field(
        3.0,
        ge=1,
        description="Mean length of a hidden span, in tokens. null: the end of the text is hidden (a prefix LM).",
    )
    mixture: tuple[Denoiser, ...] | Literal["ul2"] = Field(
        (),
        description="Instead of these: things of which one is done to each sample, or ul2 for the seven of UL2.",
    )

    def check(self, config: Config) -> None:
        super().check(config)
        data = config.data
        if data.tokenizer is None:
            raise ValueError(
                "objective.name: span_corruption needs data.tokenizer, which has the sentinels"
            )
        if data.seq_length < 4:
            raise ValueError(
                f"objective.name: span_corruption needs a data.seq_length of at least 4, not {data.seq_length}"
            )
        if data.packing != "concat" or data.document_mask:
            raise ValueError(
                "objective.name: span_corruption takes samples of one length from the stream of texts; it needs "
                "data.packing: concat and data.document_mask: false"
            )
        usual = SpanCorruptionConfig()
        # A written config has the defaults.
        if self.mixture and (self.density, self.mean_length) != (usual.density, usual.mean_length):
            raise ValueError(
                "objective.mixture says what is hidden; leave objective.density and .mean_length out"
            )

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """Return what is done to samples, one or several things."""
        if self.mixture == "ul2":
            return UL2
        return self.mixture or (Denoiser(density=self.density, mean_length=self.mean_length),)

    def lengths(self, config: Config) -> Lengths:
        source = config.data.seq_length
        # All of them read as much text, so that none is passed over.
        read = min(
            span_lengths(source - (each.mode is not None), each.density, each.mean_length).read
            for each in self.denoisers
        )
        targets = (lengths_of(read, x.density, x.mean_length).target for x in self.denoisers)
        return Lengths(read, source, max(targets))

    def stacks(self, config: Config, tokenizer: Tokenizer | None, split: Split) -> Views:
        assert tokenizer is not None
        lengths, sentinels, end = self.lengths(config), sentinels_of(tokenizer), tokenizer.eod_id
        spans = max(num_hidden(lengths.read, x.density, x.mean_length)[1] for x in self.denoisers)
        if len(sentinels) < spans or end is None:
            raise DataError(
                f"objective.name: span_corruption hides {spans} spans of a sample, for which data.tokenizer needs an "
                f"end-of-document token and as many sentinels <extra_id_0>, <extra_id_1>, …; it has {len(sentinels)}. "
                "`megalite tokenizer train --type t5` trains one that has them"
            )
        key, start = key_of(config.train.seed, "spans", split), config.model.START_TOKEN

        def made(each: Denoiser) -> SpanCorruption | PrefixLM:
            own = lengths_of(lengths.read, each.density, each.mean_length)
            if each.mean_length is None:
                return PrefixLM(own, start, end)
            return SpanCorruption(own, each.density, each.mean_length, sentinels, start, end, key)

        if not self.mixture:
            return made(self.denoisers[0])
        modes = [_mode(each.mode, tokenizer) for each in self.denoisers]
        parts = [
            Part(made(each), each.share, mode)
            for each, mode in zip(self.denoisers, modes, strict=True)
        ]
        return Denoisers(lengths, parts, start, key)


def _mode(name: str | None, tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that sources begin with. Raise DataError where there is none of
    this name."""
    found = None if name is None else tokenizer.vocabulary().get(name)
    if name is not None and found is None:
        raise DataError(f"objective.mixture: mode {name!r} is no token of data.tokenizer")
    return found


class Seq2SeqConfig(SourceObjectiveConfig):
    """Cross-entropy of the targets of rows, which follow from their sources (teacher forcing)."""

    name: Literal["seq2seq"] = "seq2seq"
    target_length: int = Field(
        gt=0,
        description="Tokens of the decoder in a sample. data.seq_length are those of the encoder.",
    )

    DATA: ClassVar[DataKind] = "seq2seq"

    def check(self, config: Config) -> None:
        super().check(config)
        if not config.data.document_mask:
            raise ValueError(
                "objective.name: seq2seq needs data.document_mask: true, which keeps rows of a sample apart"
            )
        if config.data.long_rows == "cut":
            raise ValueError(
                "objective.name: seq2seq learns whole targets; data.long_rows must be refuse or drop"
            )

    def lengths(self, config: Config) -> Lengths:
        source = config.data.seq_length
        return Lengths(source + self.target_length, source, self.target_length)

    def stacks(self, config: Config, tokenizer: Tokenizer | None, split: Split) -> Views:
        return SourceAndTarget(self.lengths(config), config.model.START_TOKEN)


def sentinels_of(tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a tokenizer's sentinels, from <extra_id_0> on, as far as there is one for
    each number."""
    named = {
        name: number for name, number in tokenizer.vocabulary().items() if SENTINEL.fullmatch(name)
    }
    found: list[int] = []
    while (name := f"<extra_id_{len(found)}>") in named:
        found.append(named[name])
    return found
