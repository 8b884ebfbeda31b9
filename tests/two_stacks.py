"""A family of an encoder and a decoder, as small as it can be: what any model of several stacks
needs of megalite.

Both read the same tokens, by an embedding each. The encoder's hidden states go on beside the
decoder's, which attends to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch.nn as nn
from pydantic import Field
from torch import Tensor

from megalite.kernels.attention_kinds import AttentionKind
from megalite.models.architecture import Architecture
from megalite.models.core_attention import CoreAttention
from megalite.models.layers import SequenceInfo, make_embedding
from megalite.models.llama import (
    KEYS,
    Attention,
    Layer,
    Llama,
    LlamaLike,
    Shared,
    attention_rows,
    fields_to_hf,
    layer_table,
    norm_row,
    residual_std,
    table,
)
from megalite.models.weights import Weight
from megalite.registry import families

Pair = tuple[Tensor, Tensor]
"""The encoder's hidden states and the decoder's."""


class TwoStacksConfig(LlamaLike):
    family: Literal["two_stacks"] = "two_stacks"
    encoder_layers: int = Field(
        gt=0, description="How many of the layers, the first ones, are the encoder's."
    )

    def attention(self, layer: int) -> AttentionKind:
        return AttentionKind(causal=layer >= self.encoder_layers)

    def describe(self) -> Architecture:
        return replace(super().describe(), num_streams=2)


class EncoderLayer(Layer):
    def forward(self, streams: Pair, shared: Shared) -> Pair:  # type: ignore[override]
        return super().forward(streams[0], shared), streams[1]


class CrossAttention(nn.Module):
    def __init__(self, config: LlamaLike):
        super().__init__()
        hidden, self.head_size = config.hidden_size, config.head_size
        self.q, self.kv = (
            nn.Linear(hidden, hidden, bias=False),
            nn.Linear(hidden, 2 * hidden, bias=False),
        )
        self.core = CoreAttention(kind=AttentionKind(causal=False), crosses=True)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, places: SequenceInfo) -> Tensor:
        q = self.q(x_BTD).unflatten(-1, (-1, self.head_size))
        k, v = self.kv(memory_BSD).unflatten(-1, (-1, self.head_size)).chunk(2, dim=2)
        return self.out(self.core.attend(q, k, v, places, source=places))


class DecoderLayer(nn.Module):
    """The first of them normalizes the encoder's states for all."""

    def __init__(self, config: TwoStacksConfig, number: int):
        super().__init__()
        self.attention_norm = config.NORM(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, number)
        self.cross_norm = config.NORM(config.hidden_size, config.norm_eps)
        self.cross = CrossAttention(config)
        self.mlp_norm = config.NORM(config.hidden_size, config.norm_eps)
        self.mlp = Layer(config, self.attention).mlp
        if number == config.encoder_layers:
            self.memory_norm = config.NORM(config.hidden_size, config.norm_eps)

    def forward(self, streams: Pair, shared: Shared) -> Pair:
        memory, x = streams
        if hasattr(self, "memory_norm"):
            memory = self.memory_norm(memory)
        x = x + self.attention(self.attention_norm(x), shared)
        x = x + self.cross(self.cross_norm(x), memory, shared.places)
        return memory, x + self.mlp(self.mlp_norm(x))


class TwoStacks(Llama):
    INPUT = ("source_embedding", "embedding")
    config: TwoStacksConfig

    def __init__(self, config: TwoStacksConfig):
        super().__init__(config)
        self.source_embedding = make_embedding(config.vocab_size, config.hidden_size)

    def layer(self, number: int) -> nn.Module:
        if number < self.config.encoder_layers:
            return EncoderLayer(self.config, Attention(self.config, number))
        return DecoderLayer(self.config, number)

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Pair:
        return self.source_embedding(tokens_BT), self.embedding(tokens_BT)


class TwoStacksFamily:
    MODEL, CONFIG, KEYS = TwoStacks, TwoStacksConfig, KEYS

    @staticmethod
    def weights(config: TwoStacksConfig) -> Iterator[Weight]:
        shape = (config.vocab_size, config.hidden_size)
        yield Weight(
            "source_embedding.weight",
            shape,
            ("model.source.weight",),
            "vocab",
            used=0.0,
            init=config.init_std,
        )
        yield from table(config, lambda layer: tuple(_layer(config, layer)))

    @staticmethod
    def to_hf(config: TwoStacksConfig) -> dict[str, Any]:
        return fields_to_hf(config, "TwoStacks") | {"encoder_layers": config.encoder_layers}

    @staticmethod
    def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


def _layer(config: TwoStacksConfig, layer: int) -> Iterator[Weight]:
    hidden, std, unit = config.hidden_size, config.init_std, config.head_size
    if layer < config.encoder_layers:
        yield from layer_table(config)
        return
    norm, *rows = layer_table(config)
    num_attention = len(attention_rows(config))
    yield from (norm, *rows[:num_attention], norm_row(config, "cross_norm", "cross_norm"))
    yield Weight(
        "cross.q.weight", (hidden, hidden), ("cross.q.weight",), "column", unit=unit, init=std
    )
    halves, names = (hidden, hidden), ("cross.k.weight", "cross.v.weight")
    yield Weight("cross.kv.weight", (2 * hidden, hidden), names, "column", halves, unit, init=std)
    yield Weight(
        "cross.out.weight",
        (hidden, hidden),
        ("cross.o.weight",),
        "row",
        unit=unit,
        init=residual_std(config),
    )
    yield from rows[num_attention:]
    if layer == config.encoder_layers:
        yield norm_row(config, "memory_norm", "memory_norm")


families.register("two_stacks", TwoStacksFamily)
