"""Objective of extractive question answering: tell at which tokens of a text the answer to a
question starts and ends.

Legend: D = documents of a row, each a question with a text; K = this tensor rank's of the two
columns of logits, start and end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.config import ANSWER_LABELS, Config, DataKind, ObjectiveConfig
from megalite.data.dataset import Split
from megalite.data.loader import MicroBatch
from megalite.parallel.outputs import VocabShards
from megalite.parallel.stage import Answered, Inputs, Output
from megalite.training.objectives import Objective, sum_by_document, summed_over


class AnswersConfig(ObjectiveConfig):
    """Cross-entropy of where an answer starts and where it ends, each among all tokens of its
    question and text: the mean of both."""

    name: Literal["answers"] = "answers"

    DATA: ClassVar[DataKind] = "answers"
    NEEDS: ClassVar[Output] = "logits"

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return Answers(mesh)


class Answers:
    """Validation tells how many answers have both ends right (`exact`), and the mean F1 of their
    tokens. An answer that is not there starts and ends at its document's first token."""

    judges: Output = "logits"
    metrics: tuple[str, ...] = ()
    num_judged = 2

    def __init__(self, mesh: Mesh):
        self.context = mesh.context

    def complete(self, inputs: Inputs, micro: MicroBatch, split: Split) -> Inputs:
        assert micro.documents is not None
        # On the host, from the whole sequence: a context rank sees only a part of each text.
        count, both = int(micro.documents.max()) + 1, 2
        ends = [
            sum_by_document(ends_BT.float(), micro.documents, count)
            for ends_BT in ((micro.labels == n) | (micro.labels == both) for n in range(both))
        ]
        real_BD = (ends[0] == 1) & (ends[1] == 1)
        answered = Answered(real_BD.to(inputs.tokens_BT.device), 1 / self.context.size)
        return replace(inputs, answered=answered)

    def look_ahead(self, outs: Iterable[Any], inputs: list[Inputs]) -> list[Inputs]:
        return inputs

    def measure(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        answered, document_BT, labels_BT = (
            inputs.answered,
            inputs.places.document_BT,
            inputs.labels_BT,
        )
        assert answered is not None
        assert document_BT is not None
        assert labels_BT is not None
        logits_BTK, real_BD = out.logits_BTV, answered.real_BD
        count = real_BD.shape[1]
        columns = torch.arange(len(ANSWER_LABELS), device=labels_BT.device)[out.columns]
        is_end_BTK = (labels_BT[..., None] == columns) | (labels_BT == 2)[..., None]
        largest_BDK = self._largest(logits_BTK.detach(), document_BT, count)
        # Shifted by the largest of its document, no exponential overflows.
        shifted_BTK = logits_BTK - _of_documents(largest_BDK, document_BT)
        sums_BDK = self._sum(shifted_BTK.exp(), document_BT, count)
        ends_BDK = self._sum(shifted_BTK * is_end_BTK, document_BT, count)
        # A row's last document may be padding, of which a context rank has nothing.
        loss_BDK = (sums_BDK.clamp(min=torch.finfo(torch.float32).tiny).log() - ends_BDK) / 2
        loss_B = out.sum(loss_BDK.masked_fill(~real_BD[..., None], 0.0)).sum(1)
        # Every context rank has the whole loss, but the gradient of its own tokens only: the value
        # is divided among them, the gradient is not.
        return loss_B - loss_B.detach() * (1 - answered.share), loss_B.new_empty(len(loss_B), 0)

    def _largest(self, x_BTK: Tensor, document_BT: Tensor, count: int) -> Tensor:
        """Return the largest value of each document, [B,D,K]; 0 where it has no token."""
        index = document_BT[..., None].expand_as(x_BTK)
        none = x_BTK.new_full((len(x_BTK), count, x_BTK.shape[2]), -torch.inf)
        found = all_reduce(
            none.scatter_reduce(1, index, x_BTK, "amax"), self.context, dist.ReduceOp.MAX
        )
        return found.masked_fill(found.isinf(), 0.0)

    def _sum(self, x_BTK: Tensor, document_BT: Tensor, count: int) -> Tensor:
        """Return the sum over each document's tokens on all context ranks, [B,D,K], with the
        gradient of this rank's."""
        return summed_over(sum_by_document(x_BTK, document_BT, count), self.context)

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        loss_B, _ = self.measure(out, inputs)
        answered, places, labels_BT = inputs.answered, inputs.places, inputs.labels_BT
        assert answered is not None
        assert places.document_BT is not None
        assert labels_BT is not None
        logits_BT2, real_BD = out.whole(), answered.real_BD
        count = real_BD.shape[1]
        largest_BD2 = self._largest(logits_BT2, places.document_BT, count)
        is_largest = logits_BT2 == _of_documents(largest_BD2, places.document_BT)
        told_BD2 = self._first(is_largest, inputs, count)
        is_end = torch.stack([(labels_BT == n) | (labels_BT == 2) for n in range(2)], 2)
        there_BD2 = self._first(is_end, inputs, count)
        first, last = torch.maximum(told_BD2, there_BD2), torch.minimum(told_BD2, there_BD2)
        # Tokens of both, between the later start and the earlier end.
        shared_BD = (last[..., 1] - first[..., 0] + 1).clamp(min=0)
        lengths = [(x[..., 1] - x[..., 0] + 1).clamp(min=0) for x in (told_BD2, there_BD2)]
        f1_BD = 2 * shared_BD / (lengths[0] + lengths[1]).clamp(min=1)
        exact_BD = (told_BD2 == there_BD2).all(2).float()
        found = torch.stack((exact_BD, f1_BD), 2).masked_fill(~real_BD[..., None], 0.0)
        return loss_B, found.sum(1) * answered.share

    def _first(self, where_BTK: Tensor, inputs: Inputs, count: int) -> Tensor:
        """Return the index in the whole sequence of the first token of each document that is
        marked, [B,D,K]."""
        document_BT, index_BT = inputs.places.document_BT, inputs.places.index_BT
        assert document_BT is not None
        never = torch.iinfo(index_BT.dtype).max // 4
        index = torch.where(where_BTK, index_BT[..., None], never)
        none = index.new_full((len(index), count, index.shape[2]), never)
        of_token = document_BT[..., None].expand_as(index)
        found = none.scatter_reduce(1, of_token, index, "amin")
        return all_reduce(found, self.context, dist.ReduceOp.MIN)

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        exact, f1 = (judged / max(count, 1.0)).tolist()
        return {"exact": exact, "f1": f1}


def _of_documents(x_BDK: Tensor, document_BT: Tensor) -> Tensor:
    """Return for each token the value of its document, [B,T,K]."""
    return x_BDK.gather(1, document_BT[..., None].expand(-1, -1, x_BDK.shape[2]))
