"""Keys and values of the tokens a model has seen, so that each further token costs the work of one.

A cache has slots, one a sequence, written in place: in every layer [S,G,1+L,K], where S counts the slots and L the
tokens of the longest sequence so far. What pads a row of a batch is written to the first cell, which nothing reads. B
rows of a forward pass go on with a slot each, T tokens at a time; N, H, G and K are those of `models/layers.py`, C
counts the cells that are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.infer.packed import pack_linears
from megalite.kernels.attention import AttentionKind
from megalite.kernels.library import pick
from megalite.models.layers import CausalAttention, Decoder, Places
from megalite.models.rope import LongRope

READ_AT_ONCE = 32
"""Cells that are read are a multiple of it: fewer shapes, for which libraries prepare anew."""
FEWEST_CELLS = 256


class Row(NamedTuple):
    """What a sequence has computed in a forward pass."""

    slot: int
    start: int
    """Tokens that are in the cache already."""
    tokens: Sequence[int]
    """Those behind them."""
    length: int
    """Of the whole sequence, which may have more tokens than are computed at a time."""


@dataclass(frozen=True, kw_only=True)
class CachedPlaces(Places):
    """Where tokens stand that go on with sequences in the cache."""

    slot_B: Tensor
    slots: slice | None
    """The slots of the rows, where they are neighbours: they are read where they lie."""
    cell_BT: Tensor
    """Where in its slot each token's keys and values are written."""
    num_cells: int
    """Cells that are used, the first one left out."""
    fresh: bool
    """The rows begin here: they attend to nothing that is not in them."""
    biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def read(self, cache_SGLK: Tensor) -> Tensor:
        """[B,G,C,K]"""
        rows: slice | Tensor = self.slot_B if self.slots is None else self.slots
        return cache_SGLK[rows, :, 1 : 1 + self.num_cells]

    def cells(self, window: int | None) -> tuple[Tensor, Tensor]:
        """The first and the last cell that the one token of each row attends to, [B]."""
        last_B = self.position_BT[:, 0]
        return torch.zeros_like(last_B) if window is None else (last_B + 1 - window).clamp(min=0), last_B

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """What is added to scores, [B,1,T,C]; made once for all layers that have this window."""
        if (window, dtype) not in self.biases:
            last_BT1 = self.position_BT[:, :, None]
            cell_C = torch.arange(self.num_cells, device=last_BT1.device)
            hidden = cell_C > last_BT1
            if window is not None:
                hidden |= cell_C <= last_BT1 - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self.biases[window, dtype] = bias[:, None]
        return self.biases[window, dtype]


def lay_out(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, CachedPlaces, Tensor]:
    """The tokens of rows [B,T], shorter ones filled up; where they stand; the place in its row of each last one, [B].
    A row without tokens computes along for nothing."""
    width = max(len(row.tokens) for row in rows)
    numbers = torch.tensor([(row.slot, row.start, len(row.tokens), row.length) for row in rows])
    slot_B, start_B, count_B, length_B = numbers.T
    step_T = torch.arange(width)
    real_BT = step_T < count_B[:, None]
    position_BT = torch.where(real_BT, start_B[:, None] + step_T, 0)
    tokens_BT = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in rows])
    first = rows[0].slot
    neighbours = [row.slot for row in rows] == list(range(first, first + len(rows)))
    highest = max(row.start + len(row.tokens) for row in rows)
    places = CachedPlaces(
        step_T.to(device),
        position_BT.to(device),
        whole_length=length_B[:, None, None].to(device),
        slot_B=slot_B.to(device),
        slots=slice(first, first + len(rows)) if neighbours else None,
        cell_BT=torch.where(real_BT, 1 + position_BT, 0).to(device),
        num_cells=-(-highest // READ_AT_ONCE) * READ_AT_ONCE,
        fresh=all(row.start == 0 for row in rows),
    )
    return tokens_BT.to(device), places, (count_B - 1).clamp(min=0).to(device)


class CachedAttention(CausalAttention):
    """Attention that goes on with sequences in its cache. Tokens at other places it treats as the attention that it
    replaces does."""

    def __init__(self, kind: AttentionKind, num_slots: int):
        super().__init__(kind=kind)
        self.num_slots = num_slots
        self.cache: Tensor | None = None
        """Keys and values, [2,S,G,1+L,K], of as many heads as this rank turns out to have."""

    def forward(self, qkv_BTNK: Tensor, num_heads: int, num_kv_heads: int, places: Places) -> Tensor:
        if not isinstance(places, CachedPlaces):
            return super().forward(qkv_BTNK, num_heads, num_kv_heads, places)
        q, *kv = qkv_BTNK.split((num_heads, num_kv_heads, num_kv_heads), dim=2)
        keys, values = self._holding(1 + places.num_cells, kv[0])
        for cache, new in ((keys, kv[0]), (values, kv[1])):
            cache[places.slot_B[:, None], :, places.cell_BT] = new
        if places.fresh:
            return super().forward(qkv_BTNK, num_heads, num_kv_heads, places)
        read = places.read(keys), places.read(values)
        if q.shape[1] == 1 and pick("attention", q) == "megalite":
            scale, softcap = self.kind.scale or q.shape[-1] ** -0.5, self.kind.softcap or 0.0
            ends = places.cells(self.kind.window)
            return torch.ops.megalite.decode_attention(q[:, 0], *read, *ends, scale, softcap).flatten(1)[:, None]
        return attend(q, *read, places.bias(self.kind.window, q.dtype), self.kind)

    def _holding(self, num_cells: int, like_BTGK: Tensor) -> Tensor:
        """The cache, grown to so many cells at least."""
        old = self.cache
        if old is None or old.shape[3] < num_cells:
            grown = max(num_cells, FEWEST_CELLS, 0 if old is None else 2 * old.shape[3])
            # Zeros, since what is hidden is multiplied by 0, which does not take away what is not a number.
            (*_, groups, size), slots = like_BTGK.shape, self.num_slots
            self.cache = like_BTGK.new_zeros(2, slots, groups, grown, size)
            if old is not None:
                self.cache[:, :, :, : old.shape[3]] = old
        assert self.cache is not None
        return self.cache


def attend(q_BTHK: Tensor, k: Tensor, v: Tensor, bias_B1TC: Tensor, kind: AttentionKind) -> Tensor:
    """→ [B,T,H·K], of keys and values [B,G,C,K]. The queries of all heads that share keys are taken as so many more
    tokens, so that no key is read twice, or copied."""
    (batch, length, heads, _), groups = q_BTHK.shape, k.shape[1]
    shared = heads // groups
    q = q_BTHK.unflatten(2, (groups, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B,G,H/G·T,K]
    bias = bias_B1TC.repeat(1, 1, shared, 1) if length > 1 else bias_B1TC.expand(-1, -1, shared, -1)
    if kind.softcap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=kind.scale)
    else:
        scores = (q @ k.transpose(-1, -2)).float() * (kind.scale or q.shape[-1] ** -0.5)
        scores = (scores / kind.softcap).tanh() * kind.softcap + bias
        out = scores.softmax(-1).to(v.dtype) @ v
    return out.unflatten(2, (shared, length)).permute(0, 3, 1, 2, 4).reshape(batch, length, -1)


def add_cache(model: nn.Module, num_slots: int) -> None:
    """Give every attention of a model a cache, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CausalAttention):
                setattr(parent, name, CachedAttention(child.kind, num_slots))


def turning_point(config: Any) -> int | None:
    """Tokens beyond which a model encodes all positions in another way, so that what is in its cache is of no more
    use."""
    scaling = getattr(config, "rope_scaling", None)
    return scaling.original_max_positions if isinstance(scaling, LongRope) else None


class CachedModel:
    """A clean model on one device, which is taken over and gets a cache; see `batch.Predictor`."""

    def __init__(self, model: Decoder, num_slots: int, max_length: int | None = None):
        """`max_length`: of a sequence, prompt and answer; at most, and if left out, that which the model is for."""
        self.model, self.num_slots, self.vocab_size = model, num_slots, model.config.vocab_size
        self.capacity = min(max_length or model.config.max_positions, model.config.max_positions)
        self.turning_point = turning_point(model.config)
        self.device = next(model.parameters()).device
        add_cache(model, num_slots)
        pack_linears(model)

    @torch.inference_mode()
    def predict(self, tokens_BT: Tensor, places: CachedPlaces, last_B: Tensor) -> Tensor:
        x_BTD = self.model.run_layers(self.model.embed(tokens_BT, places), places)
        x_B1D = x_BTD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
        return self.model.predict(x_B1D)[:, 0].float()

    @torch.inference_mode()
    def logits(self, tokens_BT: Tensor, places: Places) -> Tensor:
        return self.model(tokens_BT, places)
