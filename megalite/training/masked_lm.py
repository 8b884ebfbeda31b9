"""Masked language modelling (Devlin et al. 2019): tell the tokens that were masked from those around them."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megalite.comm.mesh import Mesh
from megalite.config import Config, ObjectiveConfig
from megalite.data.dataset import Split
from megalite.data.masking import Masking
from megalite.data.mixture import Corruption
from megalite.data.tokenizer import Tokenizer
from megalite.models.layers import IGNORE
from megalite.parallel.outputs import VocabShards
from megalite.parallel.stage import Inputs, Output
from megalite.training.objectives import NextToken, Objective
from megalite.utils.keys import key_of


class MaskedLMConfig(ObjectiveConfig):
    """Cross-entropy of the tokens that are masked. Which these are is another choice in every epoch."""

    name: Literal["masked_lm"] = "masked_lm"
    share: float = Field(
        0.15,
        gt=0,
        lt=1,
        description="Share of the tokens to predict. Of these, 80% become the mask token, 10% a random one.",
    )

    def check(self, config: Config) -> None:
        if config.model.task != "masked":
            raise ValueError(f"objective.name: masked_lm needs an encoder, not model.task: {config.model.task}")
        if config.data.tokenizer is None:
            raise ValueError("objective.name: masked_lm needs data.tokenizer, which has the mask token")
        if config.data.fim or not config.data.border_loss:
            raise ValueError("objective.name: masked_lm predicts no next token; leave data.fim and .border_loss out")
        if config.train.loss_chunk is not None:
            raise ValueError(f"objective.name: masked_lm needs train.loss_chunk: null, not {config.train.loss_chunk}")

    def corruption(self, config: Config, tokenizer: Tokenizer | None, split: Split) -> Corruption | None:
        assert tokenizer is not None
        # Keyed by the seed and the split, not by ranks: every layout masks the same tokens.
        return Masking(self.share, tokenizer, key_of(config.train.seed, "masked", split))

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return MaskedLM()


class MaskedLM(NextToken):
    """Cross-entropy of the masked tokens. Validation also tells how many of them are the likeliest one."""

    judges: Output = "logits"
    num_judged = 1

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        labels_BT = inputs.labels_BT
        assert labels_BT is not None
        losses_BT = out.cross_entropy(labels_BT)
        # Without an argmax over vocabulary shards: it is right if no logit is larger than its own.
        is_right_BT = (labels_BT != IGNORE) & (out.target(labels_BT) >= out.largest_BT)
        return losses_BT.sum(1), is_right_BT.sum(1, dtype=torch.float32)[:, None]

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        return super().summary(loss, count, judged) | {"accuracy": judged.item() / max(count, 1.0)}
