"""What models with a classification head are asked: the class of a text or of a pair of texts, its
classes, a number for it, or the label of each of its words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalite.data.formats import FIRST_TEXTS, SECOND_TEXTS, text_tokenizer
from megalite.data.token_values import Part, Text, token_values
from megalite.data.tokenizer import HuggingFaceTokenizer
from megalite.errors import ConfigError, DataError
from megalite.infer.batch import NoRoom
from megalite.infer.encode import logits_of, read_lines, state_batches
from megalite.infer.generate import find_model, load_model
from megalite.models import model_config
from megalite.models.layers import Decoder
from megalite.utils.outside import shown

TASKS = ("classification", "labels")
WORDS = ("tokens", "words")
LABEL_NAMES = {"single_label": "label", "multi_label": "labels", "regression": "score"}
"""Fields of a row that hold what is told of a text, by the problem."""
AT_A_TIME = 4096
"""Texts that are sorted by their lengths, and told, together."""


class Question(NamedTuple):
    """A text, or two."""

    text: str
    pair: str = ""
    words: tuple[str, ...] = ()
    """The text's words, where these have labels; empty: what white space divides."""

    @property
    def tokens(self) -> list[str]:
        """Return the words that have labels."""
        return [*self.words] or self.text.split()


class Row(NamedTuple):
    """Tokens of a question, between those that the tokenizer puts around a text."""

    ids: list[int]
    second: int
    """Where a second text begins; the number of tokens where there is none."""
    words: Tensor | None = None
    """[T], 1 + number of the word that each first token begins; 0 elsewhere."""


class TextVerdict(NamedTuple):
    """What a model tells of a text."""

    label: str | list[str] | float
    """Its class, its classes, or its number."""
    scores: dict[str, float]
    """Probability of each class, the likeliest first; empty for a number."""


class WordsVerdict(NamedTuple):
    """What a model tells of the words of a text."""

    tokens: list[str]
    labels: list[str | None]
    """None for a word of which the tokenizer makes no token."""
    scores: list[float]
    """Probability of each label."""


class Classifier:
    """A model with a classification head and its tokenizer, on one device: an encoder, or a decoder
    that tells a text's class at its last token."""

    def __init__(self, model: Decoder, tokenizer: HuggingFaceTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.labels: tuple[str, ...] = model.config.labels
        self.task, self.problem = model.config.task, model.config.problem
        self.max_positions: int = model.config.max_positions

    @classmethod
    def open(cls, path: Path) -> Classifier:
        """Load a run, a checkpoint or a Hugging Face folder. Raise ConfigError for a model without
        a classification head."""
        folder = find_model(path)
        config = model_config({"hf": str(folder)})
        if config.task not in TASKS:
            raise ConfigError(
                f"{folder} holds a model of model.task: {config.task}, which tells no classes; training with "
                "model.task: classification or labels gives it a head that does"
            )
        return cls(load_model(folder), text_tokenizer(str(folder)))

    def classify(self, questions: Sequence[Question]) -> Iterator[TextVerdict | WordsVerdict]:
        """Yield what the model tells of each question, in their order. Texts of one class or number
        are cut at max_positions, the second of two first. Raise ConfigError for words that are more
        than fit, or a text without tokens."""
        for start in range(0, len(questions), AT_A_TIME):
            some = questions[start : start + AT_A_TIME]
            yield from self.classify_rows(some, [self.row(x, self.max_positions) for x in some])

    def row(self, question: Question, longest: int | None = None) -> Row:
        """Return the tokens of a question as training has them, cut at `longest` unless its words
        have labels. Raise ConfigError for one without tokens, and NoRoom for one that is longer
        than the model's max_positions."""
        row = (
            self._row_of_words(question) if self.task == "labels" else self._row(question, longest)
        )
        if not row.ids:
            raise ConfigError(f"{shown(question.text)} has no tokens")
        if len(row.ids) > self.max_positions:
            raise NoRoom(
                f"{shown(question.text)} has {len(row.ids):,} tokens, but the model's max_positions = "
                f"{self.max_positions:,}"
            )
        return row

    def _row(self, question: Question, longest: int | None) -> Row:
        tokenizer, end = self.tokenizer, self.tokenizer.end_ids
        most = None if longest is None else longest - len(end)
        ids = [*tokenizer.begin_ids, *tokenizer.encode(question.text)]
        if not question.pair:
            ids = [*ids[:most], *end]
            return Row(ids, len(ids))
        # The second text is cut first: what is left of the first one stands before it.
        first = [*ids, *tokenizer.between_ids][:most]
        both = [*first, *tokenizer.encode(question.pair)][:most]
        return Row([*both, *end], len(first))

    def _row_of_words(self, question: Question) -> Row:
        if question.pair:
            raise ConfigError(f"{shown(question.pair)}: words of a second text have no labels")
        # As rows of words are put together for training. Words count from 1: 0 is no word's.
        text, parts, place = " ".join(question.tokens), [], 0
        for number, word in enumerate(question.tokens, 1):
            parts.append(Part(place, place + len(word), number))
            place += len(word) + 1  # and the space behind it
        ids, values = token_values(self.tokenizer, Text(text, parts, first_only=True))
        begin, end = self.tokenizer.begin_ids, self.tokenizer.end_ids
        count = len(begin) + len(ids) + len(end)
        held = torch.zeros(count, dtype=torch.int64)
        held[len(begin) : len(begin) + len(ids)] = torch.from_numpy(values)
        return Row([*begin, *ids, *end], count, held)

    def classify_rows(
        self, questions: Sequence[Question], rows: Sequence[Row]
    ) -> list[TextVerdict | WordsVerdict]:
        """Return what the model tells of questions, given the `row` of each."""
        # Batches come by length, not in the order of the rows.
        found = {}
        for number, logits_TC in self.logits(rows):
            found[number] = self.verdict(questions[number], rows[number], logits_TC)
        return [found[number] for number in range(len(rows))]

    def logits(self, rows: Sequence[Row]) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each row, in any order, with the logits of the text's classes, [1,C],
        or of the labels of its tokens and of what the batch is padded with, [T,C]; fp32."""
        config = self.model.config
        seconds = [row.second for row in rows] if config.has_token_types else None
        for numbers, _, x_BTD in state_batches(self.model, [row.ids for row in rows], seconds):
            if self.task == "classification":
                # Of a decoder only the last token has seen all of the text.
                at_B = [0 if config.CLASS_AT == "first" else len(rows[n].ids) - 1 for n in numbers]
                x_BTD = x_BTD[torch.arange(len(numbers)), at_B][:, None]
            logits_BTC = logits_of(self.model, x_BTD).cpu()
            yield from zip(numbers, logits_BTC, strict=True)

    def verdict(
        self, question: Question, row: Row, logits_TC: Tensor
    ) -> TextVerdict | WordsVerdict:
        """Return what `logits` say of a question."""
        if self.task == "classification":
            return self._of_text(logits_TC[0])
        return self._of_words(question, row, logits_TC)

    def _of_text(self, logits_C: Tensor) -> TextVerdict:
        if self.problem == "regression":
            return TextVerdict(logits_C[0].item(), {})
        is_one = self.problem == "single_label"
        shares = (logits_C.softmax(0) if is_one else logits_C.sigmoid()).tolist()
        # Stable: of equal ones the first.
        order = sorted(range(len(shares)), key=lambda number: -shares[number])
        scores = {self.labels[number]: shares[number] for number in order}
        # A class that is as likely as not is not told, as in validation: logits above 0.
        told = [
            name for name, logit in zip(self.labels, logits_C.tolist(), strict=True) if logit > 0
        ]
        return TextVerdict(self.labels[order[0]] if is_one else told, scores)

    def _of_words(self, question: Question, row: Row, logits_TC: Tensor) -> WordsVerdict:
        assert row.words is not None
        tokens = question.tokens
        labels: list[str | None] = [None] * len(tokens)
        scores = [0.0] * len(tokens)
        best = logits_TC[: len(row.ids)].softmax(-1).max(-1)
        # A word's label is that of its first token; the others were not learned from.
        for place in row.words.nonzero()[:, 0].tolist():
            word = int(row.words[place]) - 1
            labels[word] = self.labels[int(best.indices[place])]
            scores[word] = best.values[place].item()
        return WordsVerdict(tokens, labels, scores)

    def shown(
        self, question: Question, verdict: TextVerdict | WordsVerdict, most: int, as_json: bool
    ) -> str:
        """Return lines that show a verdict, with the scores of at most so many classes, or a row of
        JSON as `preprocess_data.py` takes it, with the scores beside what is told."""
        if isinstance(verdict, WordsVerdict):
            if as_json:
                return json.dumps(verdict._asdict())
            told = []
            for word, label in zip(verdict.tokens, verdict.labels, strict=True):
                told.append(word if label is None else f"{word}/{label}")
            return "  ".join(told)
        scores = dict([*verdict.scores.items()][:most])
        if as_json:
            texts = {"text": question.text, "text_pair": question.pair or None}
            row = texts | {LABEL_NAMES[self.problem]: verdict.label, "scores": scores or None}
            return json.dumps({name: value for name, value in row.items() if value is not None})
        asked = "\n".join(filter(None, (question.text, question.pair)))
        shares = "  ".join(f"{name} {share:.3f}" for name, share in scores.items())
        return f"{asked}\n  {shares or f'{self.labels[0]} {verdict.label:.4f}'}"


def read_questions(files: Sequence[Path]) -> list[Question]:
    """Return the questions in files: the lines of each, or the rows of a .jsonl, whose labels are
    not looked at. Raise DataError that names the file and the line."""
    found = []
    for where, line, row in read_lines(files):
        question = Question(row) if isinstance(row, str) else question_of(row)
        if question is None:
            raise DataError(f"{where}: {shown(line)} has neither a 'text' nor a list of 'tokens'")
        found.append(question)
    return found


def question_of(row: Any) -> Question | None:
    """Return the question in a row of labelled data; None if there is none."""
    if not isinstance(row, Mapping):
        return None
    words = _first_of(row, WORDS)
    if words is not None:
        is_list = isinstance(words, list) and bool(words)
        sound = is_list and all(isinstance(word, str) and word for word in words)
        return Question(" ".join(words), words=tuple(words)) if sound else None
    text, pair = _first_of(row, FIRST_TEXTS), _first_of(row, SECOND_TEXTS)
    if pair is None:
        pair = ""
    sound = isinstance(text, str) and isinstance(pair, str) and bool(text)
    return Question(text, pair) if sound else None


def _first_of(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the first of these fields of a row that it has; None where it has none of them."""
    return next((row[name] for name in names if row.get(name) is not None), None)
