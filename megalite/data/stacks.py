"""What an encoder and a decoder see of a sample: a source, and a target that follows from it.

Legend: n = samples asked for, R = tokens read for a sample, S and T = tokens of the encoder and of
the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megalite.config import Lengths
from megalite.data.dataset import Windows
from megalite.data.order import Int64s
from megalite.kernels.loss import IGNORE
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of


class Stacks(NamedTuple):
    """Holds what both stacks see of n samples."""

    source: Int64s  # [n, S]
    tokens: Int64s  # [n, T]
    labels: Int64s  # [n, T], the token that follows each; IGNORE where none is to be predicted
    source_documents: Int64s | None = (
        None  # [n, S] and [n, T], document of each token; None: one document
    )
    documents: Int64s | None = None


def num_hidden(count: int, density: float, mean_length: float | None) -> tuple[int, int]:
    """Return how many of `count` tokens are hidden, a share of `density`, and in how many spans; in
    none, but behind the others, where `mean_length` is None."""
    hidden = min(max(round(count * density), 1), count - 1)
    if mean_length is None:
        return hidden, 0
    # There is text before each span.
    return hidden, min(max(round(hidden / mean_length), 1), count - hidden)


def lengths_of(read: int, density: float, mean_length: float | None) -> Lengths:
    """Return how many tokens both stacks see of `read`; both end with the end token."""
    hidden, spans = num_hidden(read, density, mean_length)
    return Lengths(read, read - hidden + spans + 1, hidden + spans + 1)


def span_lengths(source: int, density: float, mean_length: float | None) -> Lengths:
    """Return how many tokens must be read for an encoder of `source` tokens, and how many the
    decoder then has: T5's `random_spans_helper`."""
    read = 2
    # One token more adds at most one.
    while lengths_of(read + 1, density, mean_length).source <= source:
        read += 1
    return lengths_of(read, density, mean_length)


class SpanCorruption:
    """Hides spans of the text behind sentinels, for the decoder to tell (Raffel et al. 2020): the
    source is the text with a sentinel in place of each span, the target each sentinel with its span
    behind it. Which spans these are is a function of the sample's number alone."""

    def __init__(
        self, lengths: Lengths, density: float, mean_length: float, sentinels: Sequence[int], start: int, end: int,
        key: int,
    ):  # fmt: skip
        """Take the ids of `sentinels` in the order of the spans, of the token that a target begins
        with, and of the `end` of both; `key` is of the run and the split."""
        self.lengths, self.start, self.end, self.key = lengths, start, end, key
        self._hidden, self._spans = num_hidden(lengths.read, density, mean_length)
        self._sentinels = np.array(sentinels[: self._spans], np.int64)
        self._identity = [
            "spans",
            density,
            mean_length,
            *map(int, self._sentinels),
            start,
            end,
            key,
        ]

    def apply(self, windows: Windows, index: Int64s) -> Stacks:
        """Return what the stacks see of `windows`, which are full; `index` [n] are the numbers of
        the samples."""
        count, (read, source, target) = len(index), self.lengths
        tokens = windows.tokens[:, :read]
        ends = (
            self._parts(read - self._hidden, "shown", index),
            self._parts(self._hidden, "hidden", index),
        )
        # Text and spans take turns: numbers of them, and where each begins.
        both = np.stack(ends, 2).reshape(count, -1)
        first = np.cumsum(both, 1) - both
        turn = np.zeros((count, read), np.int64)
        np.put_along_axis(turn, first[:, 1:], 1, 1)
        turn = np.cumsum(turn, 1)
        is_hidden, span = turn % 2 == 1, turn // 2
        numbers = np.arange(self._spans)
        inputs, labels = (np.full((count, length), self.end) for length in (source, target))
        # Each sentinel stands behind the text before it, and in the target before its span.
        self._place(inputs, tokens, ~is_hidden, span, np.cumsum(ends[0], 1) + numbers, before=0)
        self._place(
            labels, tokens, is_hidden, span, np.cumsum(ends[1], 1) - ends[1] + numbers, before=1
        )
        return Stacks(inputs, shifted(labels, self.start), labels)

    def _parts(self, total: int, what: str, index: Int64s) -> Int64s:
        """Return the sizes of as many parts as there are spans, each of at least one token, that
        make up `total`; all ways to cut are equally likely: [n, spans]."""
        places = torch.from_numpy(index)[:, None] * total + torch.arange(total - 1)
        drawn = random_bits(key_of(self.key, what), places).numpy()
        # The places of the smallest of random numbers: a set of so many, each set as likely.
        cuts = np.sort(np.argsort(drawn, 1, kind="stable")[:, : self._spans - 1], 1) + 1
        edges = np.pad(cuts, ((0, 0), (1, 1)))
        edges[:, -1] = total
        return np.diff(edges, axis=1)

    def _place(
        self,
        into: Int64s,
        tokens: Int64s,
        taken: npt.NDArray[np.bool_],
        span: Int64s,
        sentinels: Int64s,
        before: int,
    ) -> None:
        """Write the tokens that are `taken`, and the sentinels at their places [n, spans], into
        `into`. As many sentinels stand before a token as spans do before it, and `before` more."""
        at = np.cumsum(taken, 1) - 1 + span + before
        row, place = np.nonzero(taken)
        into[row, at[row, place]] = tokens[row, place]
        np.put_along_axis(into, sentinels, np.broadcast_to(self._sentinels, sentinels.shape), 1)

    def identity(self) -> list[Any]:
        """Return what decides what it does, for a fingerprint."""
        return self._identity


class PrefixLM:
    """Gives the first part of the text to the encoder, for the decoder to go on with; both end with
    the end token."""

    def __init__(self, lengths: Lengths, start: int, end: int):
        """Take the ids of the token that a target begins with, and of the `end` of both."""
        self.lengths, self.start, self.end = lengths, start, end

    def apply(self, windows: Windows, index: Int64s) -> Stacks:
        """Return what the stacks see of `windows`, which are full."""
        read, source, _ = self.lengths
        sides = windows.tokens[:, : source - 1], windows.tokens[:, source - 1 : read]
        inputs, labels = (np.pad(x, ((0, 0), (0, 1)), constant_values=self.end) for x in sides)
        return Stacks(inputs, shifted(labels, self.start), labels)

    def identity(self) -> list[Any]:
        """Return what decides what it does, for a fingerprint."""
        return ["prefix", *self.lengths, self.start, self.end]


class Part(NamedTuple):
    """One of the things that are done to a text."""

    apply: SpanCorruption | PrefixLM
    share: float
    """How often it is done, beside the others'."""
    mode: int | None = None
    """Token that its sources begin with. None: none does."""


class Denoisers:
    """Does to each sample one of several things (UL2, Tay et al. 2022). Which one is a function of
    the sample's number alone. All read as many tokens; what they leave of the stacks is padding."""

    def __init__(self, lengths: Lengths, parts: Sequence[Part], start: int, key: int):
        """Take the `lengths` that all `parts` fit into, and the id of the token that a target
        begins with; `key` is of the run and the split."""
        self.lengths, self.parts, self.start, self.key = lengths, parts, start, key
        self._until = np.cumsum([part.share for part in parts]) / sum(part.share for part in parts)

    def apply(self, windows: Windows, index: Int64s) -> Stacks:
        """Return what the stacks see of `windows`, which are full; `index` [n] are the numbers of
        the samples."""
        _, source, target = self.lengths
        of_sources, of_targets = (len(index), source), (len(index), target)
        sources, tokens = np.full(of_sources, self.start), np.full(of_targets, self.start)
        labels = np.full(of_targets, IGNORE)
        # Padding is a document of its own, on both sides.
        source_documents = np.ones(of_sources, np.int64)
        documents = np.ones(of_targets, np.int64)
        which = self._drawn(index)
        for number in np.unique(which).tolist():
            part, rows = self.parts[number], np.flatnonzero(which == number)
            some = Windows(windows.tokens[rows], windows.filled[rows], None)
            found = part.apply.apply(some, index[rows])
            begin = 0
            if part.mode is not None:
                sources[rows, 0], begin = part.mode, 1
            end = begin + found.source.shape[1]
            sources[rows, begin:end] = found.source
            source_documents[rows, :end] = 0
            end = found.labels.shape[1]
            tokens[rows, :end] = found.tokens
            labels[rows, :end] = found.labels
            documents[rows, :end] = 0
        return Stacks(sources, tokens, labels, source_documents, documents)

    def _drawn(self, index: Int64s) -> Int64s:
        """Return the number of the part that is done to each sample, [n]."""
        drawn = uniform(key_of(self.key, "denoiser"), torch.from_numpy(index)).numpy()
        which = np.searchsorted(self._until, drawn, side="right")
        return np.minimum(which, len(self.parts) - 1)

    def identity(self) -> list[Any]:
        """Return what decides what it does, for a fingerprint."""
        parts = [[*part.apply.identity(), part.share, part.mode] for part in self.parts]
        return ["denoisers", *self.lengths, self.start, self.key, *parts]


class SourceAndTarget:
    """Takes rows of labelled data apart: what is learned of a row is its target, and what stands
    before it its source. Rows lie side by side in both stacks, and see each other in neither."""

    def __init__(self, lengths: Lengths, start: int):
        """`start` is the id of the token that a target begins with."""
        self.lengths, self.start = lengths, start

    def apply(self, windows: Windows, index: Int64s) -> Stacks:
        """Return what the stacks see of `windows`, in which both sides of all rows have room."""
        tokens, filled, documents, mask, _ = windows
        assert documents is not None
        assert mask is not None
        is_there = np.arange(tokens.shape[1]) < filled[:, None]
        # What follows the rows counts as one document more, on both sides.
        rest = np.where(
            filled > 0,
            np.take_along_axis(documents, np.maximum(filled - 1, 0)[:, None], 1)[:, 0] + 1,
            0,
        )
        source, of_source = self._side(
            self.lengths.source, tokens, documents, is_there & (mask == 0), 0, rest
        )
        labels, of_target = self._side(
            self.lengths.target, tokens, documents, is_there & (mask > 0), IGNORE, rest
        )
        begins = np.diff(of_target, axis=1, prepend=-1) != 0
        inputs = np.where(begins, self.start, shifted(labels, self.start))
        return Stacks(
            source, np.where(labels == IGNORE, self.start, inputs), labels, of_source, of_target
        )

    def _side(
        self,
        length: int,
        tokens: Int64s,
        documents: Int64s,
        taken: npt.NDArray[np.bool_],
        fill: int,
        rest: Int64s,
    ) -> tuple[Int64s, Int64s]:
        """Return the tokens that are `taken`, moved together and filled up to `length`, and their
        documents."""
        row, place = np.nonzero(taken)
        at = (np.cumsum(taken, 1) - 1)[row, place]
        found = np.full((len(tokens), length), fill)
        of_document = np.repeat(rest[:, None], length, 1)
        found[row, at], of_document[row, at] = tokens[row, place], documents[row, place]
        return found, of_document

    def identity(self) -> list[Any]:
        """Return what decides what it does, for a fingerprint."""
        return ["source and target", *self.lengths, self.start]


Views = SpanCorruption | PrefixLM | Denoisers | SourceAndTarget
"""What makes a source and a target of tokens."""


def shifted(labels: Int64s, start: int) -> Int64s:
    """Return the decoder's inputs [n, T]: `start`, and behind it the labels but the last."""
    return np.concatenate([np.full_like(labels[:, :1], start), labels[:, :-1]], 1)
