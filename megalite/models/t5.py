"""T5 (Raffel et al. 2020): an encoder, and a decoder that attends to it. Attention is without
scale, positions are biases of its scores. T5 1.0 has ReLU and a head tied to the embedding, whose
input is scaled; T5 1.1, Flan-T5 and mT5 have gated GELU and a head of their own.

Letters in shapes, beside those of layers.py: S tokens of the encoder, N buckets of relative
positions."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from megalite.config import MOST_LAYERS, ModelConfig
from megalite.kernels.activation import geglu
from megalite.kernels.attention_kinds import AttentionKind
from megalite.models.architecture import (
    Architecture,
    AttentionSpec,
    CrossSpec,
    FeedForwardSpec,
    LayerSpec,
)
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.hf import REQUIRED, Keys, require
from megalite.models.layers import (
    CrossEntropy,
    Decoder,
    RMSNorm,
    SequenceInfo,
    Source,
    Streams,
    make_embedding,
    numbered,
)
from megalite.models.weights import Weight, embedding_row, head_rows, layer_rows
from megalite.plan import Place

GATED = "gated-gelu"
HEAD = "lm_head.weight"
START = 0
"""Id of the token that a target begins with, T5's padding."""


class T5Config(ModelConfig):
    family: Literal["t5"] = "t5"
    num_layers: int = Field(gt=1, le=MOST_LAYERS, description="Layers of both stacks together.")
    encoder_layers: int = Field(
        gt=0, description="How many of the layers, the first ones, are the encoder's."
    )
    intermediate_size: int = Field(gt=0)
    head_dim: int = Field(
        64, gt=0, description="Size of a head; all heads together may be wider than a token."
    )
    feed_forward: Literal["relu", "gated-gelu"] = Field(
        "gated-gelu", description="relu: of T5 1.0; gated-gelu: of T5 1.1, Flan-T5 and mT5."
    )
    scale_head: bool = Field(
        False,
        description="Scale what the head takes by 1/√hidden_size, as T5 1.0 does, whose head is the embedding.",
    )
    relative_buckets: int = Field(32, gt=0, description="Buckets of relative positions, even.")
    relative_distance: int = Field(
        128, gt=0, description="Distance from which on all are in one bucket."
    )
    max_positions: int = Field(
        512, gt=0, description="Longest sequence of either stack, in tokens."
    )
    norm_eps: float = Field(1e-6, gt=0)
    init_std: float = Field(
        1.0,
        gt=0,
        description="Standard deviation of the embedding's initial values. Matrices have 1/√inputs of it.",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Dropout of embeddings, attention's weights, and what each part gives.",
    )
    task: Literal["seq2seq"] = "seq2seq"

    PREDICTS: ClassVar[Literal["causal", "masked", "seq2seq"]] = "seq2seq"
    START_TOKEN: ClassVar[int] = START
    COPIES: ClassVar[tuple[str, ...]] = (
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    )
    SPARE: ClassVar[tuple[str, ...]] = (
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",  # transformers reads it nowhere
    )

    @model_validator(mode="after")
    def _stacks_and_buckets_fit(self) -> T5Config:
        if self.encoder_layers >= self.num_layers:
            raise ValueError(
                f"encoder_layers {self.encoder_layers} must be less than num_layers {self.num_layers}, which counts "
                "those of the decoder as well"
            )
        # Half of them are of keys behind the query, and half of each are of one distance each.
        if self.relative_buckets % 4:
            raise ValueError(f"relative_buckets {self.relative_buckets} must be a multiple of 4")
        if self.relative_distance <= self.relative_buckets // 2:
            raise ValueError(
                f"relative_distance {self.relative_distance} must be more than half of the {self.relative_buckets} "
                "relative_buckets, which hold one distance each"
            )
        return self

    @classmethod
    def with_files(cls, fields: dict[str, Any], names: Container[str]) -> dict[str, Any]:
        """Return the fields with the head as its files have it. transformers 5 says of every T5
        that it is tied; it is where no other head is stored."""
        # A scaled head is the embedding, whatever is stored beside it.
        is_own = HEAD in names and not fields.get("scale_head")
        return fields | {"tie_embeddings": False} if is_own else fields

    @property
    def inner_heads(self) -> int:
        """Return the features of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def is_gated(self) -> bool:
        return self.feed_forward == GATED

    def describe(self) -> Architecture:
        heads: dict[str, Any] = {
            "num_heads": self.num_attention_heads, "num_kv_heads": self.num_attention_heads,
            "head_size": self.head_dim, "value_size": self.head_dim, "scale": 1.0, "dropout": self.dropout,
            "bias": True,
        }  # fmt: skip
        activation = "gelu" if self.is_gated else "relu"
        feed_forward = FeedForwardSpec(
            inner=self.intermediate_size,
            gated=self.is_gated,
            activation=activation,
            dropout=self.dropout,
        )
        encoder = LayerSpec(AttentionSpec(**heads, causal=False), feed_forward)
        decoder = LayerSpec(CrossSpec(**heads), feed_forward, num_norms=3)
        first = replace(decoder, num_norms=decoder.num_norms + 1)  # that of the encoder's states
        table = (self.relative_buckets, self.num_attention_heads)
        return Architecture(
            layers=(
                *[encoder] * self.encoder_layers,
                first,
                *[decoder] * (self.num_layers - self.encoder_layers - 1),
            ),
            norm="rms",
            num_streams=2,
            source_layers=self.encoder_layers,
            shared_tables=(table, table),
            hidden_dropout=self.dropout,
        )


def buckets(
    index_T: Tensor, index_S: Tensor, both_sides: bool, count: int, distance: int
) -> Tensor:
    """Return the bucket of each key's position relative to each query's, int64 [T,S]. Half of the
    `count` buckets (of one side) hold one distance each, the others ever more of them, up to
    `distance`; of a causal stack, keys behind the query are in bucket 0."""
    relative_TS = index_S[None] - index_T[:, None]
    first_TS = torch.zeros_like(relative_TS)
    if both_sides:
        count //= 2
        first_TS = (relative_TS > 0) * count
        relative_TS = relative_TS.abs()
    else:
        relative_TS = (-relative_TS).clamp(min=0)
    exact = count // 2
    # The logarithm in fp32, and cut off: as transformers computes it, another rounding would be
    # another bucket.
    wide = (
        torch.log(relative_TS.float().clamp(min=1) / exact)
        / math.log(distance / exact)
        * (count - exact)
    )
    far_TS = (exact + wide.long()).clamp(max=count - 1)
    return first_TS + torch.where(relative_TS < exact, relative_TS, far_TS)


class RelativeBias(nn.Module):
    """The table [N,H] of the biases of a stack's scores, which all its layers share."""

    def __init__(self, count: int, heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, heads))

    # A module that is called, so that an engine's hook waits for its weight.
    def forward(self) -> Tensor:
        return self.weight


class Shared(NamedTuple):
    """What all layers need besides the hidden states: places, and biases of the scores, [1,H,S,S]
    and [1,H,T,T], where there are layers of that stack; on a context rank of its queries alone."""

    places: SequenceInfo
    source: SequenceInfo
    source_bias: Tensor | None
    bias: Tensor | None


class Attention(nn.Module):
    """Attention of a stack to itself, on one fused projection of queries, keys and values."""

    def __init__(self, config: T5Config, site: str, causal: bool):
        super().__init__()
        self.head_size = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * config.inner_heads, bias=False)
        dropout = Dropout(config.dropout, f"{site}.probabilities", over_heads=True)
        self.core = CoreAttention(dropout, AttentionKind(scale=1.0, causal=causal), biased=True)
        self.out = nn.Linear(config.inner_heads, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, places: SequenceInfo, bias: Tensor | None) -> Tensor:
        qkv_BTNK = self.qkv(x_BTD).unflatten(-1, (-1, self.head_size))
        heads = qkv_BTNK.shape[2] // 3
        return self.out(self.core(qkv_BTNK, heads, heads, places, bias))


class CrossAttention(nn.Module):
    """Attention from the decoder to the encoder's states, without a bias."""

    def __init__(self, config: T5Config, site: str):
        super().__init__()
        self.head_size = config.head_dim
        self.q = nn.Linear(config.hidden_size, config.inner_heads, bias=False)
        self.kv = nn.Linear(config.hidden_size, 2 * config.inner_heads, bias=False)
        dropout = Dropout(config.dropout, f"{site}.probabilities", over_heads=True)
        self.core = CoreAttention(dropout, AttentionKind(scale=1.0, causal=False), crosses=True)
        self.out = nn.Linear(config.inner_heads, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, memory_BSD: Tensor, shared: Shared) -> Tensor:
        q = self.q(x_BTD).unflatten(-1, (-1, self.head_size))
        k, v = self.kv(memory_BSD).unflatten(-1, (-1, self.head_size)).chunk(2, dim=2)
        return self.out(self.core.attend(q, k, v, shared.places, source=shared.source))


class MLP(nn.Module):
    """Feed-forward part with dropout between its matrices."""

    def __init__(self, config: T5Config, site: str):
        super().__init__()
        inner = config.intermediate_size
        self.up = nn.Linear(config.hidden_size, (2 if config.is_gated else 1) * inner, bias=False)
        self.down = nn.Linear(inner, config.hidden_size, bias=False)
        self.activation = geglu if config.is_gated else F.relu
        self.dropout = Dropout(config.dropout, f"{site}.inner", over_features=True)

    def forward(self, x: Tensor, places: SequenceInfo) -> Tensor:
        return self.activation_and_down_proj(self.up(x), places)

    def activation_and_down_proj(self, up: Tensor, places: SequenceInfo) -> Tensor:
        """Apply the activation and the down projection; recomputed as one under `train.recompute:
        selective`."""
        return self.down(self.dropout(self.activation(up), places))


class EncoderLayer(nn.Module):
    """Pre-norm layer: attention, then MLP, each added to the encoder's residual stream."""

    def __init__(self, config: T5Config, number: int):
        super().__init__()
        site = f"layers.{number}"
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, f"{site}.attention", causal=False)
        self.attention_dropout = Dropout(config.dropout, f"{site}.attention")
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, f"{site}.mlp")
        self.mlp_dropout = Dropout(config.dropout, f"{site}.mlp")

    def forward(self, streams: tuple[Tensor, ...], shared: Shared) -> tuple[Tensor, ...]:
        *tables, x, decoder = streams
        places = shared.source
        attended = self.attention(self.attention_norm(x), places, shared.source_bias)
        # One fused operation: the sum goes on as the residual stream, its norm into the MLP.
        normed, x = self.mlp_norm(self.attention_dropout(attended, places), x)
        return *tables, x + self.mlp_dropout(self.mlp(normed, places), places), decoder


class DecoderLayer(nn.Module):
    """Pre-norm layer: attention, attention to the encoder, MLP. The first of them normalizes the
    encoder's states for all."""

    def __init__(self, config: T5Config, number: int):
        super().__init__()
        site = f"layers.{number}"
        if number == config.encoder_layers:
            self.memory_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.memory_dropout = Dropout(config.dropout, "encoder")
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, f"{site}.attention", causal=True)
        self.attention_dropout = Dropout(config.dropout, f"{site}.attention")
        self.cross_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.cross = CrossAttention(config, f"{site}.cross")
        self.cross_dropout = Dropout(config.dropout, f"{site}.cross")
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config, f"{site}.mlp")
        self.mlp_dropout = Dropout(config.dropout, f"{site}.mlp")

    def forward(self, streams: tuple[Tensor, ...], shared: Shared) -> tuple[Tensor, ...]:
        *tables, memory, x = streams
        places = shared.places
        # The first decoder layer, on whichever pipeline stage it is; the others get the result.
        if hasattr(self, "memory_norm"):
            memory = self.memory_dropout(self.memory_norm(memory), shared.source)
        attended = self.attention(self.attention_norm(x), places, shared.bias)
        normed, x = self.cross_norm(self.attention_dropout(attended, places), x)
        found = self.cross(normed, memory, shared)
        normed, x = self.mlp_norm(self.cross_dropout(found, places), x)
        return *tables, memory, x + self.mlp_dropout(self.mlp(normed, places), places)


class T5(Decoder):
    INPUT = ("embedding", "source_bias", "bias", "source_dropout", "dropout")
    OUTPUT = ("norm", "norm_dropout", "head", "loss")
    config: T5Config

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = make_embedding(config.vocab_size, config.hidden_size)
        self.source_bias = RelativeBias(config.relative_buckets, config.num_attention_heads)
        self.bias = RelativeBias(config.relative_buckets, config.num_attention_heads)
        self.source_dropout = Dropout(config.dropout, "encoder.embedding")
        self.dropout = Dropout(config.dropout, "decoder.embedding")
        self.layers = numbered(
            (EncoderLayer if number < config.encoder_layers else DecoderLayer)(config, number)
            for number in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.norm_dropout = Dropout(config.dropout, "decoder")
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.loss = CrossEntropy()

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> tuple[Tensor, ...]:
        """Return the tables of biases, and both stacks' hidden states, [B,S,D] and [B,T,D]."""
        source = _source_of(places)
        memory = self.source_dropout(self.embedding(source.tokens_BS), source.places)
        return (
            # Layers of all pipeline stages add biases to scores: the tables go along.
            self.source_bias(),
            self.bias(),
            memory,
            self.dropout(self.embedding(tokens_BT), places),
        )

    def run_layers(self, x: Streams, places: SequenceInfo) -> tuple[Tensor, ...]:
        """Run the layers that are here; behind the last stack also the final norm, whose dropout
        asks for `places`."""
        source_table, table, *_ = x
        source, numbers = _source_of(places).places, [int(name) for name in self.layers]
        # A pipeline stage may have layers of one stack only, and computes no biases for the other.
        has_encoder, has_decoder = (
            any((number < self.config.encoder_layers) == encodes for number in numbers)
            for encodes in (True, False)
        )
        shared = Shared(
            places,
            source,
            self._bias(source_table, source, both_sides=True) if has_encoder else None,
            self._bias(table, places, both_sides=False) if has_decoder else None,
        )
        for layer in self.layers.values():
            x = layer(x, shared)
        *others, last = x
        if self.norm is not None:  # the stage of the head
            last = self.norm_dropout(self.norm(last), places)
        return *others, last

    def encode(self, source: Source) -> Tensor:
        """Return the encoder's states [B,S,D] as the decoder attends to them."""
        split = self.config.encoder_layers
        x = self.source_dropout(self.embedding(source.tokens_BS), source.places)
        bias = self._bias(self.source_bias(), source.places, both_sides=True)
        shared = Shared(source.places, source.places, bias, None)
        for number in range(split):
            # An encoder's layer hands the decoder's stream on as it is.
            x, _ = self.layers[str(number)]((x, x), shared)
        first = self.layers[str(split)]
        assert isinstance(first, DecoderLayer)
        return first.memory_dropout(first.memory_norm(x), source.places)

    def takes_source(self, module: str) -> bool:
        number = int(module.split(".")[1])
        return number < self.config.encoder_layers or module.endswith(".cross.kv")

    def _bias(self, table_NH: Tensor, places: SequenceInfo, both_sides: bool) -> Tensor:
        """Return the bias of a stack's scores, [1,H,T,S]: the same within each document as in the
        whole sequence. On a context rank T are its queries, and S the whole sequence's keys."""
        c, (index_T,), index_S = self.config, places.index_BT, places.index_S
        # GPUs' kernels take biases whose rows are contiguous, and a multiple of 8 numbers apart;
        # others cost a copy in every layer, or all scores written out.
        wide_S = F.pad(index_S, (0, -len(index_S) % 8))
        found_TS = buckets(index_T, wide_S, both_sides, c.relative_buckets, c.relative_distance)
        bias_HTS = F.embedding(found_TS, table_NH).permute(2, 0, 1).contiguous()
        return bias_HTS[None, :, :, : len(index_S)]

    def final_states(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def finish(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * self.config.hidden_size**-0.5 if self.config.scale_head else x_BTD


def _source_of(places: SequenceInfo) -> Source:
    if places.source is None:
        raise ValueError(
            "an encoder-decoder needs `SequenceInfo.source`, the sequence that its encoder reads"
        )
    return places.source


def weights(config: T5Config) -> Iterator[Weight]:
    """Yield the table of weights."""
    hidden = config.hidden_size
    by_width = config.init_std * hidden**-0.5
    yield embedding_row(config, "shared.weight")
    for name, stack in (("source_bias", "encoder"), ("bias", "decoder")):
        yield Weight(
            # Its input features are heads: cut as the queries' heads are.
            f"{name}.weight", (config.relative_buckets, config.num_attention_heads),
            (f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",), "row",
            used=0.0, init=by_width,
        )  # fmt: skip
    split = config.encoder_layers
    for number in range(split):
        yield from layer_rows(number, "encoder.block", [*_attention(config), *_mlp(config, 1)])
    decoder = [*_attention(config), *_cross(config), *_mlp(config, 2)]
    for number in range(split, config.num_layers):
        if number == split:
            yield _norm(config, f"layers.{number}.memory_norm", "encoder.final_layer_norm", number)
        yield from layer_rows(number, "decoder.block", decoder, number - split)
    yield _norm(config, "norm", "decoder.final_layer_norm", "last")
    head = None if config.tie_embeddings else HEAD
    yield from head_rows(config.vocab_size, hidden, by_width, head)


def _norm(config: T5Config, name: str, hf: str, place: Place = 0) -> Weight:
    """Return the row of a norm over hidden states."""
    return Weight(
        f"{name}.weight", (config.hidden_size,), (f"{hf}.weight",), init="ones", decay=False,
        partial_grad="sequence", place=place,
    )  # fmt: skip


def _attention(config: T5Config) -> Iterator[Weight]:
    """Yield the rows of a stack's attention to itself, with T5's initial values (Raffel et al.'s
    code)."""
    hidden, std = config.hidden_size, config.init_std
    inner, unit = config.inner_heads, config.head_dim
    yield _norm(config, "attention_norm", "layer.0.layer_norm")
    yield Weight(
        "attention.qkv.weight", (3 * inner, hidden), tuple(f"layer.0.SelfAttention.{name}.weight" for name in "qkv"),
        # A deviation for each of q, k and v.
        "column", (inner, inner, inner), unit, init=(_query_std(config), std * hidden**-0.5, std * hidden**-0.5),
    )  # fmt: skip
    yield Weight(
        "attention.out.weight", (hidden, inner), ("layer.0.SelfAttention.o.weight",), "row", unit=unit,
        init=std * inner**-0.5,
    )  # fmt: skip


def _query_std(config: T5Config) -> float:
    """Return the standard deviation of queries' initial values, which make up for scores without a
    scale."""
    return config.init_std * (config.hidden_size * config.head_dim) ** -0.5


def _cross(config: T5Config) -> Iterator[Weight]:
    """Yield the rows of a decoder's attention to the encoder."""
    hidden, std = config.hidden_size, config.init_std
    inner, unit = config.inner_heads, config.head_dim
    yield _norm(config, "cross_norm", "layer.1.layer_norm")
    yield Weight(
        "cross.q.weight", (inner, hidden), ("layer.1.EncDecAttention.q.weight",), "column", unit=unit,
        init=_query_std(config),
    )  # fmt: skip
    yield Weight(
        "cross.kv.weight", (2 * inner, hidden), tuple(f"layer.1.EncDecAttention.{name}.weight" for name in "kv"),
        "column", (inner, inner), unit, init=std * hidden**-0.5,
    )  # fmt: skip
    yield Weight(
        "cross.out.weight", (hidden, inner), ("layer.1.EncDecAttention.o.weight",), "row", unit=unit,
        init=std * inner**-0.5,
    )  # fmt: skip


def _mlp(config: T5Config, number: int) -> Iterator[Weight]:
    """Yield the rows of the feed-forward part, which Hugging Face counts as `number` in its
    layer."""
    hidden, inner, std = config.hidden_size, config.intermediate_size, config.init_std
    hf = f"layer.{number}"
    names = ("wi_0", "wi_1") if config.is_gated else ("wi",)
    yield _norm(config, "mlp_norm", f"{hf}.layer_norm")
    yield Weight(
        "mlp.up.weight", (len(names) * inner, hidden), tuple(f"{hf}.DenseReluDense.{name}.weight" for name in names),
        "column", (inner,) * len(names), init=std * hidden**-0.5,
    )  # fmt: skip
    yield Weight(
        "mlp.down.weight",
        (hidden, inner),
        (f"{hf}.DenseReluDense.wo.weight",),
        "row",
        init=std * inner**-0.5,
    )


KEYS = Keys().but(
    used={
        "vocab_size": REQUIRED,
        "d_model": REQUIRED,
        "d_kv": 64,
        "d_ff": REQUIRED,
        "num_layers": REQUIRED,
        "num_decoder_layers": None,
        "num_heads": REQUIRED,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "initializer_factor": 1.0,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "scale_decoder_outputs": None,
        "n_positions": 512,
    },
    only={
        "is_encoder_decoder": True,
        "is_decoder": False,
        "pad_token_id": START,
        "decoder_start_token_id": START,
    },
    dense_act_fn="which follows from feed_forward_proj",
    is_gated_act="which follows from feed_forward_proj",
    classifier_dropout="of training alone",
    output_past="what transformers returns beside the logits",
)


def to_hf(config: T5Config) -> dict[str, Any]:
    return fields_to_hf(config, "T5ForConditionalGeneration") | {
        # transformers 4 takes the first key for both facts. 5 ties in any case, unless a head of
        # its own is stored, and reads the second.
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_head,
    }


def fields_to_hf(config: T5Config, architecture: str) -> dict[str, Any]:
    """Return the keys of config.json that T5 and mT5 share; `architecture` is transformers'
    name."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": config.head_dim,
        "d_ff": config.intermediate_size,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.num_layers - config.encoder_layers,
        "num_heads": config.num_attention_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": config.init_std,
        "feed_forward_proj": config.feed_forward,
        "n_positions": config.max_positions,
        "is_encoder_decoder": True,
        "pad_token_id": START,
        "decoder_start_token_id": START,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    scaled = hf["scale_decoder_outputs"]
    return fields_from_hf(hf, T5Config) | {
        "scale_head": hf["tie_word_embeddings"] if scaled is None else scaled
    }


def fields_from_hf(hf: dict[str, Any], config: type[T5Config]) -> dict[str, Any]:
    """Return the fields of the `model:` section that T5 and mT5 share."""
    family = config.model_fields["family"].default
    if hf["feed_forward_proj"] != "relu":
        require(hf, family, {"feed_forward_proj": GATED})
    return {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["d_model"],
        "head_dim": hf["d_kv"],
        "intermediate_size": hf["d_ff"],
        "num_layers": hf["num_layers"] + (hf["num_decoder_layers"] or hf["num_layers"]),
        "encoder_layers": hf["num_layers"],
        "num_attention_heads": hf["num_heads"],
        "relative_buckets": hf["relative_attention_num_buckets"],
        "relative_distance": hf["relative_attention_max_distance"],
        "dropout": hf["dropout_rate"],
        "norm_eps": hf["layer_norm_epsilon"],
        "init_std": hf["initializer_factor"],
        "feed_forward": hf["feed_forward_proj"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "max_positions": hf["n_positions"],
    }


MODEL, CONFIG = T5, T5Config
