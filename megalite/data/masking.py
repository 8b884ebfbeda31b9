"""Mask tokens for a model that learns to tell what stood there (BERT, Devlin et al. 2019): a
function of the seed, the sample and the place, so that an epoch masks others than the one before,
and every layout the same."""

from __future__ import annotations

from typing import Any

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


class Masking:
    """Chooses a `share` of the tokens, special ones excepted, to be predicted, and hides most of
    them."""

    def __init__(self, share: float, tokenizer: Tokenizer, key: int):
        """Take the mask token and the special tokens of `tokenizer`; `key` is of the run and the
        split. Raise DataError for a tokenizer without a mask token."""
        if tokenizer.mask_id is None:
            raise DataError(
                "objective.name: masked_lm needs a data.tokenizer with a mask token: give tokenizer_config.json a "
                "mask_token, or train one with `megalite tokenizer train --type wordpiece`"
            )
        self.share, self.key, self.mask_id = share, key, tokenizer.mask_id
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
        is_chosen = (chosen < self.share) & learned & ~np.isin(tokens, self._special)
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
        return [
            "masked",
            self.share,
            self.key,
            self.mask_id,
            len(self._special),
            len(self._ordinary),
        ]
