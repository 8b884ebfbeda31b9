"""Fill in the middle (FIM): rearrange documents so that a causal model learns to fill a gap from
both sides.

Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle". A document in
parts prefix, middle, suffix becomes PRE prefix SUF suffix MID middle (PSM) or PRE SUF suffix MID
prefix middle (SPM)."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from megalite.config import FillInTheMiddleConfig
from megalite.data.order import Int64s
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.utils.keys import key_of

SHORTEST = 16  # tokens: three are lost to the marks, and less than a dozen have nothing to fill


class FillInTheMiddle(NamedTuple):
    """Rearranges a share `rate` of the documents in a sample, `spm_rate` of them as SPM. A
    rearranged document keeps its length, so that packing and masks stay valid; its last three
    tokens before `end` make room for the marks."""

    rate: float
    spm_rate: float
    prefix: int
    middle: int
    suffix: int
    end: int | None
    seed: int

    @classmethod
    def of(
        cls, config: FillInTheMiddleConfig, tokenizer: Tokenizer | None, seed: int
    ) -> FillInTheMiddle:
        """Create it from the settings in `config`. Raise DataError if `tokenizer` lacks one of the
        three tokens. `seed` is the run's."""
        vocabulary = tokenizer.vocabulary() if tokenizer else {}
        for token in config.tokens:
            if token not in vocabulary:
                raise DataError(
                    f"data.fim.tokens: data.tokenizer has no token {token!r}; name the three that it has, or train "
                    "one that has them"
                )
        prefix, middle, suffix = (vocabulary[token] for token in config.tokens)
        end = tokenizer.eod_id if tokenizer else None
        return cls(config.rate, config.spm_rate, prefix, middle, suffix, end, seed)

    def turn(self, tokens: Int64s, documents: Int64s, filled: Int64s, indices: Int64s) -> None:
        """Rearrange documents of `tokens` in place. `tokens` and `documents` are [n, L + 1],
        `filled` [n], as in `Windows`; `indices` [n] are the numbers of the samples, which alone
        decide what is rearranged and where it is cut."""
        for row, of_row, count, index in zip(
            tokens, documents, filled.tolist(), indices.tolist(), strict=True
        ):
            for start, stop, cuts, is_spm in self.turns(row, of_row, count, index):
                # Three tokens of the document give way to the three marks.
                row[start:stop] = self.turned(row[start : stop - 3], cuts, is_spm)

    def turns(
        self, row: Int64s, of_row: Int64s, count: int, index: int
    ) -> list[tuple[int, int, list[float], bool]]:
        """Return the parts [start, stop) of a sample that are rearranged, with what `turned` is
        told of each. `row`, [L + 1] with `count` tokens, is as it was before."""
        random = np.random.Generator(np.random.Philox(key_of(self.seed, "fim", index)))
        borders = [0, *(np.flatnonzero(np.diff(of_row[:count])) + 1).tolist(), count]
        found = []
        for start, stop in itertools.pairwise(borders):
            # Four numbers per document in any case, so that the decisions do not depend on those
            # for earlier documents.
            is_turned, is_spm, *cuts = random.random(4).tolist()
            if row[stop - 1] == self.end:
                stop -= 1
            if is_turned < self.rate and stop - start >= SHORTEST:
                found.append((start, stop, cuts, is_spm < self.spm_rate))
        return found

    def turned(self, content: Int64s, cuts: list[float], is_spm: bool) -> Int64s:
        """Return a document's `content` rearranged at two cuts, given as fractions of its length;
        three tokens longer."""
        first, second = sorted(int(cut * (len(content) + 1)) for cut in cuts)
        prefix, middle, suffix = content[:first], content[first:second], content[second:]
        if is_spm:
            return np.concatenate(
                [[self.prefix, self.suffix], suffix, [self.middle], prefix, middle]
            )
        return np.concatenate([[self.prefix], prefix, [self.suffix], suffix, [self.middle], middle])
