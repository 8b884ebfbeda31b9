"""Pieces that families share, written for one device. Letters in shapes: B batch, T sequence, D hidden, H heads,
G key/value heads, K head size, V vocabulary."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.counter_random import random_bits, uniform
from megalite.keys import key_of

IGNORE = -100
"""Label of a token that carries no loss."""


class Dropout(nn.Module):
    """Dropout whose mask depends on (seed, sample, place in the sample) alone, so that every layout drops the same.

    `shard_rank` is set where parallelism cuts dimension 1 of the input over ranks (the sequence of hidden states, or
    the heads where `over_heads`): this rank then owns the `shard_rank`-th slice of equal size."""

    def __init__(self, p: float, site: str, over_heads: bool = False):
        super().__init__()
        self.p, self.site, self.over_heads, self.shard_rank = p, key_of(site), over_heads, 0

    def forward(self, x: Tensor, key_B: Tensor | None) -> Tensor:
        """`key_B` [B] int64, one key a sample; None (or evaluation) leaves `x` alone."""
        if self.p == 0.0 or key_B is None or not self.training:
            return x
        numel = x[0].numel()
        index = torch.arange(self.shard_rank * numel, (self.shard_rank + 1) * numel, device=x.device).view(x.shape[1:])
        keys = random_bits(self.site, key_B).view(-1, *[1] * (x.dim() - 1))
        keep = uniform(keys, index) >= self.p
        return x * (keep / (1.0 - self.p)).to(x.dtype)


class CrossEntropy(nn.Module):
    """Loss of every token in fp32; 0 where the label is `IGNORE`."""

    def forward(self, logits: Tensor, labels_BT: Tensor) -> Tensor:
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return losses.view_as(labels_BT)


def causal_attention(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal attention with grouped queries by torch's SDPA: [B,T,H,K] and twice [B,T,G,K] → [B,T,H·K]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(2)


def causal_attention_with_dropout(
    q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, dropout: Dropout, key_B: Tensor
) -> Tensor:
    """The same written out, for training with dropout on the attention probabilities: SDPA's own random numbers would
    depend on the layout. Holds [B,H,T,T]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    probabilities = scores.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype)
    return (dropout(probabilities, key_B) @ v).transpose(1, 2).flatten(2)
