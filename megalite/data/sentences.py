"""Put sentences together to pairs of which a model tells whether the second follows the first:
next-sentence prediction (BERT, Devlin et al. 2019), or their order (ALBERT, Lan et al. 2020; what
Megatron-LM's BERT does).

Legend: n = samples asked for, S = spans of sentences, each of one document."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import numpy as np
import torch

from megalite.data.dataset import Pieces, Windows
from megalite.data.indexed import IndexedDataset
from megalite.data.order import Int64s
from megalite.data.packing import best_fit
from megalite.errors import DataError
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of

Kind = Literal["nsp", "sop"]
IN_ORDER, NOT_IN_ORDER = 2, 3
"""What the mask says at a pair's first token; 1 elsewhere."""
NUM_SPECIAL = 3
"""[CLS] A [SEP] B [SEP]."""


class Specials(NamedTuple):
    """Ids of the tokens around the texts of a pair."""

    begin: int
    end: int


class SentencePairs:
    """Makes pairs of the sentences of documents [first, last) of a dataset, and packs them.

    As many whole sentences of a document as fill a sample are a span, of two at least, as in
    Megatron-LM. A pair is a span cut in two between sentences; for "sop" the parts are swapped in
    half of them, for "nsp" half have another document's sentences as the second. What is chosen is a
    function of the seed, the span and the epoch. Raises DataError for a file without the borders of
    sentences, and for one that leaves no pairs."""

    seq_length: int

    def __init__(
        self,
        dataset: IndexedDataset,
        first: int,
        last: int,
        seq_length: int,
        kind: Kind,
        specials: Specials,
        key: int,
    ):
        if not 0 <= first < last <= dataset.num_documents:
            raise DataError(
                f"documents [{first}, {last}) are none of the {dataset.num_documents} there are"
            )
        if dataset.num_sequences == dataset.num_documents:
            raise DataError(
                f"{dataset.prefix} has no borders of sentences, which objective.sentences needs: make it with "
                "`megalite preprocess --split-sentences`"
            )
        if dataset.removed is not None:
            raise DataError(
                f"{dataset.prefix}.removed takes documents out, which objective.sentences does not know"
            )
        self.dataset, self.seq_length, self.kind, self._specials = (
            dataset,
            seq_length,
            kind,
            specials,
        )
        self._key, self._part = key, (first, last)
        sequences = np.array(dataset._documents[first : last + 1], np.int64)
        low, high = int(sequences[0]), int(sequences[-1])
        lengths = dataset.lengths(low, high).astype(np.int64)
        self._starts = dataset.token_of_sequence(low) + np.append(0, np.cumsum(lengths))
        room = seq_length - NUM_SPECIAL
        if room < 2:
            raise DataError(f"data.seq_length {seq_length} has no room for two sentences")
        spans = _spans(self._starts, (sequences - low).tolist(), room)
        table = np.array(spans, np.int64).reshape(-1, 3)
        self._first, self._last, self._document = table[:, 0], table[:, 1], table[:, 2]
        others = np.unique(self._document)
        if len(others) < (2 if kind == "nsp" else 1):
            raise DataError(
                f"{dataset.prefix}: of {last - first:,} documents {len(others):,} have two sentences, which is too few"
            )
        sizes = self._starts[self._last] - self._starts[self._first]
        self._packing = best_fit(np.minimum(sizes, room) + NUM_SPECIAL, seq_length)
        self.num_samples = len(self._packing.first_piece) - 1

    def _spans_of(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Return the spans of `samples` [n]: the row of each, 0 … n - 1, and its number."""
        first, last = self._packing.first_piece[samples], self._packing.first_piece[samples + 1]
        row = np.repeat(np.arange(len(samples)), last - first)
        within = np.arange(len(row)) - np.repeat(
            np.cumsum(last - first) - (last - first), last - first
        )
        pieces = np.repeat(first, last - first) + within
        return row, self._packing.document[pieces].astype(np.int64)

    def pieces(self, samples: Int64s, by_document: bool) -> Pieces:
        """Return the spans that pairs of `samples` begin with; see `SampleSource`. What stands in a
        pair of another document, and special tokens, are not among them."""
        row, span = self._spans_of(samples)
        start = self._starts[self._first[span]]
        length = self._starts[self._last[span]] - start
        return Pieces(row, start, np.minimum(length, self.seq_length - NUM_SPECIAL))

    def samples_with(self, start: int, stop: int) -> Int64s:
        begin, end = self._starts[self._first], self._starts[self._last]
        spans = (begin < stop) & (end > start)
        found = np.flatnonzero(spans[self._packing.document])
        return np.unique(np.searchsorted(self._packing.first_piece, found, side="right") - 1)

    def fingerprint(self) -> str:
        first, last = self._part
        return (
            f"{self.dataset.fingerprint()}{self.kind}[{first}:{last}]/{self.seq_length}#{self._key}"
        )

    def read(self, samples: Int64s, epochs: Int64s, into: Windows, rows: Int64s) -> None:
        """Write `samples` ([m] numbers), each as in one of the `epochs` [m], into the rows `rows` of
        `into`. The mask says at the first token of each pair whether it is in order."""
        assert into.documents is not None
        assert into.mask is not None
        into.tokens[rows], into.mask[rows], into.filled[rows] = 0, 1, 0
        row, span = self._spans_of(samples)
        index = torch.from_numpy(span + epochs[row] * len(self._first))
        cut, coin = (uniform(key_of(self._key, what), index).numpy() for what in ("cut", "coin"))
        other = (random_bits(key_of(self._key, "other"), index) & (2**62 - 1)).numpy()
        number = np.zeros(len(samples), np.int64)
        for one, of_span, where, wrong, drawn in zip(
            row.tolist(),
            span.tolist(),
            cut.tolist(),
            (coin < 0.5).tolist(),
            other.tolist(),
            strict=True,
        ):
            pair = self._pair(of_span, where, wrong, drawn)
            at, target = int(into.filled[rows[one]]), rows[one]
            into.tokens[target, at : at + len(pair)] = pair
            into.mask[target, at] = NOT_IN_ORDER if wrong else IN_ORDER
            into.documents[target, at:] = number[one]
            into.filled[target] += len(pair)
            number[one] += 1
            # What follows the last pair counts as one more.
            into.documents[target, at + len(pair) :] = number[one]

    def _pair(self, span: int, where: float, wrong: bool, other: int) -> Int64s:
        """Return the tokens of a pair. `where` in [0, 1) says between which sentences a span is cut,
        `other` is a number by which another document is drawn."""
        first, last = int(self._first[span]), int(self._last[span])
        middle = first + 1 + int(where * (last - first - 1))
        before, after = self._text(first, middle), self._text(middle, last)
        if wrong and self.kind == "sop":
            before, after = after, before
        elif wrong:
            # Of another document: the spans of this one are passed over.
            low, high = (
                int(np.searchsorted(self._document, self._document[span], side))
                for side in ("left", "right")
            )
            found = other % (len(self._document) - (high - low))
            found += (high - low) * (found >= low)
            after = self._text(int(self._first[found]), int(self._last[found]))
        room = self.seq_length - NUM_SPECIAL
        size = int(self._starts[last] - self._starts[first])
        room = min(room, size)
        # The longer one is cut, down to the shorter, and never where the two meet.
        keep_after = min(len(after), max(room - len(before), room // 2))
        keep_before = min(len(before), room - keep_after)
        begin, end = self._specials
        return np.concatenate(
            ([begin], before[len(before) - keep_before :], [end], after[:keep_after], [end])
        )

    def _text(self, first: int, last: int) -> Int64s:
        """Return the tokens of sentences [first, last), without those that a document begins and
        ends with."""
        tokens = np.array(
            self.dataset.read(int(self._starts[first]), int(self._starts[last])), np.int64
        )
        begin, end = self._specials
        tokens = tokens[1:] if len(tokens) and tokens[0] == begin else tokens
        return tokens[:-1] if len(tokens) and tokens[-1] == end else tokens


def _spans(starts: Int64s, documents: list[int], room: int) -> list[tuple[int, int, int]]:
    """Return the spans of whole sentences that fill `room` tokens, as (first, last, document).
    `starts` are where sentences begin, `documents` the numbers of their first sentences."""
    spans = []
    for number, (begin, stop) in enumerate(itertools.pairwise(documents)):
        while stop - begin >= 2:
            end = int(np.searchsorted(starts, starts[begin] + room, side="left"))
            end = min(max(end, begin + 2), stop)
            # A last sentence that would be alone goes along.
            end = stop if stop - end == 1 else end
            spans.append((begin, end, number))
            begin = end
    return spans
