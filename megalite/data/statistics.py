"""Statistics of tokens that need no model."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from megalite.data.indexed import IndexedDataset


def unigram_loss(train: IndexedDataset, valid: IndexedDataset, vocab_size: int) -> float:
    """Return the loss in nats per token on `valid` of a model that knows only how often each of
    `vocab_size` tokens occurs in `train` (add-one smoothed). A language model must beat it to have
    learned anything about order."""
    # One more of each, or a token that training has not seen would cost infinitely much.
    seen = np.bincount(train.read(0, train.num_tokens), minlength=vocab_size) + 1.0
    occurs = np.bincount(valid.read(0, valid.num_tokens), minlength=vocab_size)
    return float(-(occurs * np.log(seen / seen.sum())).sum() / occurs.sum())


def unigram_accuracy(
    train: IndexedDataset, valid: IndexedDataset, vocab_size: int, special: Collection[int] = ()
) -> float:
    """Return how often a model is right on `valid` that always tells the token that is most
    frequent in `train`. `special` tokens are left out of both, as they are never to be told."""
    seen, occurs = (
        np.bincount(each.read(0, each.num_tokens), minlength=vocab_size) for each in (train, valid)
    )
    for counts in (seen, occurs):
        counts[list(special)] = 0
    return float(occurs[seen.argmax()] / occurs.sum())
