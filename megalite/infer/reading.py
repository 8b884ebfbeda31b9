"""What models with a head for answers are asked: which part of a text answers a question.

A text that is too long is read in windows, each beside the whole question, that overlap by half."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.data.formats import read_answers, text_tokenizer
from megalite.data.tokenizer import HuggingFaceTokenizer
from megalite.errors import ConfigError, DataError
from megalite.infer.encode import logits_of, read_lines, state_batches
from megalite.infer.generate import find_model, load_model
from megalite.infer.references import exact_match, f1
from megalite.models import model_config
from megalite.models.layers import Decoder
from megalite.utils.outside import shown

NUM_ENDS = 20
"""Likeliest starts, and likeliest ends, of a window that are combined, as in BERT's own code."""
LONGEST = 30
"""Most tokens of an answer, as there."""


class Asked(NamedTuple):
    """A question and the text that may answer it."""

    question: str
    context: str
    wanted: tuple[str, ...] | None = None
    """Right answers, of which the best counts; empty: the text does not answer. None: not known."""


class Found(NamedTuple):
    """An answer in a text."""

    text: str
    """Empty where the text does not answer."""
    start: int
    """Character of the text where it starts; -1 where the text does not answer."""
    probability: float
    """Among the likeliest candidates."""

    def shown(self, asked: Asked, as_json: bool) -> str:
        """Return a line that shows it, or an object of JSON."""
        if as_json:
            told = {"question": asked.question, "answer": self.text, "start": self.start}
            return json.dumps(told | {"probability": self.probability})
        return f"{asked.question}\n  {self.text or '(no answer)'}  {self.probability:.3f}"


class Window(NamedTuple):
    """A question with a part of its text, as tokens."""

    number: int
    """Of the question."""
    ids: list[int]
    first: int
    """Token where the part begins."""
    places: Sequence[tuple[int, int]]
    """Characters [start, stop) of the text that each token of the part stands for."""


class Candidate(NamedTuple):
    """A part of a text that may be the answer."""

    score: float
    start: int
    stop: int


class Reader:
    """A model that finds answers and its tokenizer, on one device."""

    def __init__(self, model: Decoder, tokenizer: HuggingFaceTokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.max_positions: int = model.config.max_positions

    @classmethod
    def open(cls, path: Path) -> Reader:
        """Load a run, a checkpoint or a Hugging Face folder. Raise ConfigError for a model without
        a head for answers."""
        folder = find_model(path)
        config = model_config({"hf": str(folder)})
        if config.task != "answers":
            raise ConfigError(
                f"{folder} holds a model of model.task: {config.task}, which finds no answers in texts; training with "
                "model.task: answers gives it a head that does"
            )
        return cls(load_model(folder), text_tokenizer(str(folder)))

    def answer(self, asked: Sequence[Asked], may_be_none: bool = False) -> list[Found]:
        """Return the likeliest answer to each question, none of which is empty unless it
        `may_be_none`. Raise ConfigError for a question that leaves no room for a text."""
        windows = [window for number, x in enumerate(asked) for window in self._windows(number, x)]
        seconds = (
            [window.first for window in windows] if self.model.config.has_token_types else None
        )
        found: list[list[Candidate]] = [[] for _ in asked]
        none = [float("inf")] * len(asked)
        for numbers, _, x_BTD in state_batches(self.model, [w.ids for w in windows], seconds):
            logits_BT2 = logits_of(self.model, x_BTD).cpu()
            for number, logits_T2 in zip(numbers, logits_BT2, strict=True):
                window = windows[number]
                found[window.number] += _candidates(window, logits_T2)
                # No answer: both ends at the first token, in the window where that is unlikeliest.
                none[window.number] = min(none[window.number], logits_T2[0].sum().item())
        return [
            _best(asked[number].context, found[number], none[number] if may_be_none else None)
            for number in range(len(asked))
        ]

    def _windows(self, number: int, asked: Asked) -> list[Window]:
        """Return the windows of a question's text."""
        tokenizer = self.tokenizer
        [(ids, places)] = tokenizer.encode_with_offsets([asked.context])
        before = [
            *tokenizer.begin_ids,
            *tokenizer.encode(asked.question),
            *tokenizer.between_ids,
        ]
        room = self.max_positions - len(before) - len(tokenizer.end_ids)
        if not ids or room < 1:
            what = f"the text of {shown(asked.question)} has no tokens"
            if ids:
                what = (
                    f"{shown(asked.question)} leaves no room for a text: it has {len(before):,} tokens, and the "
                    f"model's max_positions = {self.max_positions:,}"
                )
            raise ConfigError(what)
        # By half, so that every answer shorter than that stands whole in one of the windows.
        step = max(room // 2, 1)
        # As many as reach the end of the text.
        starts = range(0, max(len(ids) - room, 0) + step, step)
        windows = []
        for start in starts:
            here = slice(start, start + room)
            row = [*before, *ids[here], *tokenizer.end_ids]
            windows.append(Window(number, row, len(before), places[here]))
        return windows


def _candidates(window: Window, logits_T2: Tensor) -> list[Candidate]:
    """Return the likeliest answers in a window, given the logits of both ends."""
    logits = logits_T2[window.first : window.first + len(window.places)]
    count = min(NUM_ENDS, len(logits))
    likeliest_starts, likeliest_ends = (logits[:, end].topk(count).indices for end in (0, 1))
    starts, ends = torch.cartesian_prod(likeliest_starts, likeliest_ends).unbind(1)
    # Ends are tokens of the answer themselves.
    is_answer = (starts <= ends) & (ends - starts < LONGEST)
    starts, ends = starts[is_answer], ends[is_answer]
    # Log-probabilities of start and end, but for what all pairs of the window share.
    scores = logits[starts, 0] + logits[ends, 1]
    best = scores.topk(min(NUM_ENDS, len(scores)))
    candidates = []
    for at, score in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        first, last = int(starts[at]), int(ends[at])
        candidates.append(Candidate(score, window.places[first][0], window.places[last][1]))
    return candidates


def _best(context: str, candidates: Sequence[Candidate], none: float | None) -> Found:
    """Return the answer of the highest score. `none` is that of no answer, where there may be
    none."""
    # Windows overlap: a part of the text that is in two counts once.
    # In ascending order of scores, so that the highest one stays.
    unique = {(x.start, x.stop): x for x in sorted(candidates)}
    kept = sorted(unique.values(), reverse=True)[:NUM_ENDS]
    if none is not None:
        kept = sorted([*kept, Candidate(none, -1, -1)], reverse=True)
    if not kept:
        return Found("", -1, 1.0)
    shares = torch.tensor([x.score for x in kept]).softmax(0)
    best = kept[0]
    text = context[best.start : best.stop] if best.start >= 0 else ""
    # Tokens of a byte-level tokenizer begin with the space before them.
    start = best.start + len(text) - len(text.lstrip())
    return Found(text.strip(), start, shares[0].item())


def scores(asked: Sequence[Asked], said: Sequence[str]) -> str:
    """Return a line with SQuAD's exact match and F1 of the answers to questions whose right answers
    are known."""
    known = [
        (x.wanted or ("",), text)
        for x, text in zip(asked, said, strict=True)
        if x.wanted is not None
    ]
    exact = shared = 0.0
    for wanted, text in known:
        exact += exact_match(text, wanted)
        shared += max(f1(text, each) for each in wanted)
    # In percent, as SQuAD's leaderboard has them.
    exact, shared = 100 * exact / len(known), 100 * shared / len(known)
    return (
        f"exact match {exact:.2f}, F1 {shared:.2f}, of {len(known):,} questions with known answers"
    )


def read_asked(files: Sequence[Path]) -> list[Asked]:
    """Return the questions in the rows of .jsonl files, with their answers where they have any.
    Raise DataError that names the file and the line."""
    found = []
    for where, line, row in read_lines(files):
        texts = [row.get(name) for name in ("question", "context")] if isinstance(row, dict) else []
        pair = [text for text in texts if isinstance(text, str) and text.strip()]
        if len(pair) < 2:
            raise DataError(f"{where}: {shown(line)} has no 'question' with a 'context'")
        question, context = pair
        try:
            answers = read_answers(row, context)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        wanted = tuple(text for text, _ in answers) if "answers" in row else None
        found.append(Asked(question, context, wanted))
    return found
