"""Which sample comes when: pure arithmetic of (seed, epoch, index), with no index to build and no table that grows.

Legend: n = number of indices asked for, D = sources of a mixture, S = samples of one source in one epoch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from megalite.keys import key_of

Order = Literal["shuffle", "sequential"]
Int64s = npt.NDArray[np.int64]

BLOCK = 65_536  # samples after which a mixture has its exact proportions again
MAX_SIZE = 2**60

# Luby and Rackoff (1988) need 4 rounds on a large domain. Sizes below 20, whose round functions have few values, still
# send an element to some places more often than to others at 8 (40,000 keys, chi-squared); at 12 that is gone.
_ROUNDS = 12
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def permute(index: npt.ArrayLike, size: int, key: npt.ArrayLike) -> Int64s:
    """Where a pseudo-random bijection of [0, size), chosen by the 64-bit `key`, sends each index.

    index: integers in [0, size), any shape; key: one integer in [0, 2^64), or one an index. O(1) time an index and no
    memory besides. Raises ValueError for an index outside the range or a size outside 1 … 2^60.

    A balanced Feistel network over the smallest domain of an even number of bits, walked until it is back inside the
    range, at most 4 expected steps (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The round
    function is the splitmix64 stream (Steele, Lea and Flood 2014) of the key, read at a place of its own for each
    round and half. It shuffles; it does not encrypt.
    """
    index = np.asarray(index, np.int64)
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is not in 1 … 2^60")
    if index.size and not 0 <= index.min() <= index.max() < size:
        raise ValueError(f"index {index.min()} … {index.max()} is not in [0, {size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    value = index.astype(np.uint64).ravel()
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape).ravel()
    outside = np.arange(value.size)
    while outside.size:
        value[outside] = _feistel(value[outside], keys[outside], half_bits)
        outside = outside[value[outside] >= np.uint64(size)]
    return value.astype(np.int64).reshape(index.shape)


def _feistel(value: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half_bits: int) -> npt.NDArray[np.uint64]:
    bits = np.uint64(half_bits)
    left, right = value >> bits, value & np.uint64((1 << half_bits) - 1)
    for number in range(_ROUNDS):
        noise = _splitmix64(keys, right + np.uint64((number << half_bits) + 1)) >> np.uint64(64 - half_bits)
        left, right = right, left ^ noise
    return (left << bits) | right


def _splitmix64(keys: npt.NDArray[np.uint64], position: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Output number `position` of the generator seeded with each key."""
    state = keys + position * _GAMMA
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample_in_epoch(position: npt.ArrayLike, size: int, seed: int, source: int, order: Order) -> Int64s:
    """The sample (0 … size-1) at each position of a source's endless stream of epochs, each of which has every sample
    exactly once: in a new order each epoch, or in its own order where `order` is sequential."""
    epoch, index = np.divmod(np.asarray(position, np.int64), size)
    if order == "sequential":
        return index
    return permute(index, size, _keys(epoch, seed, "epoch", source))


def _keys(numbers: Int64s, *parts: int | str) -> npt.NDArray[np.uint64]:
    """key_of(*parts, number) for each number; hashed once for each different one."""
    unique, inverse = np.unique(numbers, return_inverse=True)
    keys = np.array([key_of(*parts, int(number)) for number in unique], np.uint64)
    return keys[inverse.reshape(numbers.shape)]


def quotas(weights: Sequence[float]) -> Int64s:
    """Samples of each source in a block, [D]: shares of BLOCK by largest remainder, at least 1 each.

    Raises ValueError for weights that are not positive and finite, or more sources than a block has samples."""
    if not 1 <= len(weights) <= BLOCK:
        raise ValueError(f"{len(weights)} sources: a mixture has 1 to {BLOCK}")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be above 0 and finite, got {list(weights)}")
    # Divided by the largest first, so that neither a huge nor a tiny weight overflows the sum; fsum is exactly rounded,
    # so that the quotas are the same on every machine.
    relative = np.array(weights, np.float64) / max(weights)
    exact = relative * (BLOCK / math.fsum(relative))
    quota = np.maximum(np.floor(exact).astype(np.int64), 1)
    for _ in range(abs(missing := BLOCK - int(quota.sum()))):
        step = 1 if missing > 0 else -1
        # The one that is furthest from its share; a source at its minimum of 1 gives nothing away.
        distance = np.where((step > 0) | (quota > 1), step * (exact - quota), -np.inf)
        quota[np.argmax(distance)] += step
    return quota


class Blend:
    """Sample i of a weighted mixture → (source, position in that source's endless stream).

    Every block of BLOCK samples holds exactly `quota[d]` of source d, in an order permuted by (seed, block), or, where
    `order` is sequential, spread as evenly as can be with each source's own order kept. A source alone keeps its order.
    Memory is one block, whatever the index."""

    def __init__(self, weights: Sequence[float], seed: int, order: Order) -> None:
        self.quota = quotas(weights)
        self._seed, self._order = seed, order
        source = np.repeat(np.arange(len(weights)), self.quota)
        rank = np.arange(BLOCK) - np.repeat(np.cumsum(self.quota) - self.quota, self.quota)
        # Sample r of a quota q belongs at (r + 1/2) / q of the block: sorting by that interleaves the sources evenly.
        spread = np.argsort((rank + 0.5) / self.quota[source], kind="stable")
        self._source, self._rank = source[spread].astype(np.int32), rank[spread].astype(np.int32)

    def locate(self, index: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """(source, position) of each sample, both shaped like `index`. Raises ValueError for a negative index."""
        index = np.asarray(index, np.int64)
        if index.size and index.min() < 0:
            raise ValueError(f"sample index {index.min()} is negative")
        if len(self.quota) == 1:
            return np.zeros_like(index), index
        block, slot = np.divmod(index, BLOCK)
        if self._order == "shuffle":
            slot = permute(slot, BLOCK, _keys(block, self._seed, "blend"))
        source = self._source[slot].astype(np.int64)
        return source, block * self.quota[source] + self._rank[slot]

    def consumed(self, count: int) -> Int64s:
        """How many of the first `count` samples come from each source, [D]; their sum is `count`."""
        if count < 0:
            raise ValueError(f"count {count} is negative")
        blocks, rest = divmod(count, BLOCK)
        source, _ = self.locate(np.arange(count - rest, count))
        return blocks * self.quota + np.bincount(source, minlength=len(self.quota))
