"""Statistics of tokens that need no model."""

from __future__ import annotations

import numpy as np

from megalite.data.indexed import IndexedDataset


def unigram_loss(train: IndexedDataset, valid: IndexedDataset, vocab_size: int) -> float:
    """Return the loss in nats per token on `valid` of a model that knows only how often each of `vocab_size` tokens
    occurs in `train` (add-one smoothed). A language model must beat it to have learned anything about order."""
    seen = np.bincount(train.read(0, train.num_tokens), minlength=vocab_size) + 1.0
    occurs = np.bincount(valid.read(0, valid.num_tokens), minlength=vocab_size)
    return float(-(occurs * np.log(seen / seen.sum())).sum() / occurs.sum())
