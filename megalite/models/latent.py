"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads are made from one
small vector of each token, its latent, and positions are in a part of the queries and keys of their
own, which all heads share for keys.

Letters in shapes, beside those of layers.py: L latent, P features of a head without positions, R
features with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
import torch.nn as nn
from pydantic import Field, model_validator
from torch import Tensor

from megalite.kernels.attention_kinds import AttentionKind
from megalite.kernels.rope import rotate
from megalite.models import rope
from megalite.models.architecture import LatentSpec
from megalite.models.core_attention import CoreAttention
from megalite.models.layers import RMSNorm, SequenceInfo
from megalite.models.llama import LlamaLike, Shared, residual_std
from megalite.models.weights import Weight

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents, whatever the model's is, as in transformers."""


class LatentConfig(LlamaLike):
    """Fields of families with latent attention."""

    kv_lora_rank: int = Field(gt=0, description="Features of the latent of keys and values.")
    q_lora_rank: int | None = Field(
        None, gt=0, description="Features of the latent of queries. null: they have none."
    )
    qk_nope_head_dim: int = Field(
        gt=0, description="Features of a head's queries and keys without positions."
    )
    qk_rope_head_dim: int = Field(
        gt=0, description="Features of a head's queries and keys with positions."
    )
    v_head_dim: int = Field(gt=0, description="Features of a head's values.")
    rope_interleave: bool = Field(
        True, description="Rotate neighbouring features as pairs, not those of two halves."
    )

    ROPE: ClassVar[rope.Names] = rope.Names(kinds=("yarn",))

    @model_validator(mode="after")
    def _every_head_has_its_keys(self) -> LatentConfig:
        if self.num_kv_heads not in (0, self.num_attention_heads):
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} must be num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim not in (0, self.qk_rope_head_dim):
            raise ValueError(
                f"head_dim {self.head_dim} must be qk_rope_head_dim {self.qk_rope_head_dim}, or left out"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_size(self) -> int:
        return self.qk_rope_head_dim

    def attention(self, layer: int) -> AttentionKind:
        scaling = self.rope_scaling
        if (
            not isinstance(scaling, rope.YarnScaling)
            or not scaling.mscale_all_dim
            or scaling.factor == 1
        ):
            return AttentionKind(scale=self.head_size**-0.5)
        # Not in the cosines and sines, which keys and queries without positions do not meet.
        # YaRN's temperature, squared, as it would have scaled both queries and keys.
        factor = 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0
        return AttentionKind(scale=self.head_size**-0.5 * factor**2)

    def mixer(self, layer: int) -> LatentSpec:
        return LatentSpec(
            num_heads=self.num_attention_heads, num_kv_heads=self.num_attention_heads, head_size=self.head_size,
            value_size=self.v_head_dim, scale=self.attention(layer).scale, kv_rank=self.kv_lora_rank,
            q_rank=self.q_lora_rank, rope_size=self.rotary_size,
        )  # fmt: skip


class LatentCache(Protocol):
    """Keeps the latents of earlier tokens in generation."""

    up: Tensor
    """The weight that makes keys and values of latents."""

    def write(self, latents_BTC: Tensor, places: SequenceInfo) -> Tensor | None:
        """Keep the latents of the tokens at `places`; return all that their sequences have, as keys
        [B,1,S,C] that all heads share. None where there are no others than those at hand."""

    def attend(
        self,
        q_BTHC: Tensor,
        keys_B1SC: Tensor,
        value_size: int,
        places: SequenceInfo,
        kind: AttentionKind,
    ) -> Tensor:
        """Attend to `keys`, whose first `value_size` features are the values:
        [B,T,H·value_size]."""


class _Heads(torch.autograd.Function):
    """Put heads together as one tensor [B,T,3·H,C], with which attention is fused, and writes no
    scores, on every device. What is shorter than C, the larger of K and V, ends in zeros.

    Written in place: a copy of each part on the way would be as large as the result."""

    @staticmethod
    def forward(ctx: Any, q_BTHK: Tensor, kv_BTHF: Tensor, k_BTR: Tensor) -> Tensor:
        """Take queries, the part without positions P of keys and values V beside each other, and
        the keys' part with positions R = K - P, which all heads share."""
        heads, keys, rotated = *q_BTHK.shape[2:], k_BTR.shape[-1]
        plain = keys - rotated
        value = kv_BTHF.shape[-1] - plain
        ctx.sizes = plain, rotated, value
        qkv_BTNC = q_BTHK.new_empty(*q_BTHK.shape[:2], 3 * heads, max(keys, value))
        q_BTHC, k_BTHC, v_BTHC = qkv_BTNC.chunk(3, 2)
        q_BTHC[..., :keys] = q_BTHK
        k_BTHC[..., :plain] = kv_BTHF[..., :plain]
        k_BTHC[..., plain:keys] = k_BTR[:, :, None]
        v_BTHC[..., :value] = kv_BTHF[..., plain:]
        for x_BTHC, size in ((q_BTHC, keys), (k_BTHC, keys), (v_BTHC, value)):
            x_BTHC[..., size:] = 0
        return qkv_BTNC

    @staticmethod
    def backward(ctx: Any, grad_BTNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain, rotated, value = ctx.sizes
        q_BTHC, k_BTHC, v_BTHC = grad_BTNC.chunk(3, 2)
        kv_BTHF = torch.cat((k_BTHC[..., :plain], v_BTHC[..., :value]), -1)
        keys = plain + rotated
        return q_BTHC[..., :keys], kv_BTHF, k_BTHC[..., plain:keys].sum(2)


class LatentAttention(nn.Module):
    """Attention whose keys and values come from latents."""

    def __init__(self, config: LatentConfig, layer: int):
        super().__init__()
        heads, hidden, latent = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
        self.plain, self.turned = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value = config.v_head_dim
        self.interleaved = config.rope_interleave
        queries = config.q_lora_rank
        self.q_a = nn.Linear(hidden, queries, bias=False) if queries else None
        self.q_norm = RMSNorm(queries, LATENT_EPS) if queries else None
        self.q = nn.Linear(queries or hidden, heads * (self.plain + self.turned), bias=False)
        self.kv_a = nn.Linear(hidden, latent + self.turned, bias=False)
        self.kv_norm = RMSNorm(latent, LATENT_EPS)
        self.kv = nn.Linear(latent, heads * (self.plain + self.value), bias=False)
        self.core = CoreAttention(kind=config.attention(layer))
        self.out = nn.Linear(heads * self.value, hidden, bias=False)
        # Parallelism sets this: all heads share the keys' part with positions, which enters their
        # region on its own.
        self.enter: Callable[[Tensor], Tensor] = lambda x: x
        self.cache: LatentCache | None = None
        """Set in generation."""

    def forward(self, x_BTD: Tensor, shared: Shared) -> Tensor:
        if self.cache is not None:
            return self.out(self.attend_to_latents(self.cache, x_BTD, shared))
        # In a function of their own, so that what heads are put together from is freed before they
        # attend.
        return self.out(self.attend(self.heads(x_BTD, shared), shared.places))

    def attend_to_latents(self, cache: LatentCache, x_BTD: Tensor, shared: Shared) -> Tensor:
        """Attend to the latents in the cache, [B,T,H·V]. What makes keys of latents is multiplied
        with the queries, and what makes values with the result (DeepSeek-V2, section 2.1.2), so
        that no head has keys or values of its own."""
        q_BTHK, latent_BTL, k_BTR = self.project(x_BTD, shared)
        keys_B1SC = cache.write(torch.cat((latent_BTL, k_BTR), -1), shared.places)
        if keys_B1SC is None:
            return self.attend(self.expand(q_BTHK, latent_BTL, k_BTR), shared.places)
        q_BTHP, q_BTHR = q_BTHK.split((self.plain, self.turned), -1)
        keys_HPL, values_HVL = cache.up.unflatten(0, (-1, self.plain + self.value)).split(
            (self.plain, self.value), 1
        )
        q_BTHC = torch.cat((torch.einsum("bthp,hpl->bthl", q_BTHP, keys_HPL), q_BTHR), -1)
        # 1/√ of the size that heads have, which is not that of these queries.
        kind = replace(self.core.kind, scale=self.core.kind.scale_of(self.plain + self.turned))
        size = latent_BTL.shape[-1]
        out = cache.attend(q_BTHC, keys_B1SC, size, shared.places, kind)
        return torch.einsum("bthl,hvl->bthv", out.unflatten(-1, (-1, size)), values_HVL).flatten(2)

    def heads(self, x_BTD: Tensor, shared: Shared) -> Tensor:
        """Return queries, keys and values of the heads on this rank, [B,T,3·H,C]."""
        return self.expand(*self.project(x_BTD, shared))

    def expand(self, q_BTHK: Tensor, latent_BTL: Tensor, k_BTR: Tensor) -> Tensor:
        """Return what `heads` does, from what `project` does."""
        kv_BTHF = self.kv(latent_BTL).unflatten(-1, (-1, self.plain + self.value))
        return _Heads.apply(q_BTHK, kv_BTHF, k_BTR)

    def project(self, x_BTD: Tensor, shared: Shared) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [B,T,H,K] of the heads on this rank, latents [B,T,L], and the part of keys
        with positions [B,T,R]."""
        # Down to the latents (replicated linears), then up to the heads of this rank
        # (column-parallel).
        from_BTL = (
            x_BTD if self.q_a is None or self.q_norm is None else self.q_norm(self.q_a(x_BTD))
        )
        q_BTHK = self.q(from_BTL)
        # The last R features are the keys' positional part: one for all heads, and not normalized.
        latent_BTL, k_BTR = self.kv_a(x_BTD).split((self.kv_norm.weight.numel(), self.turned), -1)
        q_BTHP, q_BTHR = q_BTHK.unflatten(-1, (-1, self.plain + self.turned)).split(
            (self.plain, self.turned), -1
        )
        cos_sin = shared.rope_cos_sin[0]
        # As one head of its own; every head of this rank then gets the same rotated features.
        k_BTR = self.rotate(self.enter(k_BTR.contiguous())[:, :, None], cos_sin)[:, :, 0]
        q_BTHK = torch.cat((q_BTHP, self.rotate(q_BTHR, cos_sin)), -1)
        # contiguous: the norm's kernel takes rows without gaps.
        return q_BTHK, self.kv_norm(latent_BTL.contiguous()), k_BTR

    def attend(self, qkv_BTNC: Tensor, places: SequenceInfo) -> Tensor:
        """Attend within what `heads` returns: [B,T,H·V]."""
        heads = qkv_BTNC.shape[2] // 3
        out_BTHC = self.core(qkv_BTNC, heads, heads, places).unflatten(-1, (heads, -1))
        # Zeros behind the values gave zeros behind the outputs.
        return out_BTHC[..., : self.value].flatten(2)

    def rotate(self, x_BTNR: Tensor, cos_sin: rope.CosSin) -> Tensor:
        """Rotate the part of heads that has positions."""
        heads = x_BTNR.shape[2]
        if self.interleaved:  # neighbours to where `rotate` looks for pairs
            x_BTNR = x_BTNR.unflatten(-1, (-1, 2)).transpose(-1, -2)
        copy = x_BTNR.clone(memory_format=torch.contiguous_format)  # it is rotated in place
        return rotate(copy.flatten(2), self.turned, heads, *cos_sin)


def latent_rows(config: LatentConfig) -> tuple[Weight, ...]:
    """Return the rows of latent attention. What makes latents is replicated, and used on the tokens
    that a rank has between blocks."""
    hidden, std = config.hidden_size, config.init_std
    latent, queries = config.kv_lora_rank, config.q_lora_rank
    heads, rotated = config.num_attention_heads, config.qk_rope_head_dim
    key, pair = config.head_size, config.qk_nope_head_dim + config.v_head_dim

    def norm(name: str, hf: str, size: int) -> Weight:
        return Weight(
            f"attention.{name}.weight", (size,), (f"self_attn.{hf}.weight",), init="ones", decay=False,
            partial_grad="sequence",
        )  # fmt: skip

    def down(name: str, hf: str, size: int) -> Weight:
        return Weight(
            f"attention.{name}.weight",
            (size, hidden),
            (f"self_attn.{hf}.weight",),
            init=std,
            partial_grad="sequence",
        )

    def up(name: str, hf: str, unit: int, size: int) -> Weight:
        shape, names = (heads * unit, size), (f"self_attn.{hf}.weight",)
        return Weight(f"attention.{name}.weight", shape, names, "column", unit=unit, init=std)

    from_latent = [] if queries is None else [
        down("q_a", "q_a_proj", queries), norm("q_norm", "q_a_layernorm", queries), up("q", "q_b_proj", key, queries)
    ]  # fmt: skip
    return (
        *(from_latent or [up("q", "q_proj", key, hidden)]),
        down("kv_a", "kv_a_proj_with_mqa", latent + rotated),
        norm("kv_norm", "kv_a_layernorm", latent),
        up("kv", "kv_b_proj", pair, latent),
        Weight(
            "attention.out.weight", (hidden, heads * config.v_head_dim), ("self_attn.o_proj.weight",), "row",
            unit=config.v_head_dim, init=residual_std(config),
        ),
    )  # fmt: skip
