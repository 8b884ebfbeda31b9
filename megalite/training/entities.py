"""Entities in the labels of words: spans such as names of persons, whose words have the labels
B-PER, I-PER, … and all others O."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.kernels.loss import IGNORE, LossTerms
from megalite.parallel.outputs import VocabShards
from megalite.parallel.stage import Inputs
from megalite.training.objectives import Classes

LABEL = re.compile(r"([BIES])-(.+)")
OUTSIDE = "O"


def are_of_entities(labels: Sequence[str]) -> bool:
    """Return whether the names of labels are those of entities."""
    return OUTSIDE in labels and all(x == OUTSIDE or LABEL.fullmatch(x) for x in labels)


class Entities(Classes):
    """Cross-entropy of the labels of words. Validation also counts the entities that are there, are
    told, and are told rightly: of the same kind, from the same first to the same last word, as
    seqeval counts them by default."""

    def __init__(self, labels: Sequence[str], mesh: Mesh, terms: LossTerms | None = None):
        super().__init__(len(labels), terms)
        self.num_judged += 3
        self.mesh = mesh
        matches = map(LABEL.fullmatch, labels)
        parts = [match.groups() if match else (OUTSIDE, "") for match in matches]
        kinds = sorted({kind for _, kind in parts})
        tag_of = [ord(tag) for tag, _ in parts]
        kind_of = [kinds.index(kind) for _, kind in parts]
        self._tags = torch.tensor(tag_of, device=mesh.device)
        self._kinds = torch.tensor(kind_of, device=mesh.device)

    def judge(self, out: VocabShards, inputs: Inputs) -> tuple[Tensor, Tensor]:
        losses_B, counts = super().judge(out, inputs)
        labels_BT, places = inputs.labels_BT, inputs.places
        assert labels_BT is not None
        document_BT = places.document_BT
        document_BT = torch.zeros_like(labels_BT) if document_BT is None else document_BT
        # Spans may go on from one context rank's part of a sequence to another's.
        wholes = [
            self._whole(x, places.index_BT)
            for x in (labels_BT - IGNORE, out.whole().argmax(2), document_BT)
        ]
        labels_BT, told_BT, document_BT = wholes[0] + IGNORE, *wholes[1:]
        found = self._count(labels_BT, told_BT, document_BT)
        # Context ranks all know whole sequences: one of them counts.
        return losses_B, torch.cat((counts, found * (self.mesh.context.rank == 0)), 1)

    def _whole(self, x_BT: Tensor, index_BT: Tensor) -> Tensor:
        """Return whole sequences from this context rank's part of them."""
        length = x_BT.shape[1] * self.mesh.context.size
        whole = x_BT.new_zeros(len(x_BT), length).scatter(1, index_BT.expand_as(x_BT), x_BT)
        return all_reduce(whole, self.mesh.context)

    def _count(self, labels_BT: Tensor, told_BT: Tensor, document_BT: Tensor) -> Tensor:
        """Return of each row how many entities are there, are told, and are told rightly: fp32
        [B,3]."""
        is_word = labels_BT != IGNORE
        # Words one after another, N of them, and where another text begins.
        row_N = is_word.nonzero()[:, 0]
        text_N = row_N * (document_BT.max() + 1) + document_BT[is_word]
        begins_N = torch.ones_like(text_N, dtype=torch.bool)
        begins_N[1:] = text_N[1:] != text_N[:-1]
        there_N, kind_N, end_N = self._spans(labels_BT[is_word], begins_N)
        told_N, told_kind_N, told_end_N = self._spans(told_BT[is_word], begins_N)
        right_N = there_N & told_N & (kind_N == told_kind_N) & (end_N == told_end_N)
        counts = labels_BT.new_zeros(len(labels_BT), 3, dtype=torch.float32)
        found_N3 = torch.stack((there_N, told_N, right_N), 1)
        return counts.index_add(0, row_N, found_N3.to(counts.dtype))

    def _spans(self, labels_N: Tensor, begins_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each word whether an entity begins with it, its kind, and the number of the
        first word behind an entity that begins with it: [N] each."""
        tag, kind = self._tags[labels_N], self._kinds[labels_N]
        before = torch.cat((tag[:1], tag[:-1])).masked_fill(begins_N, ord(OUTSIDE))
        kind_before = torch.cat((kind[:1], kind[:-1]))
        is_inside, was_inside = tag != ord(OUTSIDE), before != ord(OUTSIDE)
        changes = kind != kind_before
        had_ended = _in(before, "ES")
        goes_in = _in(tag, "EI") & (had_ended | ~was_inside)
        starts = is_inside & (_in(tag, "BS") | goes_in | changes)
        goes_out = _in(before, "BI") & _in(tag, "BSO")
        ends = was_inside & (had_ended | goes_out | changes)
        # An entity ends where its text does.
        ends = ends | begins_N
        count = len(labels_N)
        index = torch.arange(count, device=tag.device)
        last = index.new_full((1,), count)
        end_at = torch.cat((index.masked_fill(~ends, count), last))
        # The nearest end from here on: the smallest index behind.
        nearest = end_at.flip(0).cummin(0).values.flip(0)
        return starts, kind, nearest[1:]

    def summary(self, loss: float, count: float, judged: Tensor) -> dict[str, float]:
        there, told, right = judged[-3:].double().tolist()
        scores = {
            "entity_f1": 2 * right / max(there + told, 1.0),
            "entity_precision": right / max(told, 1.0),
            "entity_recall": right / max(there, 1.0),
        }
        return super().summary(loss, count, judged[:-3]) | scores


def _in(tags: Tensor, letters: str) -> Tensor:
    """Return which tags are one of the letters."""
    return torch.isin(tags, torch.tensor([ord(letter) for letter in letters], device=tags.device))
