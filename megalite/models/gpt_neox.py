"""GPT-NeoX and Pythia (Black et al. 2022, Biderman et al. 2023): Llama's attention with partial RoPE, LayerNorm, GELU,
biases, and attention and MLP in parallel on one residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from megalite.kernels.activation import gelu
from megalite.models import rope
from megalite.models.architecture import FeedForwardSpec
from megalite.models.hf import REQUIRED, Keys, require
from megalite.models.layers import LayerNorm, RMSNorm
from megalite.models.llama import Attention, Llama, LlamaLike, Shared, residual_std
from megalite.models.weights import Weight, layer_rows
from megalite.plan import Place

TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")
"""Names that transformers has for GELU's tanh approximation."""


class GPTNeoXConfig(LlamaLike):
    family: Literal["gpt_neox"] = "gpt_neox"
    rotary_pct: float = Field(0.25, gt=0, le=1, description="Share of each head that is rotated by RoPE.")
    parallel_residual: bool = Field(
        True, description="Attention and MLP take the same input. false: the MLP comes after attention."
    )
    tanh_gelu: bool = Field(False, description="Use GELU's tanh approximation.")

    QKV_BIAS: ClassVar[bool] = True
    OUT_BIAS: ClassVar[bool] = True
    NORM: ClassVar[type[RMSNorm] | type[LayerNorm]] = LayerNorm
    ROPE: ClassVar[rope.Names] = rope.Names(theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25)

    @model_validator(mode="after")
    def _plain_heads(self) -> GPTNeoXConfig:
        if self.kv_heads != self.num_attention_heads or self.head_size * self.num_attention_heads != self.hidden_size:
            raise ValueError("gpt_neox has as many num_kv_heads as num_attention_heads, and together they fill a token")
        return self

    @property
    def rotary_size(self) -> int:
        """Return how many numbers of a head are rotated."""
        return int(self.head_size * self.rotary_pct)

    def feed_forward(self, layer: int) -> FeedForwardSpec:
        return FeedForwardSpec(inner=self.intermediate_size, gated=False, activation="gelu")


class MLP(nn.Module):
    def __init__(self, config: GPTNeoXConfig):
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = gelu if config.tanh_gelu else F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_and_down_proj(self.up(x))

    def activation_and_down_proj(self, up: Tensor) -> Tensor:
        """Apply the activation and the down projection; recomputed as one under `train.recompute: selective`."""
        return self.down(self.activation(up))


class Layer(nn.Module):
    """Pre-norm layer whose attention and MLP take the same input, or where `parallel_residual` is off, one after the
    other."""

    def __init__(self, config: GPTNeoXConfig, number: int):
        super().__init__()
        self.parallel = config.parallel_residual
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, number)
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.attention(self.attention_norm(x), shared)
        if self.parallel:
            # Both read the same x, so there is no sum between them to fuse a norm with.
            return x + attended + self.mlp(self.mlp_norm(x))
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp(normed)


class GPTNeoX(Llama):
    config: GPTNeoXConfig

    def layer(self, number: int) -> nn.Module:
        return Layer(self.config, number)


def weights(config: GPTNeoXConfig) -> Iterator[Weight]:
    """Yield the table of weights."""
    hidden, inner, std = config.hidden_size, config.intermediate_size, config.init_std
    unit, shape = config.head_size, (config.vocab_size, hidden)
    layer = (
        *_norm("attention_norm", "input_layernorm", hidden),
        *_column("attention.qkv", "attention.query_key_value", (3 * hidden, hidden), std, (hidden,) * 3, unit),
        *_row("attention.out", "attention.dense", (hidden, hidden), residual_std(config), unit),
        *_norm("mlp_norm", "post_attention_layernorm", hidden),
        *_column("mlp.up", "mlp.dense_h_to_4h", (inner, hidden), std),
        *_row("mlp.down", "mlp.dense_4h_to_h", (hidden, inner), residual_std(config)),
    )
    ends: Place = "both" if config.tie_embeddings else "first"
    used = float(config.tie_embeddings)
    yield Weight("embedding.weight", shape, ("gpt_neox.embed_in.weight",), "vocab", used=used, init=std, place=ends)
    for i in range(config.num_layers):
        yield from layer_rows(i, "gpt_neox.layers", layer)
    yield from _norm("norm", "gpt_neox.final_layer_norm", hidden, "last")
    if not config.tie_embeddings:
        yield Weight("head.weight", shape, ("embed_out.weight",), "vocab", init=std, place="last")


def _norm(name: str, hf: str, size: int, place: Place = 0) -> Iterator[Weight]:
    """Return the rows of a LayerNorm: weight and bias."""
    for part, init in (("weight", "ones"), ("bias", "zeros")):
        yield Weight(
            f"{name}.{part}", (size,), (f"{hf}.{part}",), init=init, decay=False,  # type: ignore[arg-type]
            partial_grad="sequence", place=place,
        )  # fmt: skip


def _column(
    name: str, hf: str, shape: tuple[int, int], std: float, parts: tuple[int, ...] = (), unit: int = 1
) -> Iterator[Weight]:
    """Return the rows of a column-parallel linear. With `parts`, Hugging Face stores those of the first head before
    those of the second."""
    # NeoX stores q, k, v of head 0, then those of head 1, …: not all queries first, as here.
    by_unit = bool(parts)
    yield Weight(f"{name}.weight", shape, (f"{hf}.weight",), "column", parts, unit, by_unit=by_unit, init=std)
    yield Weight(
        f"{name}.bias", shape[:1], (f"{hf}.bias",), "column", parts, unit, by_unit=by_unit, init="zeros", decay=False
    )


def _row(name: str, hf: str, shape: tuple[int, int], std: float, unit: int = 1) -> Iterator[Weight]:
    """Return the rows of a row-parallel linear. Its bias is added after the reduction, on the cut sequence."""
    yield Weight(f"{name}.weight", shape, (f"{hf}.weight",), "row", unit=unit, init=std)
    yield Weight(f"{name}.bias", shape[:1], (f"{hf}.bias",), init="zeros", decay=False, partial_grad="sequence")


KEYS = Keys().but(
    used={
        "vocab_size": REQUIRED,
        "hidden_size": REQUIRED,
        "intermediate_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "gelu",
        "max_position_embeddings": REQUIRED,
        "original_max_position_embeddings": None,
        "layer_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "rotary_pct": None,
        "rotary_emb_base": None,
        "partial_rotary_factor": None,
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": None,
    },
    only={
        "attention_bias": True,
        "attention_dropout": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout": 0.0,
        "hidden_dropout_prob": 0.0,
    },
)


def to_hf(config: GPTNeoXConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": "gelu_new" if config.tanh_gelu else "gelu",
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **rope.to_hf(config.ROPE, config.rope_theta, config.rope_scaling, config.rotary_pct),
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    if hf["hidden_act"] not in ("gelu", *TANH):
        require(hf, "gpt_neox", {"hidden_act": "gelu"})
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    for key, value in (("num_key_value_heads", heads), ("head_dim", hidden // heads)):
        require(hf, "gpt_neox", {key: value})
    return {
        "family": "gpt_neox",
        "vocab_size": hf["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf["layer_norm_eps"],
        "init_std": hf["initializer_range"],
        "tie_embeddings": hf["tie_word_embeddings"],
        "parallel_residual": hf["use_parallel_residual"],
        "tanh_gelu": hf["hidden_act"] in TANH,
        "rotary_pct": rope.rotary_share(hf, GPTNeoXConfig.ROPE),
        **rope.from_hf(hf, "gpt_neox", GPTNeoXConfig.ROPE),
    }


MODEL, CONFIG = GPTNeoX, GPTNeoXConfig
