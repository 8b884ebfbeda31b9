"""What a KV cache keeps of each token and head: numbers of the model's precision, or numbers of 8
bits with a scale.

Letters in shapes are those of infer/cache.py: S slots, G heads, L tokens, K features of a head; the
rows B of a forward pass write T tokens, and read C cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from megalite.models.architecture import Architecture, LatentSpec

if TYPE_CHECKING:
    from megalite.infer.cache import CachedSequenceInfo

CacheKind = Literal["int8", "fp8"]
CACHE_KINDS: tuple[CacheKind, ...] = ("int8", "fp8")
LARGEST: dict[CacheKind, float] = {"int8": 127.0, "fp8": 448.0}
"""The number that the largest feature of a token and head is stored as."""
FEWEST_CELLS = 256
"""Cells per slot that a cache starts with."""


class Quantised(NamedTuple):
    """Holds numbers of 8 bits, [..., K], and the scale of each of their rows, [...]."""

    numbers: Tensor
    scales: Tensor


def quantise(x: Tensor, kind: CacheKind) -> Quantised:
    """Round each row of `x` [..., K] to 8 bits by its largest absolute value. Scales have the dtype
    of `x`, to which they are rounded before anything is divided by them."""
    scales = (x.abs().amax(-1).float() / LARGEST[kind]).to(x.dtype)
    # Of a row of zeros, which any scale gives back; but 0 / 0 is NaN.
    scales = scales.masked_fill(scales == 0, 1.0)
    numbers = x.float() / scales.float()[..., None]
    # The rounded scale may be a little smaller than it was.
    numbers = numbers.clamp(-LARGEST[kind], LARGEST[kind])
    if kind == "int8":
        return Quantised(numbers.round().to(torch.int8), scales)
    return Quantised(numbers.to(torch.float8_e4m3fn), scales)


def dequantise(found: Quantised) -> Tensor:
    """Return what quantised rows stand for, [..., K], in the dtype of their scales."""
    return found.numbers.to(found.scales.dtype) * found.scales[..., None]


def written(old: Tensor | None, new: Tensor, places: CachedSequenceInfo, num_slots: int) -> Tensor:
    """Return the buffer [S,G,1+L,...] with `new` [B,T,G,...] written to it, grown where it was too
    short."""
    cache, num_cells = old, 1 + places.num_cells
    if old is None or cache is None or old.shape[2] < num_cells:
        # Doubling keeps the total cost of copying linear in the length.
        grown = max(num_cells, FEWEST_CELLS, 0 if old is None else 2 * old.shape[2])
        # Zeros, not uninitialized memory: hidden cells are multiplied by 0, and 0 times NaN is NaN.
        cache = new.new_zeros(num_slots, new.shape[2], grown, *new.shape[3:])
        if old is not None:
            cache[:, :, : old.shape[2]] = old
    # Indexing [B,1] and [B,T] around a slice gives [B,T,G,...]: each token to its slot and cell.
    cache[places.slot_B[:, None], :, places.cell_BT] = new
    return cache


def _copy_slots(
    cache: Tensor | None, sources: Sequence[int], targets: Sequence[int], num_tokens: int
) -> None:
    """Copy the first tokens of slots of a buffer to others, in place."""
    if cache is not None:
        # Indexing copies first, so that a slot may be both a source and a target.
        cache[targets, :, : 1 + num_tokens] = cache[sources, :, : 1 + num_tokens]


class Cells:
    """Keep keys, or values, as they are."""

    def __init__(self, num_slots: int):
        """Create it for `num_slots` sequences. Memory is allocated by the first that are written."""
        self.num_slots = num_slots
        self.numbers: Tensor | None = None
        """[S,G,1+L,K]"""

    def write(self, new_BTGK: Tensor, places: CachedSequenceInfo) -> None:
        """Write the features of new tokens to their cells."""
        self.numbers = written(self.numbers, new_BTGK, places, self.num_slots)

    def read(self, places: CachedSequenceInfo) -> Tensor:
        """Return all that the rows' slots hold, [B,G,C,K]."""
        return self.stored(places)[0]

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Give each slot of `targets` the first `num_tokens` of the slot of `sources` in its
        place."""
        _copy_slots(self.numbers, sources, targets, num_tokens)

    def stored(self, places: CachedSequenceInfo) -> tuple[Tensor, ...]:
        """Return the same as it is stored."""
        assert self.numbers is not None
        return (places.read(self.numbers),)


class QuantisedCells(Cells):
    """Keep keys, or values, in 8 bits, with a scale for each token and head."""

    def __init__(self, num_slots: int, kind: CacheKind):
        """Create it as `Cells`."""
        super().__init__(num_slots)
        self.kind = kind
        self.scales: Tensor | None = None
        """[S,G,1+L]"""

    def write(self, new_BTGK: Tensor, places: CachedSequenceInfo) -> None:
        found = quantise(new_BTGK, self.kind)
        # As bytes: not every device copies numbers of fp8 by index.
        old = None if self.numbers is None else self.numbers.view(torch.int8)
        numbers = written(old, found.numbers.view(torch.int8), places, self.num_slots)
        self.numbers = numbers.view(found.numbers.dtype)
        self.scales = written(self.scales, found.scales, places, self.num_slots)

    def read(self, places: CachedSequenceInfo) -> Tensor:
        return dequantise(Quantised(*self.stored(places)))

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        numbers = None if self.numbers is None else self.numbers.view(torch.int8)
        for cache in (numbers, self.scales):
            _copy_slots(cache, sources, targets, num_tokens)

    def stored(self, places: CachedSequenceInfo) -> tuple[Tensor, ...]:
        assert self.numbers is not None
        assert self.scales is not None
        numbers = places.read(self.numbers.view(torch.int8))
        return numbers.view(self.numbers.dtype), places.read(self.scales)


class PartedCells(QuantisedCells):
    """Keep the parts of each row, of `sizes` features, with scales of their own."""

    def __init__(self, num_slots: int, kind: CacheKind, sizes: Sequence[int]):
        super().__init__(num_slots, kind)
        self.sizes, self.parts = list(sizes), [QuantisedCells(num_slots, kind) for _ in sizes]

    def write(self, new_BTGK: Tensor, places: CachedSequenceInfo) -> None:
        for part, new in zip(self.parts, new_BTGK.split(self.sizes, -1), strict=True):
            part.write(new, places)

    def read(self, places: CachedSequenceInfo) -> Tensor:
        return torch.cat([part.read(places) for part in self.parts], -1)

    def copy(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        for part in self.parts:
            part.copy(sources, targets, num_tokens)


def make_cells(num_slots: int, kind: CacheKind | None) -> Cells:
    """Return cells of `kind`; None: of the model's precision."""
    return Cells(num_slots) if kind is None else QuantisedCells(num_slots, kind)


def bytes_of_a_token(architecture: Architecture, dtype: torch.dtype, kind: CacheKind | None) -> int:
    """Return the bytes that a cache of `kind` takes for a token of a sequence, in all layers of a
    model in `dtype`; None: of the model's precision."""
    total = 0
    for mixer in architecture.attentions:
        if isinstance(mixer, LatentSpec):  # a latent, and the part of keys that has positions
            features, scales = mixer.kv_rank + mixer.rope_size, 2
        else:
            features = mixer.num_kv_heads * (mixer.head_size + mixer.value_size)
            scales = 2 * mixer.num_kv_heads
        plain = features * dtype.itemsize
        total += plain if kind is None else features + scales * dtype.itemsize
    return total


def memory_line(
    architecture: Architecture, dtype: torch.dtype, kind: CacheKind, num_tokens: int
) -> str:
    """Return a line about the memory of a cache of `kind` for `num_tokens` tokens, over all ranks,
    beside that of one in `dtype`."""
    small, plain = (bytes_of_a_token(architecture, dtype, each) for each in (kind, None))
    name = str(dtype).removeprefix("torch.")
    most = f"{small * num_tokens / 1e6:,.1f} MB, and {plain * num_tokens / 1e6:,.1f} MB in {name}"
    return (
        f"KV cache in {kind}: {small:,} bytes a token ({plain:,} in {name}); the {num_tokens:,} tokens that there is "
        f"room for take {most}"
    )
