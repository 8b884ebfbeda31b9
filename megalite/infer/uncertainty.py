"""Active learning: which rows a model is least certain of. Labelled by people, they teach it more
than rows drawn blindly do (Settles 2009).

Legend: n = rows, K = 1 for a text's class or the number of its words, C = classes, D = hidden
size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.errors import ConfigError
from megalite.infer.answer import Request
from megalite.infer.classify import Classifier, Question, Row, TextVerdict, WordsVerdict
from megalite.infer.encode import state_batches
from megalite.infer.generate import Generator

Measure = Literal["entropy", "margin", "confidence"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
CANDIDATES = 5
"""Rows for each that is wanted, the least certain ones, among which different ones are sought."""
ROWS_AT_ONCE = 256


class Uncertain(NamedTuple):
    """A row, what the model says of it, and how uncertain it is of that."""

    number: int
    """Of the row among those that were given."""
    uncertainty: float
    said: Any
    """A class, classes, labels of words, or an answer."""
    probability: float | None
    """Of what was said, where the model tells it."""


def uncertainty_of(probabilities_KC: Tensor, measure: Measure, is_one: bool) -> float:
    """Return how uncertain a model is that tells these probabilities, on a scale from 0 to 1, as
    the mean over words where there are several.

    entropy: over that of equal probabilities. margin: 1 less the difference of the two likeliest.
    confidence: 1 less the likeliest, over what that is of equal probabilities. Unless one of the
    classes is true (`is_one`), each is a question of its own, and the mean over them is taken."""
    if not is_one:
        # [K, C] becomes [K·C, 2]: yes or no of each class.
        probabilities_KC = torch.stack((probabilities_KC, 1 - probabilities_KC), -1).flatten(0, -2)
    count = probabilities_KC.shape[-1]
    if not len(probabilities_KC) or count < 2:
        return 0.0
    if measure == "entropy":
        # `entr` is −p·log p, and 0 at 0.
        found_K = torch.special.entr(probabilities_KC).sum(-1) / torch.tensor(count).log()
    else:
        best_K2 = probabilities_KC.topk(2).values
        found_K = 1 - (best_K2[:, 0] - best_K2[:, 1])
        if measure == "confidence":
            found_K = (1 - best_K2[:, 0]) / (1 - 1 / count)
    return float(found_K.mean())


def least_certain_texts(
    classifier: Classifier,
    questions: Sequence[Question],
    count: int,
    measure: Measure = "entropy",
    diverse: bool = False,
) -> list[Uncertain]:
    """Return the `count` questions whose classes, or words' labels, the classifier is least certain
    of, the least certain first. With `diverse`, they are chosen among more such that they differ.
    Raise ConfigError for a model that tells numbers, which it does without doubt."""
    if classifier.problem == "regression":
        raise ConfigError("a model of model.problem: regression does not tell how uncertain it is")
    found = []
    for start in range(0, len(questions), ROWS_AT_ONCE):
        some = questions[start : start + ROWS_AT_ONCE]
        rows = [classifier.row(x, classifier.max_positions) for x in some]
        for at, logits_TC in classifier.logits(rows):
            said = classifier.verdict(some[at], rows[at], logits_TC)
            probabilities_KC = _probabilities(classifier, rows[at], logits_TC)
            uncertainty = uncertainty_of(
                probabilities_KC, measure, classifier.problem == "single_label"
            )
            found.append(Uncertain(start + at, uncertainty, *_told(said)))
    found.sort(key=lambda each: (-each.uncertainty, each.number))
    if diverse and len(found) > count:
        # Among the least certain ones only: what is farthest of all may be known well.
        found = found[: CANDIDATES * count]
        vectors_nD = _vectors(classifier, [questions[each.number] for each in found])
        chosen = farthest_first(vectors_nD, count)
        found = [found[number] for number in sorted(chosen)]
    return found[:count]


def _probabilities(classifier: Classifier, row: Row, logits_TC: Tensor) -> Tensor:
    """Return the probabilities of a text's classes, or of the labels of each of its words, [K, C]."""
    if classifier.task == "labels":
        assert row.words is not None
        return logits_TC[row.words.nonzero()[:, 0]].softmax(-1)
    is_one = classifier.problem == "single_label"
    return logits_TC[:1].softmax(-1) if is_one else logits_TC[:1].sigmoid()


def _told(verdict: TextVerdict | WordsVerdict) -> tuple[Any, float | None]:
    """Return what a verdict says, and its probability."""
    if isinstance(verdict, WordsVerdict):
        # Of the word that is told least surely; a word without a token has no label.
        known = [x for x, label in zip(verdict.scores, verdict.labels, strict=True) if label]
        return verdict.labels, min(known, default=None)
    if isinstance(verdict.label, str):
        return verdict.label, verdict.scores[verdict.label]
    return verdict.label, None


def _vectors(classifier: Classifier, questions: Sequence[Question]) -> Tensor:
    """Return the mean of each question's final hidden states, of length 1, [n, D]."""
    rows = [classifier.row(x, classifier.max_positions).ids for x in questions]
    vectors_nD = torch.zeros(len(rows), classifier.model.config.hidden_size)
    for numbers, _, x_BTD in state_batches(classifier.model, rows):
        states_BTD = classifier.model.final_states(x_BTD).float().cpu()
        for number, states_TD in zip(numbers, states_BTD, strict=True):
            vectors_nD[number] = states_TD[: len(rows[number])].mean(0)
    return F.normalize(vectors_nD)


def farthest_first(vectors_nD: Tensor, count: int) -> list[int]:
    """Return the numbers of `count` vectors, the first one and then always the one that is farthest
    from all that were chosen (Gonzalez 1985; Sener and Savarese 2018)."""
    chosen = [0]
    nearest_n = (vectors_nD - vectors_nD[0]).norm(dim=-1)
    while len(chosen) < min(count, len(vectors_nD)):
        nearest_n[chosen[-1]] = -1.0  # of equal vectors each is chosen once
        chosen.append(int(nearest_n.argmax()))
        nearest_n = torch.minimum(nearest_n, (vectors_nD - vectors_nD[chosen[-1]]).norm(dim=-1))
    return chosen


def least_certain_answers(
    generator: Generator, requests: Sequence[Request], count: int
) -> list[Uncertain]:
    """Return the `count` requests whose answers surprise the generator itself most, by their mean
    surprisal: nats per token that it says. Answers that say nothing are left out: of them nothing
    can be corrected. Raise ConfigError for a prompt that is too long."""
    # 0: the chosen tokens' log probabilities alone, without any alternatives.
    answers = generator.answer([replace(request, num_logprobs=0) for request in requests])
    found = []
    for number, answer in enumerate(answers):
        if answer.choices and answer.text.strip():
            surprisal = -sum(x.logprob for x in answer.choices) / len(answer.choices)
            found.append(Uncertain(number, surprisal, answer.text, None))
    found.sort(key=lambda each: (-each.uncertainty, each.number))
    return found[:count]
