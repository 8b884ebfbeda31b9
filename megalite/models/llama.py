"""Llama 2, 3 and kin: RMSNorm, rotary positions, SwiGLU, grouped-query attention (Touvron et al.
2023, Dubey et al. 2024). Families that grew out of it share its modules, its rows and its mappings,
and say what they do otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn as nn
from pydantic import Field, model_validator
from torch import Tensor

from megalite.config import ModelConfig
from megalite.kernels.activation import geglu, swiglu
from megalite.kernels.attention_kinds import AttentionKind
from megalite.kernels.rope import rotate
from megalite.models import rope
from megalite.models.architecture import (
    Architecture,
    AttentionSpec,
    FeedForwardSpec,
    LayerSpec,
    MixerSpec,
)
from megalite.models.core_attention import CoreAttention
from megalite.models.hf import SIZES, Keys, check_padding
from megalite.models.layers import (
    CrossEntropy,
    Decoder,
    LayerNorm,
    RMSNorm,
    SequenceInfo,
    make_embedding,
    numbered,
)
from megalite.models.weights import Weight, embedding_row, head_rows, layer_rows
from megalite.plan import Place


class Biases(NamedTuple):
    """Which linear modules of a layer have biases."""

    qkv: bool = False
    out: bool = False
    mlp: bool = False


class LlamaLike(ModelConfig):
    """Fields of Llama and kin. Names in capitals, methods and properties are not settings but
    belong to the family; here they have Llama's values."""

    intermediate_size: int = Field(gt=0)
    num_kv_heads: int = Field(
        0, ge=0, description="Key/value heads. 0: as many as num_attention_heads."
    )
    head_dim: int = Field(
        0, ge=0, description="Size of a head. 0: hidden_size / num_attention_heads."
    )
    rope_theta: float = Field(10_000.0, gt=0, description="RoPE base.")
    rope_scaling: rope.Scaling | None = None

    GATE: ClassVar[Literal["silu", "gelu"]] = "silu"
    NORM: ClassVar[type[RMSNorm] | type[LayerNorm]] = RMSNorm
    NUM_NORMS: ClassVar[int] = 2
    """Norms of hidden states in a layer."""
    HEAD_NORMS: ClassVar[bool] = False
    """Whether queries and keys are normalized."""
    ROPE: ClassVar[rope.Names] = rope.Names()
    HEADS_DIVIDE: ClassVar[bool] = False
    """Whether transformers opens the family only where the hidden size is a multiple of the heads,
    even with a head_dim."""

    @model_validator(mode="after")
    def _opens_in_transformers(self) -> LlamaLike:
        if self.rope_scaling and self.rope_scaling.type not in self.ROPE.kinds:
            allowed = ", ".join(self.ROPE.kinds)
            raise ValueError(
                f"rope_scaling.type {self.rope_scaling.type}: transformers opens {self.family} with {allowed}"
            )
        scaling = self.rope_scaling
        if isinstance(scaling, rope.YarnScaling) and self.rope_theta <= 1:
            raise ValueError(
                f"rope_scaling.type yarn needs a rope_theta above 1, not {self.rope_theta}"
            )
        if isinstance(scaling, rope.DynamicScaling):
            # config.json has no place for another length.
            longest = rope.longest(scaling.original_max_positions, scaling.factor)
            if self.max_positions != longest:
                raise ValueError(
                    f"max_positions {self.max_positions} must be {longest}: rope_scaling.factor × its original ones"
                )
            if self.rotary_size < 4:
                raise ValueError(
                    f"rope_scaling.type dynamic needs more than the {self.rotary_size} rotated numbers"
                )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> LlamaLike:
        if (self.HEADS_DIVIDE or not self.head_dim) and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not self.rotary_size or self.rotary_size % 2:
            raise ValueError(
                f"heads of size {self.rotary_size} cannot be rotated in pairs: the size must be even; it "
                f"follows from hidden_size {self.hidden_size} and num_attention_heads {self.num_attention_heads}"
            )
        if isinstance(self.rope_scaling, rope.LongRope):
            for name in ("short_factor", "long_factor"):
                if (count := len(getattr(self.rope_scaling, name))) != self.rotary_size // 2:
                    raise ValueError(
                        f"rope_scaling.{name} has {count} numbers for {self.rotary_size // 2} pairs"
                    )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_kv_heads {self.kv_heads}"
            )
        return self

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Return how many numbers of a head are rotated."""
        return self.head_size

    @property
    def ropes(self) -> tuple[rope.Rope, ...]:
        """Return the ways to encode positions that layers choose from, by `turn`."""
        scaling, longest = self.rope_scaling, self.max_positions
        return (rope.Rope(self.rotary_size, self.rope_theta, scaling, longest),)

    @property
    def biases(self) -> Biases:
        return Biases()

    def window(self, layer: int) -> int | None:
        """Return how many tokens each token of a layer attends to at most; None: all before it."""
        return None

    def attention(self, layer: int) -> AttentionKind:
        """Return window, soft cap and scale of a layer's attention."""
        return AttentionKind(window=self.window(layer))

    def turn(self, layer: int) -> int | None:
        """Return which of the `ropes` a layer takes; None where it encodes no positions."""
        return 0

    def mixer(self, layer: int) -> MixerSpec:
        """Describe how a layer mixes tokens."""
        kind = self.attention(layer)
        return AttentionSpec(
            num_heads=self.num_attention_heads,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            value_size=self.head_size,
            window=kind.window,
            softcap=kind.softcap,
            scale=kind.scale,
            causal=kind.causal,
            rope_size=0 if self.turn(layer) is None else self.rotary_size,
            head_norms=self.HEAD_NORMS,
        )

    def feed_forward(self, layer: int) -> FeedForwardSpec:
        """Describe the feed-forward part of a layer."""
        return FeedForwardSpec(inner=self.intermediate_size, gated=True, activation=self.GATE)

    def describe(self) -> Architecture:
        """Describe the model by the `mixer` and the `feed_forward` of each layer."""
        numbers = range(self.num_layers)
        layers = tuple(
            LayerSpec(self.mixer(n), self.feed_forward(n), self.NUM_NORMS) for n in numbers
        )
        scaling = self.rope_scaling
        return Architecture(
            layers=layers,
            norm="layer" if issubclass(self.NORM, LayerNorm) else "rms",
            turning_points=rope.turning_points(scaling, self.max_positions),
        )


class Biased(LlamaLike):
    """Fields of families whose linear modules may have biases."""

    attention_bias: bool = Field(False, description="Give attention's projections biases.")
    mlp_bias: bool = Field(False, description="Give the MLP's projections biases.")

    @property
    def biases(self) -> Biases:
        return Biases(self.attention_bias, self.attention_bias, self.mlp_bias)


class LlamaConfig(Biased):
    family: Literal["llama"] = "llama"
    init_std: float = Field(0.02, gt=0, le=1)  # transformers opens no Llama with more

    HEADS_DIVIDE: ClassVar[bool] = True


class Shared(NamedTuple):
    """What all layers need besides the hidden states: cos/sin tables and places."""

    rope_cos_sin: tuple[rope.CosSin, ...]
    places: SequenceInfo


class Attention(nn.Module):
    """Grouped-query attention with RoPE, on one fused projection of queries, keys and values."""

    def __init__(self, config: LlamaLike, layer: int):
        super().__init__()
        heads, groups = config.num_attention_heads, config.kv_heads
        self.head_size = config.head_size
        self.heads_per_group, self.turn = heads // groups, config.turn(layer)
        # Rows: all queries, then all keys, then all values. Cut over tensor ranks each on its own
        # (`parts` of the table's row), so that every rank has heads and their keys in this same
        # order.
        self.qkv = nn.Linear(
            config.hidden_size, (heads + 2 * groups) * self.head_size, bias=config.biases.qkv
        )
        self.core = CoreAttention(kind=config.attention(layer), num_heads=heads)
        self.out = nn.Linear(heads * self.head_size, config.hidden_size, bias=config.biases.out)

    def forward(self, x_BTD: Tensor, shared: Shared) -> Tensor:
        qkv = self.qkv(x_BTD)
        # Head counts follow from the projection's output: all heads, or a tensor rank's share.
        groups = qkv.shape[2] // self.head_size // (self.heads_per_group + 2)
        heads = groups * self.heads_per_group
        qkv = self.normalize(qkv, heads, groups)
        if self.turn is None:
            qkv_BTNK = qkv.unflatten(-1, (-1, self.head_size))
        else:
            # Only queries and keys are rotated: they come first, and the values behind them stay.
            qkv_BTNK = rotate(qkv, self.head_size, heads + groups, *shared.rope_cos_sin[self.turn])
        return self.out(self.core(qkv_BTNK, heads, groups, shared.places))

    def normalize(self, qkv: Tensor, heads: int, groups: int) -> Tensor:
        """Return queries and keys as they are before RoPE, and values: [B,T,N·K]. `heads` and
        `groups` are those on this rank."""
        return qkv


class HeadNormAttention(Attention):
    """Attention that normalises each head's queries and keys, all heads by one weight (Qwen3, Gemma
    3)."""

    def __init__(self, config: LlamaLike, layer: int):
        super().__init__(config, layer)
        self.q_norm = config.NORM(self.head_size, config.norm_eps)
        self.k_norm = config.NORM(self.head_size, config.norm_eps)

    def normalize(self, qkv: Tensor, heads: int, groups: int) -> Tensor:
        q, k, v = qkv.unflatten(-1, (-1, self.head_size)).split((heads, groups, groups), dim=2)
        # By head of size K: tensor ranks hold whole heads, so nothing is communicated.
        return torch.cat((self.q_norm(q), self.k_norm(k), v), dim=2).flatten(2)


class MLP(nn.Module):
    """Gated MLP (SwiGLU or GeGLU), on one fused gate and up projection."""

    def __init__(self, config: LlamaLike, inner: int | None = None):
        """`inner`: its inner features, where they are not `config.intermediate_size`."""
        super().__init__()
        inner = inner or config.intermediate_size
        self.gate_up = nn.Linear(config.hidden_size, 2 * inner, bias=config.biases.mlp)
        self.down = nn.Linear(inner, config.hidden_size, bias=config.biases.mlp)
        # […, 2I] → […, I]; the first half of the product's features is the gate.
        self.gate = {"silu": swiglu, "gelu": geglu}[config.GATE]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_and_down_proj(self.gate_up(x))

    def activation_and_down_proj(self, gate_up: Tensor) -> Tensor:
        """Apply the activation and the down projection; recomputed as one under `train.recompute:
        selective`."""
        return self.down(self.gate(gate_up))


class Layer(nn.Module):
    """Pre-norm layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: LlamaLike, attention: nn.Module):
        super().__init__()
        self.attention_norm: nn.Module = config.NORM(config.hidden_size, config.norm_eps)
        self.attention = attention
        self.mlp_norm = config.NORM(config.hidden_size, config.norm_eps)
        self.mlp: nn.Module = MLP(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.attention(self.attention_norm(x), shared)
        # One fused operation: the sum goes on as the residual stream, its norm into the MLP.
        # normed = norm(x + attended), x = x + attended: one pass over the stream in place of two.
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp(normed)


class Llama(Decoder):
    """Decoder of Llama and kin; families override `layer`."""

    INPUT: tuple[str, ...] = ("embedding",)
    OUTPUT: tuple[str, ...] = ("norm", "head", "loss")
    config: LlamaLike

    def __init__(self, config: LlamaLike):
        super().__init__()
        self.config = config
        self.embedding = make_embedding(config.vocab_size, config.hidden_size)
        self.layers = numbered(self.layer(number) for number in range(config.num_layers))
        self.norm = config.NORM(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.loss = CrossEntropy()
        self.ropes = config.ropes

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, Attention(self.config, number))

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        return self.embedding(tokens_BT)

    def shared(self, places: SequenceInfo, dtype: torch.dtype) -> Shared:
        # Of documents that stand beside others, `length` is that of each document.
        tables = (each.cos_sin(places.position_BT, places.length) for each in self.ropes)
        return Shared(tuple(tables), places)


def weights(config: LlamaLike) -> Iterator[Weight]:
    """Yield the table of weights."""
    yield from table(config, layer_table(config))


def layer_table(
    config: LlamaLike,
    attention: Sequence[Weight] | None = None,
    mlp: Sequence[Weight] | None = None,
) -> tuple[Weight, ...]:
    """Return the rows of one layer: Llama's, except for those of `attention` and `mlp` that are
    given."""
    return (
        *norm_rows(config, "attention_norm", "input_layernorm"),
        *(attention_rows(config) if attention is None else attention),
        *norm_rows(config, "mlp_norm", "post_attention_layernorm"),
        *(mlp_rows(config) if mlp is None else mlp),
    )


def attention_rows(
    config: LlamaLike,
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    norms: Sequence[Weight] = (),
    hf_out: str = "o_proj",
) -> tuple[Weight, ...]:
    """Return the rows of attention. `qkv` names the Hugging Face modules that make up the
    projection, `hf_out` that of the output; `norms` are rows between them."""
    q = config.num_attention_heads * config.head_size
    kv = config.kv_heads * config.head_size
    # `unit` keeps a head whole where tensor parallelism cuts; `parts` cuts q, k and v apart.
    parts, unit, std = (q, kv, kv), config.head_size, config.init_std
    names = {
        kind: tuple(f"self_attn.{module}.{kind}" for module in qkv) for kind in ("weight", "bias")
    }
    shape = (q + 2 * kv, config.hidden_size)
    matrix = Weight("attention.qkv.weight", shape, names["weight"], "column", parts, unit, init=std)
    bias = Weight(
        "attention.qkv.bias", shape[:1], names["bias"], "column", parts, unit, init="zeros", decay=False
    )  # fmt: skip
    out = Weight(
        # Whole heads of input features, as `qkv` gives them.
        "attention.out.weight", (config.hidden_size, q), (f"self_attn.{hf_out}.weight",), "row", unit=unit,
        init=residual_std(config),
    )  # fmt: skip
    out_bias = row_bias("attention.out", f"self_attn.{hf_out}", config.hidden_size)
    rows = [matrix]
    if config.biases.qkv:
        rows.append(bias)
    rows += [*norms, out]
    if config.biases.out:
        rows.append(out_bias)
    return tuple(rows)


def row_bias(name: str, hf: str, size: int) -> Weight:
    """Return the row of a row-parallel linear module's bias. It is added after the reduction, on
    the cut sequence."""
    return Weight(
        f"{name}.bias", (size,), (f"{hf}.bias",), init="zeros", decay=False, partial_grad="sequence"
    )


def head_norm_rows(config: LlamaLike) -> tuple[Weight, ...]:
    """Return the rows of the norms in `HeadNormAttention`."""
    # One weight for all heads, of which each tensor rank has some: hence a part of its gradient.
    names = [f"{part}_norm.weight" for part in "qk"]
    return tuple(
        Weight(
            f"attention.{name}", (config.head_size,), (f"self_attn.{name}",), init=config.NORM.INIT, decay=False,
            partial_grad="heads",
        )
        for name in names
    )  # fmt: skip


def mlp_rows(
    config: LlamaLike,
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj"),
    inner: int | None = None,
    name: str = "mlp",
    hf: str = "mlp",
) -> tuple[Weight, ...]:
    """Return the rows of an MLP. `gate_up` names the Hugging Face modules that make up its first
    projection; `inner` is as in `MLP`; the module is called `name` here and `hf` by Hugging
    Face."""
    hidden, inner = config.hidden_size, inner or config.intermediate_size
    names = {
        kind: tuple(f"{hf}.{module}.{kind}" for module in gate_up) for kind in ("weight", "bias")
    }
    # `parts`: a tensor rank has the gates and the ups of the same features.
    shape, halves = (2 * inner, hidden), (inner, inner)
    first, biased = f"{name}.gate_up", config.biases.mlp
    bias = Weight(
        f"{first}.bias", shape[:1], names["bias"], "column", halves, init="zeros", decay=False
    )
    return (
        Weight(f"{first}.weight", shape, names["weight"], "column", halves, init=config.init_std),
        *[bias] * biased,
        Weight(
            f"{name}.down.weight",
            (hidden, inner),
            (f"{hf}.down_proj.weight",),
            "row",
            init=residual_std(config),
        ),
        *[row_bias(f"{name}.down", f"{hf}.down_proj", hidden)] * biased,
    )


def norm_rows(config: LlamaLike, name: str, hf: str, place: Place = 0) -> tuple[Weight, ...]:
    """Return the rows of a norm as `norm_row` does, with that of its bias where it has one."""
    weight = norm_row(config, name, hf, place)
    shifts = issubclass(config.NORM, LayerNorm) and config.NORM.SHIFTS
    return (weight, *[replace(row_bias(name, hf, config.hidden_size), place=place)] * shifts)


def norm_row(config: LlamaLike, name: str, hf: str, place: Place = 0) -> Weight:
    """Return the row of a norm over hidden states, called `name` here and `hf` by Hugging Face.
    Under sequence parallelism each tensor rank has a part of its gradient."""
    return Weight(
        f"{name}.weight", (config.hidden_size,), (f"{hf}.weight",), init=config.NORM.INIT, decay=False,
        partial_grad="sequence", place=place,
    )  # fmt: skip


class Names(NamedTuple):
    """Hugging Face's names of a model's modules."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    head_bias: str | None = None
    """Name of the tensor; None: the head has none."""


NAMES = Names()


def table(
    config: LlamaLike,
    layer: Sequence[Weight] | Callable[[int], Sequence[Weight]],
    names: Names = NAMES,
) -> Iterator[Weight]:
    """Yield the whole table, from the rows of one layer, or from a function that gives those of
    each."""
    yield embedding_row(config, f"{names.embedding}.weight")
    # In the order of a forward pass: engines fill their buckets from the end of this table.
    for i in range(config.num_layers):
        yield from layer_rows(i, names.layers, layer(i) if callable(layer) else layer)
    yield from norm_rows(config, "norm", names.norm, "last")
    head = None if config.tie_embeddings else f"{names.head}.weight"
    vocabulary, hidden, std = config.vocab_size, config.hidden_size, config.init_std
    yield from head_rows(vocabulary, hidden, std, head, names.head_bias)


def residual_std(config: ModelConfig) -> float:
    """Return the standard deviation of projections that add to the residual stream, which keeps its
    variance (GPT-2, Megatron)."""
    return config.init_std / math.sqrt(2 * config.num_layers)


LIKE_LLAMA = Keys().but(
    used={
        **SIZES,
        "num_key_value_heads": None,
        "head_dim": None,
        "original_max_position_embeddings": None,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": None,
        "pad_token_id": None,
    },
    only={
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "mlp_bias": False,
    },
)
"""Keys of families that grew out of Llama."""
WITH_BIASES = LIKE_LLAMA.but(used={"attention_bias": False, "mlp_bias": False})
"""Keys of those whose linear modules may have biases."""
KEYS = WITH_BIASES


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    return biased_to_hf(config, "LlamaForCausalLM")


def biased_to_hf(config: Biased, architecture: str) -> dict[str, Any]:
    """Return the keys of config.json that `fields_to_hf` does, and what has biases."""
    biases = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return fields_to_hf(config, architecture) | biases


def fields_to_hf(config: LlamaLike, architecture: str, activation: str = "silu") -> dict[str, Any]:
    """Return the keys of config.json that all kin share; `architecture` and `activation` are
    transformers' names."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        # Families that have no such key take it out again.
        "attention_bias": False,
        "attention_dropout": 0.0,
        **rope.to_hf(config.ROPE, config.rope_theta, config.rope_scaling),
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return biased_from_hf(hf, LlamaConfig)


def biased_from_hf(hf: dict[str, Any], config: type[Biased]) -> dict[str, Any]:
    """Return the fields of the `model:` section that `fields_from_hf` does, and what has biases."""
    biases = {"attention_bias": hf["attention_bias"], "mlp_bias": hf["mlp_bias"]}
    return fields_from_hf(hf, config) | biases


def fields_from_hf(hf: dict[str, Any], config: type[LlamaLike]) -> dict[str, Any]:
    """Return the fields of the `model:` section that all kin share."""
    check_padding(hf)
    family = config.model_fields["family"].default
    return {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_kv_heads": hf["num_key_value_heads"] or hf["num_attention_heads"],
        "head_dim": hf["head_dim"] or hf["hidden_size"] // hf["num_attention_heads"],
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "init_std": hf["initializer_range"],
        "tie_embeddings": hf["tie_word_embeddings"],
        **rope.from_hf(hf, family, config.ROPE),
    }


MODEL, CONFIG = Llama, LlamaConfig
