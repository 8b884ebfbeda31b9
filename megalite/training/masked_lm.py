"""Masked language modelling (Devlin et al. 2019): tell the tokens that were masked from those
around them."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from megalite.comm.mesh import Mesh
from megalite.config import Config, ObjectiveConfig
from megalite.data.dataset import Split
from megalite.data.loader import MicroBatch
from megalite.data.masking import Masking, Shares
from megalite.data.mixture import Corruption
from megalite.data.tokenizer import Tokenizer
from megalite.models.context_cut import take
from megalite.models.layers import IGNORE
from megalite.parallel.outputs import VocabShards
from megalite.parallel.stage import Inputs, Output, Picked
from megalite.training.objectives import NextToken, Objective
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

    def check(self, config: Config) -> None:
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
        return MaskedLM(mesh, config.parallel.sequence)


class MaskedLM(NextToken):
    """Cross-entropy of the masked tokens, which alone the head is computed of. Validation also
    tells how many of them are the likeliest one."""

    judges: Output = "logits"
    num_judged = 1

    def __init__(self, mesh: Mesh, sequence: bool):
        super().__init__()
        self.mesh, self.slices = mesh, mesh.tensor.size if sequence else 1

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        labels, cut = micro.labels, inputs.places.cut
        if cut is not None:
            labels = take(labels, cut.index_RBT[self.mesh.context.rank])
        # Where the sequence is not cut there is one slice, which all tensor ranks pick from.
        picked = Picked.of(
            labels, self.slices, self.mesh.tensor.rank % self.slices, self.mesh.device
        )
        return replace(inputs, picked=picked)

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
