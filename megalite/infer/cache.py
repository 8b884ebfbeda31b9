"""KV cache: keys and values of the tokens a model has seen, so that each further token costs the
work of one.

A cache has slots, one per sequence, written in place: in every layer [S,G,1+L,K], where S counts
the slots and L the tokens of the longest sequence so far. Padding of a batch is written to the
first cell (index 0), which nothing reads. The B rows of a forward pass each continue one slot by T
tokens. N, H, G and K are those of `models/layers.py`; C counts the cells that are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.infer.cells import (
    CacheKind,
    Cells,
    PartedCells,
    make_cells,
)
from megalite.infer.packed import pack_linears
from megalite.kernels.attention import eager_heads
from megalite.kernels.attention_kinds import AttentionKind
from megalite.kernels.library import pick
from megalite.models.core_attention import CoreAttention
from megalite.models.latent import LatentAttention
from megalite.models.layers import Decoder, SequenceInfo

READ_AT_ONCE = 32
"""The number of cells read is rounded up to a multiple of this: fewer shapes, since libraries
prepare anew for each."""


class Row(NamedTuple):
    """Holds the tokens that one sequence computes in a forward pass."""

    slot: int
    start: int
    """Number of tokens already in the cache."""
    tokens: Sequence[int]
    """The token ids that follow them."""
    length: int
    """Length of the whole sequence, which may exceed `start` plus `tokens` when a prompt is
    computed in pieces."""


@dataclass(frozen=True, kw_only=True)
class CachedSequenceInfo(SequenceInfo):
    """Holds the positions of tokens that continue sequences in the cache."""

    slot_B: Tensor
    """Slot of each row."""
    slots: slice | None
    """The rows' slots as a slice, if they are neighbours: the cache is then read without a copy."""
    cell_BT: Tensor
    """Cell of its slot that each token's keys and values are written to; 0 for padding."""
    num_cells: int
    """Number of cells that are read, the first one not counted."""
    fresh: bool
    """All rows begin here, so that tokens attend only to tokens of this forward pass."""
    biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """Attention biases already made, by window and precision."""

    def read(self, cache: Tensor) -> Tensor:
        """Return the rows' cells of a buffer [S,G,1+L,...]: [B,G,C,...]."""
        rows: slice | Tensor = self.slot_B if self.slots is None else self.slots
        return cache[rows, :, 1 : 1 + self.num_cells]

    def cells(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the first and the last cell that the single token of each row attends to, both
        [B]. `window`: of sliding-window attention, None without one."""
        last_B = self.position_BT[:, 0]
        if window is None:
            return torch.zeros_like(last_B), last_B
        return (last_B + 1 - window).clamp(min=0), last_B

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Return the causal attention bias for scores, [B,1,T,C]: 0, or -inf for hidden cells. It
        is made once for all layers that share this `window` and `dtype`."""
        if (window, dtype) not in self.biases:
            last_BT1 = self.position_BT[:, :, None]
            # Cell c holds the token at position c (the padding cell aside): a token sees cells up
            # to its own.
            cell_C = torch.arange(self.num_cells, device=last_BT1.device)
            hidden = cell_C > last_BT1
            if window is not None:
                hidden |= cell_C <= last_BT1 - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.biases[window, dtype] = bias.masked_fill_(hidden, -torch.inf)[:, None]
        return self.biases[window, dtype]


def lay_out(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, CachedSequenceInfo, Tensor]:
    """Pad `rows` to a batch on `device`. Return the tokens [B,T], their places, and the index of
    each row's last token, [B].

    A row without tokens computes along, and nothing of it is used."""
    width = max(len(row.tokens) for row in rows)
    numbers = torch.tensor([(row.slot, row.start, len(row.tokens), row.length) for row in rows])
    slot_B, start_B, count_B, length_B = numbers.T
    step_T = torch.arange(width)
    real_BT = step_T < count_B[:, None]
    # Padding gets position 0 here and cell 0 below, so that it is written where nothing reads.
    position_BT = torch.where(real_BT, start_B[:, None] + step_T, 0)
    tokens_BT = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in rows])
    first = rows[0].slot
    neighbours = [row.slot for row in rows] == list(range(first, first + len(rows)))
    highest = max(row.start + len(row.tokens) for row in rows)
    places = CachedSequenceInfo(
        step_T[None].to(device),
        position_BT.to(device),
        whole_length=length_B[:, None, None].to(device),
        slot_B=slot_B.to(device),
        slots=slice(first, first + len(rows)) if neighbours else None,
        cell_BT=torch.where(real_BT, 1 + position_BT, 0).to(device),
        # Of all rows together: what lies behind a shorter row's end is hidden by the bias.
        num_cells=-(-highest // READ_AT_ONCE) * READ_AT_ONCE,
        fresh=all(row.start == 0 for row in rows),
    )
    return tokens_BT.to(device), places, (count_B - 1).clamp(min=0).to(device)


class KVCache:
    """Continue sequences with the keys and values of their earlier tokens: the strategy of
    attention in generation."""

    def __init__(self, num_slots: int, kind: CacheKind | None = None):
        """Create it for `num_slots` sequences. Keys and values are kept in 8 bits of `kind`; None:
        as they are. The memory is allocated by the first forward pass, from whose keys and values
        the number of KV heads on this rank and their sizes are known."""
        self.keys, self.values = make_cells(num_slots, kind), make_cells(num_slots, kind)

    def attend(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        places: SequenceInfo,
        kind: AttentionKind,
        sinks_H: Tensor | None = None,
    ) -> Tensor | None:
        """Write the new keys and values to the cache and attend to all that the slot holds:
        [B,T,H·V]; None where that is no more than what is at hand, because sequences begin here or
        nothing is cached."""
        if not isinstance(places, CachedSequenceInfo):
            return None
        self.keys.write(k_BTGK, places)
        self.values.write(v_BTGV, places)
        # From its beginning a sequence has no more keys than those at hand, which the kernels of
        # training take without a bias and without copying the cache.
        if places.fresh:
            return None
        plain = sinks_H is None and k_BTGK.shape == v_BTGV.shape
        # A single query: our kernel reads each row's own cells alone, where SDPA reads those of the
        # longest row for all, and hides them by the bias.
        if q_BTHK.shape[1] == 1 and plain and pick("attention", q_BTHK) == "megalite":
            return self._attend_once(q_BTHK[:, 0], places, kind)[:, None]
        keys, values = self.keys.read(places), self.values.read(places)
        return attend(q_BTHK, keys, values, places.bias(kind.window, q_BTHK.dtype), kind, sinks_H)

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Give each slot of `targets` the first `num_tokens` of the slot of `sources` in its
        place."""
        for cells in (self.keys, self.values):
            cells.copy(sources, targets, num_tokens)

    def _attend_once(
        self, q_BHK: Tensor, places: CachedSequenceInfo, kind: AttentionKind
    ) -> Tensor:
        """Attend from one token of each row, [B,H·K], by the kernel that reads cells as they are
        stored."""
        rest = *places.cells(kind.window), kind.scale_of(q_BHK.shape[-1]), kind.softcap or 0.0
        keys, *key_scales = self.keys.stored(places)
        values, *value_scales = self.values.stored(places)
        kernel = torch.ops.megalite.decode_attention
        if key_scales:
            kernel = torch.ops.megalite.decode_quantised
        return kernel(q_BHK, keys, values, *key_scales, *value_scales, *rest).flatten(1)


def attend(
    q_BTHK: Tensor,
    k: Tensor,
    v: Tensor,
    bias_B1TC: Tensor,
    kind: AttentionKind,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Return attention outputs [B,T,H·V] for queries [B,T,H,K], keys `k` [B,G,C,K] and values `v`
    [B,G,C,V], and a bias [B,1,T,C].

    The queries of all heads that share a KV head are treated as additional tokens, so that no key
    is read twice or copied. `kind` gives scale and soft cap."""
    (batch, length, heads, _), groups = q_BTHK.shape, k.shape[1]
    shared = heads // groups
    q = q_BTHK.unflatten(2, (groups, shared)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B,G,H/G·T,K]
    # The T queries of each head one behind another; of single tokens a view does.
    bias = bias_B1TC.repeat(1, 1, shared, 1) if length > 1 else bias_B1TC.expand(-1, -1, shared, -1)
    if kind.softcap is None and sinks_H is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=kind.scale)
    else:
        # PyTorch's fused attention has no soft cap on scores (Gemma 2), and no sinks (gpt-oss).
        sinks = None
        if sinks_H is not None:  # one for each query, in the order of `q`
            sinks = sinks_H.repeat_interleave(length).view(1, groups, shared * length, 1)
        out = eager_heads(q, k, v, bias, kind, sinks=sinks)
    return out.unflatten(2, (shared, length)).permute(0, 3, 1, 2, 4).reshape(batch, length, -1)


class LatentKVCache:
    """Continue sequences with the latents of their earlier tokens: one vector of each, whatever the
    number of heads."""

    def __init__(self, num_slots: int, up: Tensor, rotated: int, kind: CacheKind | None = None):
        """Create it for `num_slots` sequences, as `KVCache` does. `up` is the weight that makes keys
        and values of latents; `rotated` counts the features of keys that have positions."""
        self.up = up
        # What has positions is not normalised as latents are, and has a scale of its own.
        sizes = up.shape[1], rotated
        self.cells = Cells(num_slots) if kind is None else PartedCells(num_slots, kind, sizes)
        """Latents [S,1,1+L,C], each with its part of keys that has positions."""

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Copy slots, as `KVCache.copy` does."""
        self.cells.copy(sources, targets, num_tokens)

    def write(self, latents_BTC: Tensor, places: SequenceInfo) -> Tensor | None:
        """Write new latents to the cache; return all that the rows' slots hold, [B,1,C,L+R], or
        None where sequences begin here or nothing is cached."""
        if not isinstance(places, CachedSequenceInfo):
            return None
        self.cells.write(latents_BTC[:, :, None], places)
        return None if places.fresh else self.cells.read(places)

    def attend(
        self,
        q_BTHC: Tensor,
        keys_B1SC: Tensor,
        value_size: int,
        places: SequenceInfo,
        kind: AttentionKind,
    ) -> Tensor:
        """Attend to latents as to keys whose first features are the values; see
        `models.latent.LatentCache`."""
        assert isinstance(places, CachedSequenceInfo)
        bias = places.bias(kind.window, q_BTHC.dtype)
        return attend(q_BTHC, keys_B1SC, keys_B1SC[..., :value_size], bias, kind)


def add_cache(model: nn.Module, num_slots: int, kind: CacheKind | None = None) -> None:
    """Give every causal attention of `model` a KV cache of `num_slots` slots, in place: latent
    attention one of latents, unless adapters change what makes keys and values of these. Others see
    their whole source in every forward pass. `kind`: how many bits are kept (None: the model's)."""
    latent = [module for module in model.modules() if isinstance(module, LatentAttention)]
    # With adapters keys and values come of a weight and its update, not of `kv.weight` alone.
    latent = [module for module in latent if getattr(module.kv, "updates", None) is None]
    for attention in latent:
        attention.cache = LatentKVCache(num_slots, attention.kv.weight, attention.turned, kind)
    others = {module.core for module in latent}
    for module in model.modules():
        if isinstance(module, CoreAttention) and module.kind.causal and module not in others:
            module.strategy = KVCache(num_slots, kind)


def copy_slots(
    model: nn.Module, sources: Sequence[int], targets: Sequence[int], num_tokens: int
) -> None:
    """Copy slots in every cache of `model`, as `KVCache.copy` does."""
    for module in model.modules():
        for cache in (getattr(module, "strategy", None), getattr(module, "cache", None)):
            if isinstance(cache, KVCache | LatentKVCache):
                cache.copy(sources, targets, num_tokens)


class CachedModel:
    """Runs an unsharded model on one device with a KV cache, as a `batch.Predictor`. The model is
    modified in place."""

    def __init__(
        self,
        model: Decoder,
        num_slots: int,
        max_length: int | None = None,
        kv_cache: CacheKind | None = None,
    ):
        """Take over `model` and give it a cache of `num_slots` sequences, in 8 bits of `kv_cache`
        (None: in the model's precision). `max_length` limits prompt and answer together; None, or
        more than the model's `max_positions`, means `max_positions`."""
        self.model, self.num_slots, self.vocab_size = model, num_slots, model.config.vocab_size
        self.capacity = min(max_length or model.config.max_positions, model.config.max_positions)
        self.turning_points = model.config.architecture.turning_points
        self.device = next(model.parameters()).device
        add_cache(model, num_slots, kv_cache)
        pack_linears(model)

    @torch.inference_mode()
    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        """Return the next-token logits behind the token `last_B` of each row of `tokens_BT`, fp32
        [B,V], and cache keys and values at `places`."""
        x_BTD = self.model.run_layers(self.model.embed(tokens_BT, places), places)
        # Only one position per row goes through the output layer, whose [T,V] logits would be the
        # largest tensor of all.
        x_B1D = x_BTD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
        return self.model.predict(x_B1D)[:, 0].float()

    @torch.inference_mode()
    def logits(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        """Return the next-token logits behind every token, [B,T,V]. The cache is left alone."""
        return self.model(tokens_BT, places)

    @torch.inference_mode()
    def copy_slots(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Copy cached sequences between slots."""
        copy_slots(self.model, sources, targets, num_tokens)
