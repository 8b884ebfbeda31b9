"""Pieces that families share, written for one device. Letters in shapes: B batch, T sequence, D hidden, H heads,
G key/value heads, K head size, V vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor

from megalite.kernels.attention import PLAIN, AttentionKind, causal_attention, written_out
from megalite.kernels.loss import IGNORE as IGNORE
from megalite.kernels.loss import cross_entropy
from megalite.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of


@dataclass(frozen=True)
class Places:
    """Where the tokens of a micro-batch stand. T counts the tokens at hand: all of a sequence, or a context rank's."""

    index_T: Tensor
    """Place of each token in its whole sequence, int64, ascending."""
    position_BT: Tensor
    """What positions are encoded by, int64: the place in the sequence, or in the token's own document; B may be 1."""
    document_BT: Tensor | None = None
    """Number of each token's document in its sequence: tokens attend only within theirs. None: all are one."""
    key_B: Tensor | None = None
    """Dropout keys, int64, one a sample; None drops nothing."""
    whole_length: int | Tensor | None = None
    """Tokens of a whole sequence, where a part of it is at hand; [B,1,1] where rows differ, [B,T,1] where documents do;
    None: T."""

    @property
    def length(self) -> int | Tensor:
        """Of a whole sequence."""
        return len(self.index_T) if self.whole_length is None else self.whole_length

    @classmethod
    def whole(cls, length: int, device: torch.device) -> Places:
        """A whole sequence of one document."""
        index = torch.arange(length, device=device)
        return cls(index, index[None])


class Decoder(nn.Module):
    """What every family's model is: embed, layers one after another, predict. A pipeline cuts it between layers."""

    INPUT: tuple[str, ...]
    """Modules that `embed` uses."""
    OUTPUT: tuple[str, ...]
    """Modules that `predict` uses."""
    config: Any
    layers: nn.ModuleDict
    """By their number in the whole model."""
    norm: nn.Module
    head: nn.Module
    loss: nn.Module

    def embed(self, tokens_BT: Tensor, places: Places) -> Tensor:
        """[B,T,D]"""
        raise NotImplementedError

    def shared(self, places: Places, dtype: torch.dtype) -> Any:
        """What all layers need besides `x`: computed once."""
        raise NotImplementedError

    def predict(self, x_BTD: Tensor) -> Tensor:
        """Logits [B,T,V]"""
        return self.head(self.norm(x_BTD))

    def losses(self, x_BTD: Tensor, labels_BT: Tensor) -> Tensor:
        """Of every token, fp32 [B,T]; 0 where the label is `IGNORE`."""
        return self.loss(self.predict(x_BTD), labels_BT)

    def run_layers(self, x_BTD: Tensor, places: Places) -> Tensor:
        shared = self.shared(places, x_BTD.dtype)
        for layer in self.layers.values():
            x_BTD = layer(x_BTD, shared)
        return x_BTD

    def forward(self, tokens_BT: Tensor, places: Places | None = None) -> Tensor:
        """Logits [B,T,V]. Without `places`, each row is a whole sequence of one document."""
        places = places or Places.whole(tokens_BT.shape[1], tokens_BT.device)
        return self.predict(self.run_layers(self.embed(tokens_BT, places), places))


def numbered(layers: Iterable[nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})


class Dropout(nn.Module):
    """Dropout whose mask depends on (seed, sample, place in the sample) alone, so that every layout drops the same.

    Tensor parallelism sets `shard` to (rank, ranks) where it cuts dimension 1 of the input over ranks: the sequence of
    hidden states, or the heads where `over_heads`; and `features` likewise where it cuts the last dimension."""

    def __init__(self, p: float, site: str, over_heads: bool = False):
        super().__init__()
        self.p, self.site, self.over_heads, self.shard = p, key_of(site), over_heads, (0, 1)
        self.features = (0, 1)

    def forward(self, x: Tensor, places: Places) -> Tensor:
        """`x` is [B,T,D], or [B,H,T,T] where `over_heads`. Without keys, or in evaluation, it is left alone."""
        if self.p == 0.0 or places.key_B is None or not self.training:
            return x
        return self.drop(x, places, places.key_B)

    def drop(self, x: Tensor, places: Places, key_B: Tensor) -> Tensor:
        rank, ranks = self.shard
        if self.over_heads:
            first = rank * x.shape[1] + torch.arange(x.shape[1], device=x.device)
        else:
            first = places.index_T.chunk(ranks)[rank]
        inner = x[0, 0].numel()
        part, parts = self.features
        index = first[:, None] * (inner * parts) + part * inner + torch.arange(inner, device=x.device)
        keys = random_bits(self.site, key_B).view(-1, *[1] * (x.dim() - 1))
        keep = uniform(keys, index.view(x.shape[1:])) >= self.p
        return x * (keep / (1.0 - self.p)).to(x.dtype)


def make_embedding(rows: int, width: int) -> nn.Embedding:
    """One that draws no weights: on the meta device that would import torch's compiler, which takes a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class RMSNorm(nn.Module):
    INIT: Literal["ones", "zeros"] = "ones"
    """Of the weight, so that nothing is scaled at first."""
    UNIT = 0.0
    """Added to the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of `x`; with a residual, (norm, sum) of their sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, self.UNIT)
        return add_rms_norm(x, residual, self.weight, self.eps, self.UNIT)


class OffsetRMSNorm(RMSNorm):
    """Scales by 1 + weight (Gemma)."""

    INIT = "zeros"
    UNIT = 1.0


class LayerNorm(nn.Module):
    INIT: Literal["ones"] = "ones"

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(size)), nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of `x`; with a residual, (norm, sum) of their sum."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class CrossEntropy(nn.Module):
    """Loss of every token in fp32; 0 where the label is `IGNORE`. The backward pass overwrites the logits."""

    def forward(self, logits: Tensor, labels_BT: Tensor) -> Tensor:
        return cross_entropy(logits, labels_BT)


class CausalAttention(nn.Module):
    """Attention of each token to itself and to those before it in its document, with grouped queries. Context
    parallelism replaces it."""

    def __init__(self, dropout: Dropout | None = None, kind: AttentionKind = PLAIN):
        """`dropout` is applied to the probabilities."""
        super().__init__()
        self.dropout, self.kind = dropout, kind

    @property
    def writes_scores(self) -> bool:
        """It may hold [B,H,T,T]."""
        return self.kind.softcap is not None or bool(self.dropout and self.dropout.p)

    def forward(self, qkv_BTNK: Tensor, num_heads: int, num_kv_heads: int, places: Places) -> Tensor:
        """Of the fused projection, N = num_heads of queries + num_kv_heads of keys + as many of values: → [B,T,H·K]"""
        if self.training and self.dropout is not None and self.dropout.p and places.key_B is not None:
            # Fused kernels' own random numbers would depend on the layout.
            drop = partial(self.dropout, places=places)
            return written_out(qkv_BTNK, num_heads, num_kv_heads, places.document_BT, self.kind, drop)
        return causal_attention(qkv_BTNK, num_heads, num_kv_heads, places.document_BT, self.kind)
