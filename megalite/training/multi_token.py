"""Multi-token prediction as an objective (DeepSeek-V3, section 2.2): the cross-entropy of further
tokens beside that of the next one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megalite.data.dataset import Split
from megalite.data.loader import MicroBatch
from megalite.kernels.loss import LossTerms
from megalite.models.context_cut import take
from megalite.models.layers import IGNORE
from megalite.parallel.stage import Ahead, Inputs
from megalite.training.objectives import NextToken


class MultiToken(NextToken):
    """Cross-entropy of the next token, and in training `weight` times the mean of those of the
    tokens behind it, one for each of the model's predictors. All are divided by the same count, the
    labels of the next token, as DeepSeek-V3's are."""

    def __init__(self, num_predictors: int, weight: float, terms: LossTerms | None = None):
        super().__init__(terms)
        self.num_predictors, self.weight = num_predictors, weight
        self.metrics = ("cross_entropy", "mtp_loss")

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        inputs = super().complete(inputs, micro, split)
        if split != "train":
            return inputs
        # Shifted before it is cut: what follows a context rank's last token is another rank's.
        index_BT, ahead = inputs.places.index_BT, look_ahead(micro, self.num_predictors)
        tokens_ABT, labels_ABT = (
            torch.stack([take(x, index_BT) for x in each.to(index_BT.device, non_blocking=True)])
            for each in ahead
        )
        return replace(inputs, ahead=Ahead(tokens_ABT, labels_ABT))

    def measure(self, out: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if inputs.ahead is None:  # validation
            return super().measure(out, inputs)
        # out [(1 + A)·B, T], or with terms [(1 + A)·B, T, 2]: what is minimised, and the
        # cross-entropy in it.
        of_rows = (out if inputs.terms else out[..., None]).sum(1)
        next_B, *ahead = of_rows.chunk(1 + self.num_predictors)
        ahead_B = torch.stack(ahead).mean(0)
        loss_B = next_B[:, 0] + self.weight * ahead_B[:, 0]
        return loss_B, torch.stack((next_B[:, -1], ahead_B[:, -1]), 1).detach()


def look_ahead(micro: MicroBatch, depth: int) -> tuple[Tensor, Tensor]:
    """Return the tokens 1 to `depth` places behind each token, and their labels: [A,B,T] each.
    Where a document has ended, that is its last token again, without a label: no prediction reaches
    over its end, and nothing of another document is seen."""
    tokens_BT, labels_BT, documents_BT = micro.tokens, micro.labels, micro.documents
    is_last_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    is_last_BT[:, -1] = True
    if documents_BT is not None:
        is_last_BT[:, :-1] = documents_BT[:, 1:] != documents_BT[:, :-1]
    found = []
    for _ in range(depth):
        tokens_BT = torch.where(is_last_BT, tokens_BT, tokens_BT.roll(-1, 1))
        labels_BT = torch.where(is_last_BT, IGNORE, labels_BT.roll(-1, 1))
        found.append((tokens_BT, labels_BT))
    tokens, labels = zip(*found, strict=True)
    return torch.stack(tokens), torch.stack(labels)
