"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases, dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn as nn
from pydantic import Field, model_validator
from torch import Tensor

from megalite.config import ModelConfig
from megalite.kernels.activation import gelu
from megalite.kernels.attention_kinds import AttentionKind
from megalite.models.architecture import Architecture, AttentionSpec, FeedForwardSpec, LayerSpec
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.hf import REQUIRED, Keys, agreed
from megalite.models.layers import (
    CrossEntropy,
    Decoder,
    LayerNorm,
    SequenceInfo,
    make_embedding,
    numbered,
)
from megalite.models.llama import residual_std
from megalite.models.weights import Weight, embedding_row, head_rows, layer_rows
from megalite.plan import Place


class GPT2Like(ModelConfig):
    """Fields that GPT-2 and BERT share."""

    intermediate_size: int = Field(0, ge=0, description="Width of the MLP. 0: 4 × hidden_size.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of attention's weights.")
    hidden_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout of what attention and the MLP give."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> GPT2Like:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self

    @property
    def inner_size(self) -> int:
        return self.intermediate_size or 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def is_causal(self) -> bool:
        """Return whether tokens attend to none behind them."""
        return self.PREDICTS == "causal"

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """Return the activation between the matrices of the MLP."""
        return gelu

    def describe(self) -> Architecture:
        attention = AttentionSpec(
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_attention_heads,
            head_size=self.head_size,
            value_size=self.head_size,
            causal=self.is_causal,
            dropout=self.attention_dropout,
        )
        layer = LayerSpec(
            attention, FeedForwardSpec(inner=self.inner_size, gated=False, activation="gelu")
        )
        layers = (layer,) * self.num_layers
        return Architecture(layers=layers, norm="layer", hidden_dropout=self.hidden_dropout)


class GPT2Config(GPT2Like):
    family: Literal["gpt2"] = "gpt2"
    tie_embeddings: bool = True
    embedding_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the embeddings.")


class Attention(nn.Module):
    """Multi-head attention on one fused projection of queries, keys and values, to earlier tokens
    or, in an encoder, to all of a document."""

    def __init__(self, config: GPT2Like, site: str):
        super().__init__()
        self.head_size = config.head_size
        # One product for queries, keys and values, all of H heads: N = 3H.
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)
        dropout = Dropout(config.attention_dropout, f"{site}.probabilities", over_heads=True)
        self.core = CoreAttention(dropout, AttentionKind(causal=config.is_causal))

    def forward(self, x_BTD: Tensor, places: SequenceInfo) -> Tensor:
        qkv_BTNK = self.qkv(x_BTD).unflatten(-1, (-1, self.head_size))
        heads = qkv_BTNK.shape[2] // 3  # all, or the share of a tensor rank
        return self.out(self.core(qkv_BTNK, heads, heads, places))


class MLP(nn.Module):
    """MLP without a gate."""

    def __init__(self, config: GPT2Like):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.inner_size)
        self.down = nn.Linear(config.inner_size, config.hidden_size)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_and_down_proj(self.up(x))

    def activation_and_down_proj(self, up: Tensor) -> Tensor:
        """Apply the activation and the down projection; recomputed as one under `train.recompute:
        selective`."""
        return self.down(self.activation(up))


class Layer(nn.Module):
    """Pre-norm layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config: GPT2Config, index: int):
        super().__init__()
        site = f"layers.{index}"
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, f"{site}.attention")
        self.attention_dropout = Dropout(config.hidden_dropout, f"{site}.attention")
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_dropout = Dropout(config.hidden_dropout, f"{site}.mlp")

    def forward(self, x: Tensor, places: SequenceInfo) -> Tensor:
        attended = self.attention_dropout(self.attention(self.attention_norm(x), places), places)
        # One fused operation: the sum goes on as the residual stream, its norm into the MLP.
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp_dropout(self.mlp(normed), places)


class GPT2(Decoder):
    INPUT, OUTPUT = ("embedding", "positions", "dropout"), ("norm", "head", "loss")

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.embedding = make_embedding(config.vocab_size, config.hidden_size)
        self.positions = make_embedding(config.max_positions, config.hidden_size)
        self.dropout = Dropout(config.embedding_dropout, "embedding")
        self.layers = numbered(Layer(config, i) for i in range(config.num_layers))
        self.norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.loss = CrossEntropy()

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        return self.dropout(self.embedding(tokens_BT) + self.positions(places.position_BT), places)

    def shared(self, places: SequenceInfo, dtype: torch.dtype) -> SequenceInfo:
        return places


def weights(config: GPT2Config) -> Iterator[Weight]:
    """Yield the table of weights."""
    hidden, inner, std = config.hidden_size, config.inner_size, config.init_std
    # Conv1D stores [in, out], a linear module has [out, in].
    linear, out_std = partial(linear_rows, transpose=True), residual_std(config)
    # c_attn is stored fused already, [q; k; v]; tensor parallelism cuts each third on its own.
    thirds = (hidden, hidden, hidden)
    qkv, square, head = (3 * hidden, hidden), (hidden, hidden), config.head_size
    layer = (
        *norm_rows("attention_norm", "ln_1", hidden),
        *linear("attention.qkv", ("attn.c_attn",), qkv, "column", std, thirds, head),
        *linear("attention.out", ("attn.c_proj",), square, "row", out_std, unit=head),
        *norm_rows("mlp_norm", "ln_2", hidden),
        *linear("mlp.up", ("mlp.c_fc",), (inner, hidden), "column", std),
        *linear("mlp.down", ("mlp.c_proj",), (hidden, inner), "row", out_std),
    )
    yield embedding_row(config, "transformer.wte.weight")
    yield Weight(
        "positions.weight",
        (config.max_positions, hidden),
        ("transformer.wpe.weight",),
        used=0.0,
        init=std,
        partial_grad="sequence",
    )
    for i in range(config.num_layers):
        yield from layer_rows(i, "transformer.h", layer)
    yield from norm_rows("norm", "transformer.ln_f", hidden, "last")
    hf_head = None if config.tie_embeddings else "lm_head.weight"
    yield from head_rows(config.vocab_size, hidden, std, hf_head)


def norm_rows(name: str, hf: str, size: int, place: Place = 0) -> Iterator[Weight]:
    """Yield the rows of a LayerNorm: scale and shift."""
    for part, init in (("weight", "ones"), ("bias", "zeros")):
        yield Weight(
            f"{name}.{part}", (size,), (f"{hf}.{part}",), init=init, decay=False,  # type: ignore[arg-type]
            partial_grad="sequence", place=place,
        )  # fmt: skip


def linear_rows(
    name: str,
    hf: tuple[str, ...],
    shape: tuple[int, int],
    shard: Literal["column", "row"] | None,
    std: float,
    parts: tuple[int, ...] = (),
    unit: int = 1,
    place: Place = 0,
    transpose: bool = False,
) -> Iterator[Weight]:
    """Yield the rows of a linear module: matrix and bias. `hf` are the Hugging Face modules that it
    is made of, whose matrices have input features first where `transpose`.

    What is not cut by output features sees a cut sequence under sequence parallelism: there its
    gradient is partial."""
    # Only a column-parallel bias is cut; a row-parallel one is added once, behind the reduction.
    cut = shard == "column"
    matrix, bias = (tuple(f"{module}.{part}" for module in hf) for part in ("weight", "bias"))
    partial_grad: Literal["sequence"] | None = None if shard else "sequence"
    yield Weight(
        f"{name}.weight",
        shape,
        matrix,
        shard,
        parts,
        unit,
        transpose,
        init=std,
        place=place,
        partial_grad=partial_grad,
    )
    yield Weight(
        f"{name}.bias", shape[:1], bias, "column" if cut else None, parts, unit if cut else 1,
        init="zeros", decay=False, place=place, partial_grad=None if cut else "sequence",
    )  # fmt: skip


_SUMMARY = "of a head for multiple choice, which is not read"
KEYS = Keys().but(
    used={
        "vocab_size": REQUIRED,
        "n_positions": None,
        "n_ctx": None,
        "n_embd": None,
        "n_layer": None,
        "n_head": None,
        "n_inner": None,
        # transformers reads these too, and prefers them to those above.
        "max_position_embeddings": None,
        "hidden_size": None,
        "num_hidden_layers": None,
        "num_attention_heads": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
    },
    only={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    reorder_and_upcast_attn="the precision of the scores in half precision",
    summary_type=_SUMMARY,
    summary_use_proj=_SUMMARY,
    summary_activation=_SUMMARY,
    summary_proj_to_labels=_SUMMARY,
    summary_first_dropout=_SUMMARY,
    summary_last_dropout=_SUMMARY,
)


def to_hf(config: GPT2Config) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        # transformers' own way to say 4 × n_embd.
        "n_inner": config.intermediate_size or None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.hidden_dropout,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return {
        "family": "gpt2",
        "vocab_size": hf["vocab_size"],
        "hidden_size": agreed(hf, "n_embd", "hidden_size"),
        "intermediate_size": hf["n_inner"] or 0,
        "num_layers": agreed(hf, "n_layer", "num_hidden_layers"),
        "num_attention_heads": agreed(hf, "n_head", "num_attention_heads"),
        # transformers does not read n_ctx, but a file in which it differs meant something by it.
        "max_positions": agreed(hf, "n_positions", "max_position_embeddings", copies=("n_ctx",)),
        "norm_eps": hf["layer_norm_epsilon"],
        "init_std": hf["initializer_range"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "embedding_dropout": hf["embd_pdrop"],
        "attention_dropout": hf["attn_pdrop"],
        "hidden_dropout": hf["resid_pdrop"],
    }


MODEL, CONFIG = GPT2, GPT2Config
