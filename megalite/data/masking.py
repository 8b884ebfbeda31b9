"""Mask tokens for a model that learns to tell what stood there (BERT, Devlin et al. 2019): a
function of the seed, the sample and the place, so that an epoch masks others than the one before,
and every layout the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megalite.data.order import Int64s
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.kernels.loss import IGNORE
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become the mask token, or a random one. The others stay as they
are."""


class Words:
    """Tells where words begin, by the marks that a tokenizer's pieces carry. Raises DataError for a
    tokenizer without such marks."""

    def __init__(self, tokenizer: Tokenizer):
        pieces = tokenizer.vocabulary()
        self._begins = np.zeros(max(pieces.values()) + 1, np.bool_)
        self._ends_blank = np.zeros_like(self._begins)
        marks = [mark for mark in ("##", "▁", "Ġ") if any(p.startswith(mark) for p in pieces)]
        if not marks:
            raise DataError(
                "objective.whole_words: true needs a data.tokenizer that marks where words begin or go on (## of "
                "WordPiece, ▁ of sentencepiece, Ġ of byte-level BPE)"
            )
        for piece, number in pieces.items():
            if marks[0] == "##":
                self._begins[number] = not piece.startswith("##")
            else:
                # Ċ and ĉ: a line's end and a tab, as byte-level BPE writes them.
                self._begins[number] = piece[:1] in ("▁", "Ġ", "Ċ", "ĉ")
                self._ends_blank[number] = piece[-1:] in ("▁", "Ġ", "Ċ", "ĉ")

    def first_places(self, tokens: Int64s, is_special: npt.NDArray[np.bool_]) -> Int64s:
        """Return for each token the place of the first token of its word, [n, L]. No word goes over
        a special token."""
        # Ids that the tokenizer does not have are for the loader to refuse, which names the file.
        known = np.clip(tokens, 0, len(self._begins) - 1)
        begins = self._begins[known] | is_special
        begins[:, 1:] |= self._ends_blank[known[:, :-1]]
        begins[:, 0] = True  # the rest of a word that a sample's border has cut
        places = np.where(begins, np.arange(tokens.shape[1]), 0)
        return np.maximum.accumulate(places, axis=1)


class Shares(NamedTuple):
    """Share of the tokens to predict, over a run of `total` samples."""

    start: float
    end: float
    total: int = 1

    def at(self, index: Int64s) -> npt.NDArray[np.float32]:
        """Return the share of each sample of the run, by its number, [n]."""
        passed = np.minimum(index / max(self.total - 1, 1), 1.0)
        return (self.start + (self.end - self.start) * passed).astype(np.float32)


class Masking:
    """Chooses a share of the tokens, special ones excepted, to be predicted, and hides most of
    them."""

    def __init__(self, shares: Shares, tokenizer: Tokenizer, key: int, whole_words: bool = False):
        """Take the `shares` to choose, the mask token and the special tokens of `tokenizer`; `key` is
        of the run and the split. With `whole_words` all tokens of a word are chosen, or none. Raise DataError for a
        tokenizer without a mask token, or without marks of words where they are needed."""
        if tokenizer.mask_id is None:
            raise DataError(
                "objective.name: masked_lm needs a data.tokenizer with a mask token: give tokenizer_config.json a "
                "mask_token, or train one with `megalite tokenizer train --type wordpiece`"
            )
        self.shares, self.key, self.mask_id = shares, key, tokenizer.mask_id
        self.words = Words(tokenizer) if whole_words else None
        ids = {*tokenizer.vocabulary().values()}
        self._special = np.array(sorted(tokenizer.special_ids), np.int64)
        self._ordinary = np.array(sorted(ids - tokenizer.special_ids), np.int64)

    def apply(
        self, tokens: Int64s, learned: npt.NDArray[np.bool_], index: Int64s
    ) -> tuple[Int64s, Int64s]:
        """Return inputs and labels, both [n, L], of `tokens` [n, L]; see `Corruption`."""
        # A number for each place of each sample of the run, [n, L], by which random numbers are
        # drawn.
        places = torch.from_numpy(index)[:, None] * tokens.shape[1] + torch.arange(tokens.shape[1])
        chosen, fate = (
            uniform(key_of(self.key, what), places).numpy() for what in ("chosen", "fate")
        )
        is_special = np.isin(tokens, self._special)
        if self.words:
            # One draw decides for a word: that of its first token.
            first = self.words.first_places(tokens, is_special)
            chosen = np.take_along_axis(chosen, first, axis=1)
        share_n1 = self.shares.at(index)[:, None]
        is_chosen = (chosen < share_n1) & learned & ~is_special
        labels = np.where(is_chosen, tokens, IGNORE)
        # The low bits alone are taken, as a modulus of negative numbers would be none.
        drawn = (random_bits(key_of(self.key, "random"), places) & (2**62 - 1)).numpy() % len(
            self._ordinary
        )
        # `fate` in [0, 1): below 0.8 the mask, from 0.9 on a random token, between them the token
        # itself.
        inputs = np.where(is_chosen & (fate < MASKED), self.mask_id, tokens)
        inputs = np.where(is_chosen & (fate >= 1 - RANDOM), self._ordinary[drawn], inputs)
        return inputs, labels

    def identity(self) -> list[Any]:
        """Return what decides what it does, for a fingerprint."""
        start_is_end = self.shares.start == self.shares.end
        return [
            "masked",
            # Without the total: as for the learning rate's schedule, a run that goes on for longer has
            # another one from there on. One number where there is one, as before there were two.
            self.shares.start if start_is_end else [self.shares.start, self.shares.end],
            self.key,
            self.mask_id,
            len(self._special),
            len(self._ordinary),
            *(["whole words"] if self.words else []),
        ]
