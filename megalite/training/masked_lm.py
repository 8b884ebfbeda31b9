"""Masked language modelling (Devlin et al. 2019): tell the tokens that were masked from those
around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.config import Config, ObjectiveConfig
from megalite.data.dataset import SampleSource, Split
from megalite.data.indexed import IndexedDataset
from megalite.data.loader import MicroBatch
from megalite.data.masking import Masking, Shares
from megalite.data.mixture import Corruption
from megalite.data.sentences import SentencePairs, Specials
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.models.context_cut import take
from megalite.models.layers import IGNORE
from megalite.parallel.outputs import VocabShards
from megalite.parallel.stage import Inputs, Output, Picked, pair_losses
from megalite.training.objectives import NextToken, Objective
from megalite.utils.changes import spelled
from megalite.utils.keys import key_of

Share = Annotated[float, Field(gt=0, lt=1)]


class MaskedLMConfig(ObjectiveConfig):
    """Cross-entropy of the tokens that are masked. Which these are is another choice in every
    epoch."""

    name: Literal["masked_lm"] = "masked_lm"
    share: Share | tuple[Share, Share] = Field(
        0.15,
        description="Share of the tokens to predict. Of these, 80% become the mask token, 10% a random one. Two "
        "numbers are those at the start and at the end of the run, between which it goes evenly with the samples "
        "(Yang et al. 2022); validation takes the last.",
    )
    whole_words: bool = Field(
        False,
        description="Choose all tokens of a word, or none of them, as BERT's whole word masking does.",
    )

    sentences: Literal["nsp", "sop"] | None = Field(
        None,
        description="Also tell of two texts whether the second follows the first: nsp, or else is another document's "
        "(BERT); sop, or else the two are swapped (ALBERT, Megatron-LM). It needs model.sentence_head.",
    )

    def check(self, config: Config) -> None:
        self._check_sentences(config)
        if config.data.order == "megatron":
            raise ValueError(
                "data.order: megatron is that of Megatron-LM's GPTDataset; its BERT makes samples by another rule, "
                "which is not followed: give shuffle or sequential"
            )
        if config.model.task != "masked":
            raise ValueError(
                f"objective.name: masked_lm needs an encoder, not model.task: {config.model.task}"
            )
        if config.data.tokenizer is None:
            raise ValueError(
                "objective.name: masked_lm needs data.tokenizer, which has the mask token"
            )
        if config.data.fim or not config.data.border_loss:
            raise ValueError(
                "objective.name: masked_lm predicts no next token; leave data.fim and .border_loss out"
            )
        if config.train.loss_chunk is not None:
            raise ValueError(
                f"objective.name: masked_lm needs train.loss_chunk: null, not {config.train.loss_chunk}"
            )

    def _check_sentences(self, config: Config) -> None:
        head, data = getattr(config.model, "sentence_head", False), config.data
        if (head is True) != (self.sentences is not None):
            raise ValueError(
                f"objective.sentences: {self.sentences or 'null'} does not go with model.sentence_head: "
                f"{spelled(head)}: give sentences: nsp or sop and sentence_head: true, or neither"
            )
        if head == "kept" and config.model.hf is None:
            raise ValueError("model.sentence_head: kept needs model.hf, whose heads go along")
        if self.sentences is None:
            return
        if config.lora is not None:
            raise ValueError(
                f"objective.sentences: {self.sentences} does not go with lora: the head is to be learned, too"
            )
        if not data.document_mask or data.seq_length_warmup:
            raise ValueError(
                f"objective.sentences: {self.sentences} needs data.document_mask: true, which keeps pairs apart, "
                "and no data.seq_length_warmup"
            )

    def made_of_tokens(self) -> str:
        # A dry run's texts have no sentences.
        return "objective.sentences" if self.sentences else ""

    def pairs_of(
        self, config: Config, tokenizer: Tokenizer | None, split: Split
    ) -> Callable[[IndexedDataset, int, int], SampleSource] | None:
        if self.sentences is None:
            return None
        assert tokenizer is not None
        begin, end = (next(iter(ids), None) for ids in (tokenizer.begin_ids, tokenizer.end_ids))
        if begin is None or end is None:
            raise DataError(
                "objective.sentences needs a data.tokenizer that has every text begin and end with a token, as "
                "BERT's [CLS] and [SEP]"
            )
        key = key_of(config.train.seed, "sentences", split)
        return partial(
            SentencePairs,
            seq_length=config.data.seq_length,
            kind=self.sentences,
            specials=Specials(begin, end),
            key=key,
        )

    def corruption(
        self, config: Config, tokenizer: Tokenizer | None, split: Split
    ) -> Corruption | None:
        assert tokenizer is not None
        # Keyed by the seed and the split, not by ranks: every layout masks the same tokens.
        key = key_of(config.train.seed, "masked", split)
        start, end = self.shares
        total = config.train.samples_after(config.train.steps)
        # Validations are compared with each other: all have one share.
        shares = Shares(start if split == "train" else end, end, total)
        return Masking(shares, tokenizer, key, self.whole_words)

    @property
    def shares(self) -> tuple[float, float]:
        """Return the shares at the start and at the end of the run."""
        return self.share if isinstance(self.share, tuple) else (self.share, self.share)

    def predicted(self) -> float:
        return sum(self.shares) / 2

    def most_predicted(self) -> float:
        return max(self.shares)

    def build(self, config: Config, mesh: Mesh) -> Objective:
        kind = MaskedLM if self.sentences is None else MaskedLMOfPairs
        return kind(mesh, config.parallel.sequence)


class MaskedLM(NextToken):
    """Cross-entropy of the masked tokens, which alone the head is computed of. Validation also
    tells how many of them are the likeliest one."""

    judges: Output = "logits"
    num_judged = 1

    def __init__(self, mesh: Mesh, sequence: bool):
        super().__init__()
        self.mesh, self.slices = mesh, mesh.tensor.size if sequence else 1

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        return replace(inputs, picked=self._pick(micro.labels, inputs))

    def _pick(self, labels: Tensor, inputs: Inputs) -> Picked:
        """Return the tokens with a label, of `labels` [B,T] of whole sequences, on this rank."""
        if (cut := inputs.places.cut) is not None:
            labels = take(labels, cut.index_RBT[self.mesh.context.rank])
        # Where the sequence is not cut there is one slice, which all tensor ranks pick from.
        rank = self.mesh.tensor.rank % self.slices
        return Picked.of(labels, self.slices, rank, self.mesh.device)

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        # Without an argmax over vocabulary shards: it is right if no logit is larger than its own.
        picked = inputs.picked
        assert picked is not None
        labels_1M = picked.labels_1M
        losses_1M = out.cross_entropy(labels_1M)
        is_right_1M = (labels_1M != IGNORE) & (out.target(labels_1M) >= out.largest_BT)
        losses_B, right_B = (
            picked.spread(x_1M.float()).sum(1) for x_1M in (losses_1M, is_right_1M)
        )
        return losses_B, right_B[:, None]

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        return super().summary(loss, count, judged) | {"accuracy": judged.item() / max(count, 1.0)}


class MaskedLMOfPairs(MaskedLM):
    """The same, and beside it the cross-entropy of whether two texts follow each other, a mean over
    all pairs of the global batch, which is added."""

    metrics: tuple[str, ...] = ("masked_loss", "sentence_loss")
    num_judged = 4

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        assert micro.sentences is not None
        pairs = self._pick(micro.sentences, inputs)
        return replace(super().complete(inputs, micro, split), sentences=pairs)

    def look_ahead(self, outs: Iterable[Any], inputs: list[Inputs]) -> list[Inputs]:
        # Both losses are means of their own, and all of a batch is divided by the masked tokens.
        pairs = torch.stack([_count(each).sum() for each in inputs]).sum()
        tokens = torch.stack([each.count_B.sum() for each in inputs]).sum()
        here = torch.stack((tokens, pairs)).float()
        num_tokens, num_pairs = all_reduce(here, self.mesh.replicas)
        per_pair = num_tokens / num_pairs.clamp(min=1)
        return [replace(each, per_pair=per_pair) for each in inputs]

    def measure(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        assert inputs.per_pair is not None
        masked_B, pairs_B = (x_BT.sum(1) for x_BT in out.chunk(2))
        pairs_B = pairs_B * inputs.per_pair
        return masked_B + pairs_B, torch.stack((masked_B, pairs_B), 1).detach()

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        picked, pairs = inputs.picked, inputs.sentences
        assert picked is not None
        assert pairs is not None
        count = picked.labels_1M.shape[1]
        told_1M2, labels_1M = out.padded_BTV[:, count:, :2], pairs.labels_1M
        tokens = replace(out, padded_BTV=out.padded_BTV[:, :count])
        losses_B, right_B1 = super().judge(tokens, inputs)
        is_right_1M = (told_1M2.argmax(2) == labels_1M).float()
        found = [
            pairs.spread(x_1M).sum(1, keepdim=True)
            for x_1M in (pair_losses(told_1M2, labels_1M), is_right_1M)
        ]
        return losses_B, torch.cat((right_B1, *found, _count(inputs)[:, None]), 1)

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        right, pair_loss, right_pairs, pairs = judged.tolist()
        found = super().summary(loss, count, torch.tensor([right]))
        of_pairs = pair_loss / max(pairs, 1.0)
        return found | {
            "loss": loss + of_pairs,
            "masked_loss": loss,
            "sentence_loss": of_pairs,
            "sentence_accuracy": right_pairs / max(pairs, 1.0),
        }


def _count(inputs: Inputs) -> Tensor:
    """Return the number of pairs of each row on this context rank, fp32 [B]."""
    pairs = inputs.sentences
    assert pairs is not None
    return pairs.spread((pairs.labels_1M != IGNORE).float()).sum(1)
