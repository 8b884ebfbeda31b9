"""Find evaluation texts in training data, token by token: `megalite contamination`.

A document of a task is held against the token files by its n-grams (Brown et al. 2020, appendix C, have
13 words): runs of n tokens that stand in one training document. Where they stand, and when a run is
trained on them, its trace tells.

Legend: M = different n-grams of all tasks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megalite.data.indexed import IndexedDataset
from megalite.data.order import Int64s
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError, DataError
from megalite.lineage.ngrams import Asked, Grams
from megalite.lineage.run import TracedRun
from megalite.lineage.trace import Tracer
from megalite.utils.files import replacing

CHUNK = 1 << 21
"""Tokens of a file that are looked at at a time."""
SHOWN = 8
"""Most documents that are told on the console."""
LARGE = 0.8
"""Share of a document's n-grams from which on it counts as known for the most part, as Touvron et
al. 2023 (Llama 2, appendix A.6) take it."""


@dataclass
class Judged:
    """Says how much of a document of a task stands in the training data."""

    task: str
    number: int
    text: str
    num_grams: int
    """N-grams that it has; 0: it is too short to be judged."""
    found: int = 0
    """Those among them that stand in a training document."""
    longest: int = 0
    """Tokens of the longest run in which all n-grams do."""
    source: int = 0
    place: int = -1
    """Where that begins: source and token of its file; -1: nothing was found."""

    @property
    def share(self) -> float:
        return self.found / max(self.num_grams, 1)


def judge(run: TracedRun, asked: Iterable[Asked], length: int) -> list[Judged]:
    """Return how much of each document of tasks stands in the run's training data, by n-grams of
    `length` tokens. Raise ConfigError for a run without a tokenizer."""
    if run.tokenizer is None:
        raise ConfigError("texts are compared as tokens, which needs data.tokenizer in the config")
    documents = list(asked)
    # Rows of one document stay together: whichever of its forms is found, counts for it.
    rows = [_rows_of(run.tokenizer, each.texts) for each in documents]
    grams = Grams(list(itertools.chain.from_iterable(rows)), length)
    source, place = np.full(len(grams), -1), np.full(len(grams), -1)
    for number, each in enumerate(run.mixture.sources):
        _look(each.dataset, grams, number, source, place)
    judged = []
    for document, own in zip(documents, rows, strict=True):
        numbers = [grams.numbers_of(row) for row in own]
        judged.append(_judged(document, numbers, source, place, length))
    return judged


def _rows_of(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Int64s]:
    """Return the token ids of texts, as they begin a document and as they follow a space."""
    # Byte-level BPE has other tokens for a word at the start of a text than behind a space.
    within = [f" {text}" for text in texts if text and not text[0].isspace()]
    return [np.array(ids, np.int64) for ids in tokenizer.encode_batch([*texts, *within])]


def _look(
    dataset: IndexedDataset, grams: Grams, number: int, source: Int64s, place: Int64s
) -> None:
    """Note in `source` and `place`, both [M], where n-grams stand first that were not found yet.
    `number` is that of the source."""
    for first in range(0, dataset.num_tokens, CHUNK):
        # Chunks overlap by one token less than an n-gram: each n-gram lies in exactly one.
        tokens = dataset.read(first, min(first + CHUNK + grams.length - 1, dataset.num_tokens))
        at, gram = grams.find(np.asarray(tokens, np.int64))
        at = at + first
        # What lies across the border of two documents is no text.
        is_whole = dataset.document_starts(at + 1, at + grams.length)[0] == 0
        # `return_index` gives the first place of each n-gram, since `at` ascends.
        gram, index = np.unique(gram[is_whole], return_index=True)
        where = at[is_whole][index]
        is_new = source[gram] < 0
        source[gram[is_new]] = number
        place[gram[is_new]] = where[is_new]


def _judged(
    asked: Asked, numbers: Sequence[Int64s], source: Int64s, place: Int64s, length: int
) -> Judged:
    """Return how much of a document was found. `numbers` are the n-grams of each of its forms; the
    form of which the largest share was found counts."""
    there = [source[own] >= 0 for own in numbers if len(own)]
    text = asked.texts[0]
    if not there:
        return Judged(asked.task, asked.number, text, 0)
    # Of equal shares, that of the longest form says most.
    best = max(there, key=lambda of_form: (of_form.mean(), len(of_form)))
    found = Judged(asked.task, asked.number, text, len(best), int(best.sum()))
    for own in numbers:
        begin = 0
        # One more that is missing ends the last run.
        is_missing = np.append(source[own] < 0, True)
        for end in np.flatnonzero(is_missing).tolist():
            # The n-grams from `begin` to `end` are all there; each reaches one token further.
            num_tokens = end - begin + length - 1
            if end > begin and num_tokens > found.longest:
                found.longest = num_tokens
                found.source, found.place = int(source[own[begin]]), int(place[own[begin]])
            begin = end + 1
    return found


def print_contamination(
    what: Path, asked: Iterable[Asked], length: int, output: Path | None, console: Console
) -> None:
    """Print how much of evaluation texts stands in the training data of a run, or of a config; write
    a line for each document to `output`. Raise ConfigError or DataError."""
    if length < 2:
        raise ConfigError(f"--ngram {length}: at least 2 tokens are needed")
    run = TracedRun.open(what)
    judged = judge(run, asked, length)
    if not judged:
        raise DataError("there is no text to look for")
    console.print(_table_of(judged))
    tracer = Tracer(run)
    known = [each for each in judged if each.found]
    known.sort(key=lambda each: (-each.share, -each.longest))
    for each in known[:SHOWN]:
        told = _record(tracer, each)
        console.print(
            f"{each.task} {each.number}: {each.found:,} of {each.num_grams:,} n-grams, {each.longest:,} tokens in a "
            f"row, from {told['where']}{_when(told)}: {each.text[:60]!r}",
            highlight=False,
            markup=False,
        )
    if output:
        with replacing(output) as temporary, open(temporary, "w", encoding="utf-8") as file:
            for each in judged:
                file.write(json.dumps(_record(tracer, each), ensure_ascii=False) + "\n")


def _table_of(judged: Sequence[Judged]) -> Table:
    """Return a table with a row for each task: how many of its documents were found."""
    table = Table("task", "documents", "judged", "any n-gram", f"{LARGE:.0%} of them", box=None)
    by_task: dict[str, list[Judged]] = {}
    for each in judged:
        by_task.setdefault(each.task, []).append(each)
    for task, own in by_task.items():
        counts = (
            len(own),
            sum(each.num_grams > 0 for each in own),
            sum(each.found > 0 for each in own),
            sum(each.num_grams > 0 and each.share >= LARGE for each in own),
        )
        table.add_row(task, *(f"{count:,}" for count in counts))
    return table


def _when(told: Mapping[str, Any]) -> str:
    """Return when the match is trained on, as part of a sentence."""
    return f", in step {told['first_step']:,} first" if told["first_step"] else ", in no step"


def _record(tracer: Tracer, judged: Judged) -> dict[str, Any]:
    """Return what is known of a document of a task, as JSON."""
    found: dict[str, Any] = {
        "task": judged.task, "document": judged.number, "ngrams": judged.num_grams, "found": judged.found,
        "longest": judged.longest,
    }  # fmt: skip
    if judged.place < 0:
        return found
    dataset = tracer.documents.datasets[judged.source]
    document = dataset.document_of(judged.place)
    origins = tracer.documents.origins(judged.source)
    # The first use alone: uses come in the order of the run.
    use = next(tracer.uses(judged.source, document), None)
    where = f"{dataset.prefix}#{document}"
    return found | {
        "token_file": dataset.prefix,
        "training_document": document,
        "where": str(origins.of(document)) if origins else where,
        "first_step": use.step if use else None,
    }
