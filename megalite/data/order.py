"""The order of samples: pure arithmetic of (seed, epoch, index), without an index to build or a
table that grows.

Legend: n = number of indices asked for, D = sources of a mixture, S = samples of one source in one
epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megalite.utils.keys import key_of

Order = Literal["shuffle", "sequential"]
Int64s = npt.NDArray[np.int64]

BLOCK = 65_536  # samples after which a mixture has its exact proportions again
MAX_SIZE = 2**60

# Luby and Rackoff (1988) need 4 rounds on a large domain. Sizes below 20, whose round functions
# have few values, still send an element to some places more often than to others at 8 (40,000 keys,
# chi-squared); at 12 that is gone.
_ROUNDS = 12
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def permute(index: npt.ArrayLike, size: int, key: npt.ArrayLike) -> Int64s:
    """Return where a pseudo-random bijection of [0, size), chosen by the 64-bit `key`, sends each
    index.

    index: integers in [0, size), any shape; key: one integer in [0, 2^64), or one per index. It
    takes O(1) time per index and no memory besides. Raise ValueError for an index outside the range
    or a size outside 1 … 2^60.

    The bijection is a balanced Feistel network over the smallest domain with an even number of
    bits, applied until the value is back inside the range: at most 4 expected steps (cycle walking:
    Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The round function is the
    splitmix64 stream (Steele, Lea and Flood 2014) of the key, read at a position of its own for
    each round and half. It shuffles; it does not encrypt."""
    values, keys, half_bits = _prepared(index, size, key)
    permute_in_place(values, keys, size, half_bits)
    return values.astype(np.int64).reshape(np.shape(index))


def permute_back(index: npt.ArrayLike, size: int, key: npt.ArrayLike) -> Int64s:
    """Return the index that `permute` sends to each `index`, with its arguments and errors."""
    values, keys, half_bits = _prepared(index, size, key)
    _walk(_feistel_back, values, keys, size, half_bits)
    return values.astype(np.int64).reshape(np.shape(index))


def _prepared(
    index: npt.ArrayLike, size: int, key: npt.ArrayLike
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], int]:
    """Return the indices in a row, a key for each, and half the bits of the Feistel domain. Raise
    ValueError as `permute` says."""
    index = np.asarray(index, np.int64)
    if not 1 <= size <= MAX_SIZE:
        raise ValueError(f"size {size} is not in 1 … 2^60")
    if index.size and not 0 <= index.min() <= index.max() < size:
        raise ValueError(f"index {index.min()} … {index.max()} is not in [0, {size})")
    # The domain of 2 · half_bits bits is less than four times the size: few values must walk.
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = np.ascontiguousarray(np.broadcast_to(np.asarray(key, np.uint64), index.shape).ravel())
    return index.astype(np.uint64).ravel(), keys, half_bits


def permute_in_place_reference(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], size: int, half_bits: int
) -> None:
    """Permute `values`, [n] with one of `keys` each, in numpy, for `permute`. `size` is that of the
    range, `half_bits` half the bits of the Feistel domain. `csrc/data/permute.cpp` does the same
    faster."""
    _walk(_feistel, values, keys, size, half_bits)


Network = Callable[[npt.NDArray[np.uint64], npt.NDArray[np.uint64], int], npt.NDArray[np.uint64]]


def _walk(
    network: Network,
    values: npt.NDArray[np.uint64],
    keys: npt.NDArray[np.uint64],
    size: int,
    half_bits: int,
) -> None:
    """Send each of `values`, [n] with one of `keys` each, through the network until it is below
    `size`, in place."""
    outside = np.arange(values.size)
    while outside.size:
        values[outside] = network(values[outside], keys[outside], half_bits)
        # Cycle walking: only values outside the range go through the network again, which keeps the
        # map a bijection.
        outside = outside[values[outside] >= np.uint64(size)]


def _feistel_back(
    value: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half_bits: int
) -> npt.NDArray[np.uint64]:
    """Undo `_feistel`: its rounds in the opposite order."""
    bits = np.uint64(half_bits)
    left, right = value >> bits, value & np.uint64((1 << half_bits) - 1)
    for number in reversed(range(_ROUNDS)):
        noise = _splitmix64(keys, left + np.uint64((number << half_bits) + 1)) >> np.uint64(
            64 - half_bits
        )
        left, right = right ^ noise, left
    return (left << bits) | right


def _feistel(
    value: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], half_bits: int
) -> npt.NDArray[np.uint64]:
    """Apply the Feistel network once to each value of 2 · half_bits bits."""
    bits = np.uint64(half_bits)
    left, right = value >> bits, value & np.uint64((1 << half_bits) - 1)
    for number in range(_ROUNDS):
        noise = _splitmix64(keys, right + np.uint64((number << half_bits) + 1)) >> np.uint64(
            64 - half_bits
        )
        # Whatever `noise` is, this step can be undone: hence a bijection.
        left, right = right, left ^ noise
    return (left << bits) | right


def _splitmix64(
    keys: npt.NDArray[np.uint64], position: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Return output number `position` of the generator seeded with each key."""
    state = keys + position * _GAMMA
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


try:
    from megalite._data import permute_in_place
except ImportError:  # installed without a compiler
    permute_in_place = permute_in_place_reference


def sample_in_epoch(
    position: npt.ArrayLike, size: int, seed: int, source: int, order: Order
) -> Int64s:
    """Return the sample (0 … size-1) at each `position` of a source's endless stream of epochs.
    Each epoch has every sample exactly once: in a new order derived from `seed` and `source`, or
    always in file order if `order` is sequential."""
    epoch, index = np.divmod(np.asarray(position, np.int64), size)
    if order == "sequential":
        return index
    return permute(index, size, _keys(epoch, seed, "epoch", source))


def positions_of_sample(
    sample: int, epochs: int, size: int, seed: int, source: int, order: Order
) -> Int64s:
    """Return the position at which each of the first `epochs` epochs of a source has `sample`,
    ascending, [epochs]: what `sample_in_epoch` undoes."""
    numbers = np.arange(epochs)
    index = np.full(epochs, sample)
    if order == "shuffle":
        index = permute_back(index, size, _keys(numbers, seed, "epoch", source))
    return numbers * size + index


def _keys(numbers: Int64s, *parts: int | str) -> npt.NDArray[np.uint64]:
    """Return key_of(*parts, number) for each number, hashed once per distinct number."""
    unique, inverse = np.unique(numbers, return_inverse=True)
    keys = np.array([key_of(*parts, int(number)) for number in unique], np.uint64)
    return keys[inverse.reshape(numbers.shape)]


def quotas(weights: Sequence[float]) -> Int64s:
    """Return the number of samples of each source in a block, [D]: shares of BLOCK by largest
    remainder, at least 1 each. Raise ValueError for weights that are not positive and finite, or
    more sources than a block has samples."""
    if not 1 <= len(weights) <= BLOCK:
        raise ValueError(f"{len(weights)} sources: a mixture has 1 to {BLOCK}")
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be above 0 and finite, got {list(weights)}")
    # Divide by the largest weight first, so that the sum cannot overflow. fsum is exactly rounded,
    # so that quotas are the same on every machine.
    relative = np.array(weights, np.float64) / max(weights)
    exact = relative * (BLOCK / math.fsum(relative))
    quota = np.maximum(np.floor(exact).astype(np.int64), 1)
    for _ in range(abs(missing := BLOCK - int(quota.sum()))):
        step = 1 if missing > 0 else -1
        # Adjust the source furthest from its share. A source at its minimum of 1 cannot give any
        # away.
        distance = np.where((step > 0) | (quota > 1), step * (exact - quota), -np.inf)
        quota[np.argmax(distance)] += step
    return quota


class Blend:
    """Maps sample i of a weighted mixture to (source, position in that source's endless stream).

    Every block of BLOCK samples holds exactly `quota[d]` of source d, in an order permuted by
    (seed, name, block), or spread as evenly as possible if `order` is sequential. Positions count
    up, so that any number of first samples has the first ones of each source. Memory is a few
    blocks, whatever the index."""

    def __init__(
        self, weights: Sequence[float], seed: int, order: Order, name: str = "blend"
    ) -> None:
        self.quota = quotas(weights)
        self._seed, self._order, self._name = seed, order, name
        # [BLOCK]: which source, and which of the block's samples of that source, in file order.
        source = np.repeat(np.arange(len(weights)), self.quota)
        rank = np.arange(BLOCK) - np.repeat(np.cumsum(self.quota) - self.quota, self.quota)
        # Sample r of a quota q belongs at (r + 1/2) / q of the block: sorting by that interleaves
        # the sources evenly.
        self._spread = source[np.argsort((rank + 0.5) / self.quota[source], kind="stable")]
        self._kept: dict[int, tuple[Int64s, Int64s]] = {}

    def _block(self, number: int) -> tuple[Int64s, Int64s]:
        """Return the source of each sample of a block, and how many of that source precede it in
        the block, both [BLOCK]."""
        found = self._kept.get(number)
        if found is None:
            source = self._spread
            if self._order == "shuffle":
                source = source[
                    permute(np.arange(BLOCK), BLOCK, key_of(self._seed, self._name, number))
                ]
            rank = np.empty_like(source)
            # Counted up in the order in which the block has them.
            rank[np.argsort(source, kind="stable")] = np.concatenate(
                [np.arange(quota) for quota in self.quota]
            )
            found = source, rank
            # A step reads from at most two blocks. One assignment, since the loader's thread uses
            # this cache as well.
            self._kept = {**dict(list(self._kept.items())[-1:]), number: found}
        return found

    def locate(self, index: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return (source, position) of each sample, both shaped like `index`. Raise ValueError for
        a negative index."""
        index = np.asarray(index, np.int64)
        if index.size and index.min() < 0:
            raise ValueError(f"sample index {index.min()} is negative")
        if len(self.quota) == 1:
            return np.zeros_like(index), index
        block, slot = np.divmod(index, BLOCK)
        source, position = np.empty_like(index), np.empty_like(index)
        for number in np.unique(block):
            rows = block == number
            of_slot, rank = self._block(int(number))
            source[rows] = of_slot[slot[rows]]
            # Every earlier block used exactly `quota` of the source, so that no table of past
            # samples is needed.
            position[rows] = number * self.quota[source[rows]] + rank[slot[rows]]
        return source, position

    def index_of(self, source: int, position: int) -> int:
        """Return the sample at which a source's `position` comes: what `locate` undoes."""
        if len(self.quota) == 1:
            return position
        number, rank = divmod(position, int(self.quota[source]))
        return number * BLOCK + int(np.flatnonzero(self._block(number)[0] == source)[rank])

    def consumed(self, count: int) -> Int64s:
        """Return how many of the first `count` samples come from each source, [D]; their sum is
        `count`."""
        if count < 0:
            raise ValueError(f"count {count} is negative")
        if len(self.quota) == 1:
            return np.array([count])
        number, rest = divmod(count, BLOCK)
        of_block = (
            np.bincount(self._block(number)[0][:rest], minlength=len(self.quota)) if rest else 0
        )
        return number * self.quota + of_block


class SampleOrder(Protocol):
    """Describes which sample of which source comes when in a run."""

    def locate(self, indices: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return source and sample number of the global sample `indices`, both [n]. Raise
        ValueError for an index outside the run."""

    def consumed(self, count: int) -> Int64s:
        """Return how many of the first `count` samples come from each source, [D]; their sum is
        `count`."""

    def indices_of(self, source: int, sample: int, count: int) -> Int64s:
        """Return which of the run's first `count` samples are `sample` of a source, ascending:
        what `locate` undoes."""

    def epochs(self, indices: npt.ArrayLike) -> Int64s | None:
        """Return the epoch of its source, from 0, that each of the global sample `indices` is in,
        [n]; None where samples are of several epochs."""

    def identity(self) -> list[Any]:
        """Return, as JSON values, everything that decides `locate` apart from the sources."""


class Phase(NamedTuple):
    """Holds the weights of the sources from a certain sample on."""

    begin: int
    """First sample of the phase."""
    weights: Sequence[float]
    """Weight of each source, [D]; 0 for none of it."""


class PhasedOrder:
    """Orders an endless stream of samples from several sources, in proportion to the weights of the
    phase that an index is in.

    Blocks of 65,536 samples hold an exact quota of each source. Each source goes through its own
    epochs, with every sample once per epoch, whatever the phases. `sizes` are the samples of each
    source in an epoch, [D]. Raises ValueError for weights that do not fit, and for phases that do
    not begin at 0 and then ever later."""

    def __init__(
        self, sizes: Sequence[int], phases: Sequence[Phase], seed: int, order: Order
    ) -> None:
        begins = [phase.begin for phase in phases]
        if not begins or begins[0] != 0 or sorted(set(begins)) != begins:
            raise ValueError(f"phases must begin at sample 0 and then ever later, got {begins}")
        if any(len(phase.weights) != len(sizes) for phase in phases):
            raise ValueError(
                f"{len(sizes)} sources have {[len(phase.weights) for phase in phases]} weights"
            )
        self._sizes, self._seed, self._order, self._phases = (
            tuple(sizes),
            seed,
            order,
            tuple(phases),
        )
        self._begins = np.array(begins, np.int64)
        self._members, self._blends = [], []
        before = [np.zeros(len(sizes), np.int64)]
        for number, phase in enumerate(phases):
            members = np.flatnonzero(phase.weights)
            # Each phase is shuffled by a key of its own; that of the first is what runs without
            # phases have.
            name = "blend" if number == 0 else f"blend {number}"
            self._members.append(members)
            self._blends.append(Blend([phase.weights[int(d)] for d in members], seed, order, name))
            if number + 1 < len(phases):
                before.append(
                    before[-1] + self._consumed_in(number, begins[number + 1] - phase.begin)
                )
        self._before = np.stack(before)  # [phases, D], samples of each source in earlier phases

    def _positions(self, indices: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return the source of each of the global sample `indices`, and the position in its
        stream of epochs, both [n]."""
        indices = np.asarray(indices, np.int64)
        phase = np.maximum(np.searchsorted(self._begins, indices, side="right") - 1, 0)
        source, position = np.empty_like(indices), np.empty_like(indices)
        for number in np.unique(phase):
            rows = phase == number
            member, own = self._blends[number].locate(indices[rows] - self._begins[number])
            source[rows] = self._members[number][member]
            # A source continues its own epochs where earlier phases left it.
            position[rows] = self._before[number][source[rows]] + own
        return source, position

    def locate(self, indices: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return source and sample number of the global sample `indices`, both [n]."""
        source, position = self._positions(indices)
        sample = np.empty_like(position)
        for number in np.unique(source):
            rows = source == number
            sample[rows] = sample_in_epoch(
                position[rows], self._sizes[number], self._seed, int(number), self._order
            )
        return source, sample

    def indices_of(self, source: int, sample: int, count: int) -> Int64s:
        """Return which of the run's first `count` samples are `sample` of a source, ascending."""
        size, taken = self._sizes[source], int(self.consumed(count)[source])
        positions = positions_of_sample(
            sample, -(-taken // size), size, self._seed, source, self._order
        )
        return np.array(
            [
                self._index_of(source, position)
                for position in positions[positions < taken].tolist()
            ],
            np.int64,
        )

    def _index_of(self, source: int, position: int) -> int:
        """Return the global sample at which a source's `position` comes."""
        # The last phase before which the source had no more than that: phases without it are
        # passed over, since they begin where the next one does.
        before = self._before[:, source]
        phase = int(np.searchsorted(before, position, side="right")) - 1
        member = int(np.searchsorted(self._members[phase], source))
        own = self._blends[phase].index_of(member, position - int(before[phase]))
        return int(self._begins[phase]) + own

    def epochs(self, indices: npt.ArrayLike) -> Int64s:
        """Return the epoch of its source, from 0, that each of the global sample `indices` is in,
        [n]."""
        source, position = self._positions(indices)
        return position // np.array(self._sizes)[source]

    def consumed(self, count: int) -> Int64s:
        """Return how many of the first `count` samples come from each source, [D]."""
        number = max(int(np.searchsorted(self._begins, count, side="right")) - 1, 0)
        return self._before[number] + self._consumed_in(number, count - int(self._begins[number]))

    def _consumed_in(self, phase: int, count: int) -> Int64s:
        """Return how many of the first `count` samples of a phase come from each source, [D]."""
        found = np.zeros(len(self._sizes), np.int64)
        found[self._members[phase]] = self._blends[phase].consumed(count)
        return found

    def identity(self) -> list[Any]:
        """Return the phases, the seed and the order, as JSON values."""
        return [
            [[begin, *map(float, weights)] for begin, weights in self._phases],
            self._seed,
            self._order,
        ]
