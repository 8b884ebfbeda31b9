"""Dropout of one device, whose mask no layout changes. Letters in shapes are those of
`models/layers.py`."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from megalite.models.layers import SequenceInfo
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of


class Dropout(nn.Module):
    """Dropout whose mask depends on (seed, sample, position in the sample) alone, so that every
    layout drops the same.

    Tensor parallelism sets `shard` to (rank, ranks) where it cuts dimension 1 of the input over
    ranks: the sequence of hidden states, or the heads where `over_heads`; and `features` likewise
    where it cuts the last dimension, as it does where `over_features`: between two matrices. Context
    parallelism sets `parts` to its ranks, each of which has that part of the queries."""

    def __init__(self, p: float, site: str, over_heads: bool = False, over_features: bool = False):
        super().__init__()
        self.p = p
        self.site = key_of(site)
        self.over_heads, self.over_features = over_heads, over_features
        self.shard, self.features = (0, 1), (0, 1)
        self.parts = 1

    def forward(self, x: Tensor, places: SequenceInfo) -> Tensor:
        """Drop elements of `x` [B,T,D], or [B,H,T,T] where `over_heads`. Without keys, or in
        evaluation, it is returned as it is."""
        if self.p == 0.0 or places.key_B is None or not self.training:
            return x
        return self.drop(x, places, places.key_B)

    def drop(self, x: Tensor, places: SequenceInfo, key_B: Tensor) -> Tensor:
        """Drop elements of `x`; `key_B` has the key of each sample."""
        find_index = self._index_of_scores if self.over_heads else self._index_of_features
        index = find_index(x, places.index_BT).view(-1, *x.shape[1:])
        # A key a sample and site: two dropouts of a model must not drop the same elements.
        keys = random_bits(self.site, key_B)
        keys = keys.view(-1, *[1] * (x.dim() - 1))
        keep = uniform(keys, index) >= self.p
        # Inverted dropout: the expectation stays.
        scale = keep / (1.0 - self.p)
        return x * scale.to(x.dtype)

    # The index that one process would have given each element, whatever part of the input is here:
    # first come the heads of the whole model, or the tokens of the whole sequence.

    def _index_of_scores(self, x_BHTS: Tensor, index_BT: Tensor) -> Tensor:
        """Return the index of each score in those of the whole model, [B or 1,H,T,S] int64."""
        heads, queries, num_keys = x_BHTS.shape[1:]
        rank, _ = self.shard
        head_H = rank * heads + torch.arange(heads, device=x_BHTS.device)
        all_queries = queries * self.parts
        query_BHT = head_H[:, None] * all_queries + index_BT[:, None]
        key_S = torch.arange(num_keys, device=x_BHTS.device)
        return query_BHT[..., None] * num_keys + key_S

    def _index_of_features(self, x: Tensor, index_BT: Tensor) -> Tensor:
        """Return the index of each feature in those of the whole sequence, [B or 1,T,D] int64."""
        rank, ranks = self.shard
        part, parts = self.features
        token_BT = index_BT.chunk(ranks, 1)[rank]
        inner = x[0, 0].numel()
        feature_D = torch.arange(inner, device=x.device)
        return (token_BT[..., None] * parts + part) * inner + feature_D
