"""Entities in labels of words, against a plain statement of conlleval's rules."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from megalite.comm.mesh import Mesh
from megalite.models.layers import IGNORE, SequenceInfo
from megalite.training.entities import Entities, are_of_entities

LABELS = ["O", *(f"{tag}-{kind}" for tag in "BIES" for kind in ("PER", "LOC"))]


def entities(labels: list[str]) -> set[tuple[str, int, int]]:
    """Kind, first word, and the first word behind: an entity ends where the next begins, and where
    its kind changes."""
    found, start = set(), None
    for place, label in enumerate([*labels, "O"]):
        tag, _, kind = label.partition("-")
        before, _, old = labels[place - 1].partition("-") if place else ("O", "", "")
        if start is not None and (
            before in "ES" or tag in "BSO" or kind != old
        ):  # fmt: skip
            found.add((old, start, place))
            start = None
        if tag != "O" and start is None:
            start = place
    return found


def test_entities_are_counted_as_by_conlleval() -> None:
    """In rows of several texts, with tokens between that have no label."""
    assert entities(["I-PER", "I-PER", "B-PER", "E-LOC"]) == {
        ("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 4)
    }  # fmt: skip
    assert are_of_entities(LABELS)
    assert not are_of_entities(["big", "small"])
    draw = random.Random(0)
    objective = Entities(LABELS, Mesh.alone())
    labels_BT = torch.full((6, 40), IGNORE)
    told_BT = torch.randint(len(LABELS), (6, 40), generator=torch.Generator().manual_seed(0))
    document_BT = torch.zeros(6, 40, dtype=torch.int64)
    wanted = []
    for row in range(6):
        there, told, right = 0, 0, 0
        for document, start in enumerate((0, 11, 25)):
            stop = (11, 25, 40)[document]
            document_BT[row, start:stop] = document
            words = sorted(draw.sample(range(start, stop), 9))
            for word in words:
                # Mostly told rightly, and often one label after another.
                labels_BT[row, word] = draw.choice([0, 1, 2, 3, 4, 3, 4])
                if draw.random() < 0.7:
                    told_BT[row, word] = labels_BT[row, word]
            wholes = [
                entities([LABELS[x] for x in some[row, words].tolist()])
                for some in (labels_BT, told_BT)
            ]
            there, told = there + len(wholes[0]), told + len(wholes[1])
            right += len(wholes[0] & wholes[1])
        wanted.append([there, told, right])
    index = torch.arange(40)[None]
    logits = F.one_hot(told_BT, len(LABELS)).float()
    out: Any = SimpleNamespace(whole=lambda: logits)
    inputs: Any = SimpleNamespace(
        labels_BT=labels_BT, places=SequenceInfo(index, index, document_BT)
    )
    _, counts = objective.judge(out, inputs)
    assert counts[:, -3:].tolist() == wanted
    there, told, right = torch.tensor(wanted).sum(0).tolist()
    assert right > 5
    found = objective.summary(1.0, 10.0, counts.sum(0))
    assert found["entity_f1"] == 2 * right / (there + told)
    assert (found["entity_precision"], found["entity_recall"]) == (right / told, right / there)
