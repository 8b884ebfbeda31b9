"""Llama 2, 3 and kin: RMSNorm, rotary positions, SwiGLU, grouped-query attention (Touvron et al. 2023, Dubey et al.
2024)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn as nn
from pydantic import Field, model_validator
from torch import Tensor

from megalite.config import ConfigError, ModelConfig, Section
from megalite.kernels.activation import swiglu
from megalite.kernels.rope import rotate
from megalite.models.layers import CausalAttention, CrossEntropy, Decoder, Places, RMSNorm, numbered
from megalite.models.weights import Weight, layer_rows
from megalite.plan import Place


class RopeScaling(Section):
    """Llama 3.1's stretching of the rotary frequencies to longer sequences than were trained on."""

    factor: float = Field(gt=0)
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


class LlamaConfig(ModelConfig):
    family: Literal["llama"] = "llama"
    intermediate_size: int = Field(gt=0)
    num_kv_heads: int = Field(0, ge=0, description="0: as many as num_attention_heads")
    head_dim: int = Field(0, ge=0, description="0: hidden_size / num_attention_heads")
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> LlamaConfig:
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"heads of size {self.head_size} cannot be rotated in pairs: the size must be even")
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


def rope_frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Radians per position of each pair of a head: [K/2] fp32."""
    exponent = torch.arange(0, config.head_size, 2, device=device).float() / config.head_size
    frequency = config.rope_theta**-exponent
    if (scaling := config.rope_scaling) is None:
        return frequency
    # Waves that turn often within the original length are kept, slow ones are slowed by `factor`, the rest is blended.
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return frequency * (smooth + (1 - smooth) / scaling.factor)


class Shared(NamedTuple):
    """What all layers need: cosine and sine of the rotary angles, fp32 [B or 1,T,K/2], and the places."""

    rope: tuple[Tensor, Tensor]
    places: Places


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        heads, groups, self.head_size = config.num_attention_heads, config.kv_heads, config.head_size
        self.heads_per_group = heads // groups
        self.qkv = nn.Linear(config.hidden_size, (heads + 2 * groups) * self.head_size, bias=False)
        self.core = CausalAttention()
        self.out = nn.Linear(heads * self.head_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, shared: Shared) -> Tensor:
        qkv = self.qkv(x_BTD)
        # Head counts follow from what the projection gave: all heads, or the share of a tensor rank.
        groups = qkv.shape[2] // self.head_size // (self.heads_per_group + 2)
        heads = groups * self.heads_per_group
        qkv_BTNK = rotate(qkv, self.head_size, heads + groups, *shared.rope)
        return self.out(self.core(qkv_BTNK, heads, groups, shared.places))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shrink(self.gate_up(x))

    def shrink(self, gate_up: Tensor) -> Tensor:
        return self.down(swiglu(gate_up))


class Layer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, shared: Shared) -> Tensor:
        attended = self.attention(self.attention_norm(x), shared)
        normed, x = self.mlp_norm(attended, x)
        return x + self.mlp(normed)


class Llama(Decoder):
    INPUT, OUTPUT = ("embedding",), ("norm", "head", "loss")

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = numbered(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.loss = CrossEntropy()

    def embed(self, tokens_BT: Tensor, places: Places) -> Tensor:
        return self.embedding(tokens_BT)

    def shared(self, places: Places, dtype: torch.dtype) -> Shared:
        frequency_K = rope_frequencies(self.config, places.position_BT.device)
        angle_BTK = places.position_BT[..., None] * frequency_K
        return Shared((angle_BTK.cos(), angle_BTK.sin()), places)


def weights(config: LlamaConfig) -> Iterator[Weight]:
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    std = config.init_std
    residual_std = std / math.sqrt(2 * config.num_layers)  # keeps the residual stream's variance (GPT-2, Megatron)
    attention, mlp = "self_attn", "mlp"
    layer = (
        _norm("attention_norm.weight", "input_layernorm.weight", hidden),
        Weight(
            "attention.qkv.weight",
            (q + 2 * kv, hidden),
            tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
            "column",
            parts=(q, kv, kv),
            unit=config.head_size,
            init=std,
        ),
        Weight(
            "attention.out.weight",
            (hidden, q),
            (f"{attention}.o_proj.weight",),
            "row",
            unit=config.head_size,
            init=residual_std,
        ),
        _norm("mlp_norm.weight", "post_attention_layernorm.weight", hidden),
        Weight(
            "mlp.gate_up.weight",
            (2 * inner, hidden),
            (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
            "column",
            parts=(inner, inner),
            init=std,
        ),
        Weight("mlp.down.weight", (hidden, inner), (f"{mlp}.down_proj.weight",), "row", init=residual_std),
    )
    ends: Place = "both" if config.tie_embeddings else "first"
    yield Weight("embedding.weight", (vocab, hidden), ("model.embed_tokens.weight",), "vocab", init=std, place=ends)
    for i in range(config.num_layers):
        yield from layer_rows(i, "model.layers", layer)
    yield _norm("norm.weight", "model.norm.weight", hidden, "last")
    if not config.tie_embeddings:
        yield Weight("head.weight", (vocab, hidden), ("lm_head.weight",), "vocab", init=std, place="last")


def _norm(name: str, hf: str, size: int, place: Place = 0) -> Weight:
    return Weight(name, (size,), (hf,), init="ones", decay=False, partial_grad=True, place=place)


def to_hf(config: LlamaConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        scaling = config.rope_scaling.model_dump()
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": scaling.pop("original_max_positions")}
        rope |= scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        # transformers 5 reads `rope_parameters`; transformers 4 and vLLM read the two keys it replaced.
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"} if config.rope_scaling else None,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    for key, only in {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}.items():
        if hf.get(key, only) != only:
            raise ConfigError(f"config.json has {key} = {hf[key]!r}; the llama family supports {only!r}")
    rope = hf.get("rope_parameters") or {**(hf.get("rope_scaling") or {}), "rope_theta": hf.get("rope_theta", 10_000.0)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ConfigError(f"config.json has rope_type = {kind!r}; the llama family supports 'default' and 'llama3'")
    scaling = None
    if kind == "llama3":
        scaling = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling["original_max_positions"] = rope["original_max_position_embeddings"]
    return {
        "family": "llama",
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "num_kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_dim": hf.get("head_dim") or 0,
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf["rms_norm_eps"],
        "init_std": hf.get("initializer_range", 0.02),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "rope_scaling": scaling,
    }


MODEL, CONFIG = Llama, LlamaConfig
