"""Megatron-LM's order of samples, exactly: a run that moves over from there continues with the same
batches.

A source's sequences are shuffled into a stream of E epochs, the stream is cut into samples of L + 1
tokens of which neighbours share one, and the samples are shuffled again; `blend` then decides whose
sample comes when. Both shuffles are numpy's `RandomState(seed)`: the order holds because numpy
promises never to change it.

Legend: n = samples asked for, P = pieces they are made of, L = seq_length, N = sequences of a
source, E = epochs, S = samples, D = sources of a blend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.data.order import Int64s
from megalite.errors import DataError

# Only the start of every 16th sequence of the stream is kept. A sample starts at token L times its
# number, so that a search there and the lengths of at most 16 sequences find it: 1/2 byte a
# sequence instead of Megatron's 8 a sample.
STRIDE = 16
_CHUNK = STRIDE << 16  # sequences of the stream looked up at a time
_SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus
_MAX_SOURCES = 32_766  # it has int16 for them


class Pieces(NamedTuple):
    """Holds what samples are made of, sample by sample and each from its first token to its
    last."""

    row: Int64s  # [P], which of the n samples
    sequence: Int64s  # [P], number in the `lengths` given
    offset: Int64s  # [P], first token within the sequence
    length: Int64s  # [P] tokens, at least 1; those of a row are L + 1 together


class MegatronOrder:
    """Holds samples 0 … num_samples - 1 of one source, in the order of Megatron's GPTDataset.

    lengths: [N] int32, tokens of each sequence of the split, read repeatedly (a memory map will
    do); num_samples: how many are wanted, which gives the number of epochs; None: those of one
    epoch. There are at least as many as wanted: the attribute `num_samples` says how many. Memory:
    4.5 bytes per sequence and epoch, 4 per sample; 4 per sequence more at the start. Raises
    DataError if there are too few tokens for a sample or a length is negative, and ValueError for a
    seed outside 0 … 2^32 - 1."""

    def __init__(
        self, lengths: npt.NDArray[np.int32], num_samples: int | None, seq_length: int, seed: int
    ) -> None:
        if not 1 <= len(lengths) < 2**31 or lengths.min() < 0:
            raise DataError(
                f"{len(lengths)} sequences: this order needs 1 to 2^31 - 1, none of a negative length"
            )
        self.seq_length = seq_length
        self._lengths = lengths
        epoch = int(lengths.sum(dtype=np.int64))
        if epoch == 0 or (num_samples is None and epoch <= seq_length):
            raise DataError(
                f"{epoch} tokens are too few for one sample of seq_length {seq_length}: "
                f"at least {seq_length + 1} are needed: lower data.seq_length, or give more data"
            )
        # So many tokens are needed: n · L + 1, rounded up to whole epochs.
        epochs = 1 if num_samples is None else max(1, -(-(num_samples * seq_length + 1) // epoch))
        self.num_samples = (epochs * epoch - 1) // seq_length
        whole = self.num_samples  # samples of the epochs that are shuffled together
        separate = False
        if num_samples is not None and epochs > 1:
            # Megatron shuffles the last epoch separately if less than 80% of it is needed.
            sans_last = ((epochs - 1) * epoch - 1) // seq_length
            separate = num_samples - sans_last < int(0.80 * ((epoch - 1) // seq_length))
            whole = sans_last if separate else whole
        random = np.random.RandomState(seed)
        self._stream = np.tile(np.arange(len(lengths), dtype=np.int32), epochs)  # [E·N]
        _shuffle_parts(random, self._stream, len(lengths) * (epochs - 1 if separate else epochs))
        dtype = np.uint32 if self.num_samples < 2**32 - 2 else np.int64
        self._shuffled = np.arange(self.num_samples, dtype=dtype)  # [S]
        _shuffle_parts(random, self._shuffled, whole)
        self._starts = _every_start(lengths, self._stream)

    def pieces(self, samples: Int64s) -> Pieces:
        """Return what the samples numbered `samples`, [n], are made of. Raise IndexError for a
        number out of range."""
        samples = np.asarray(samples, np.int64)
        if samples.size and not 0 <= samples.min() <= samples.max() < self.num_samples:
            raise IndexError(
                f"samples {samples.min()} … {samples.max()} are not in [0, {self.num_samples})"
            )
        # [n], tokens of the stream.
        first = self._shuffled[samples].astype(np.int64) * self.seq_length
        end = first + self.seq_length + 1
        # Between which kept starts a sample lies: at most STRIDE sequences too many at both ends.
        low = (np.searchsorted(self._starts, first, side="right") - 1) * STRIDE
        high = np.minimum(
            np.searchsorted(self._starts, end, side="left") * STRIDE, len(self._stream)
        )
        # [C]: all sequences of the stream from low to high of every row, of which the outermost may
        # have nothing of it.
        count = high - low
        row = np.repeat(np.arange(len(samples)), count)
        before = np.cumsum(count) - count
        sequence = self._stream[np.arange(len(row)) + (low - before)[row]].astype(np.int64)
        length = self._lengths[sequence].astype(np.int64)
        # Sums run on from row to row; what a row's first sequence has is where that one starts.
        ends = np.cumsum(length)
        start = ends - length
        # Shift each row's running sum so that its first sequence starts where it does in the
        # stream.
        start += (self._starts[low // STRIDE] - start[before])[row]
        taken_from = np.maximum(start, first[row])
        taken = np.minimum(start + length, end[row]) - taken_from
        kept = np.flatnonzero(taken > 0)
        return Pieces(row[kept], sequence[kept], (taken_from - start)[kept], taken[kept])

    def samples_with(self, sequence: int, offset: int, length: int) -> Int64s:
        """Return the samples that hold any of `length` tokens from `offset` on of a sequence,
        ascending."""
        # Where the stream has the sequence, and from there the samples of the stream before the
        # second shuffle.
        places = np.flatnonzero(self._stream == sequence)
        kept, within = np.divmod(places, STRIDE)
        starts = [
            int(self._starts[k])
            + int(self._lengths[self._stream[k * STRIDE : k * STRIDE + w]].sum())
            for k, w in zip(kept.tolist(), within.tolist(), strict=True)
        ]
        found = [
            # Neighbours share a token: the first of a sample is the last of the one before.
            np.arange(
                max(-(-(start + offset) // self.seq_length) - 1, 0),
                (start + offset + length - 1) // self.seq_length + 1,
            )
            for start in starts
        ]
        wanted = np.unique(np.concatenate([np.empty(0, np.int64), *found]))
        return np.flatnonzero(np.isin(self._shuffled, wanted))


def _shuffle_parts(random: np.random.RandomState, values: npt.NDArray, first: int) -> None:
    """Shuffle the first `first` values among themselves, then the others. An empty part draws no
    random number."""
    random.shuffle(values[:first])
    random.shuffle(values[first:])


def _every_start(lengths: npt.NDArray[np.int32], stream: npt.NDArray[np.int32]) -> Int64s:
    """Return the token at which every STRIDE-th sequence of the stream starts, and the end, [E·N /
    STRIDE + 1]."""
    starts = np.zeros(-(-len(stream) // STRIDE) + 1, np.int64)
    for low in range(0, len(stream), _CHUNK):
        tokens = lengths[stream[low : low + _CHUNK]]
        sums = np.add.reduceat(tokens, np.arange(0, len(tokens), STRIDE), dtype=np.int64)
        starts[low // STRIDE + 1 :][: len(sums)] = sums
    return np.cumsum(starts, out=starts)


def _normalised(weights: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return weights that sum to 1. Raise DataError for weights that are not above 0 and finite."""
    values = np.array(weights, np.float64)
    if not 1 <= values.size <= _MAX_SOURCES or not np.all(np.isfinite(values) & (values > 0)):
        raise DataError(
            f"1 to {_MAX_SOURCES} weights, all above 0 and finite, are needed; got {values.tolist()}"
        )
    return values / np.sum(values)


def sizes_of(weights: Sequence[float], size: int) -> Int64s:
    """Return how many samples Megatron asks of each source for `size` samples of their blend, [D].
    Raise DataError."""
    return np.ceil(np.ceil(size * _normalised(weights)) * (1 + _SURPLUS)).astype(np.int64)


def blend_greedily_reference(
    weights: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Choose sample by sample the source that is furthest behind its weight, the first of equals.
    `weights`, [D], sum to 1. Return the source, [size] int16, and which of its samples, [size]
    int64. `csrc/data/blend.cpp` does the same faster."""
    taken = np.zeros(len(weights))
    source, sample = np.empty(size, np.int16), np.empty(size, np.int64)
    for i in range(size):
        most = source[i] = np.argmax(weights * max(i, 1) - taken)
        sample[i] = taken[most]
        taken[most] += 1
    return source, sample


try:
    from megalite._data import blend_greedily
except ImportError:  # installed without a compiler
    blend_greedily = blend_greedily_reference


def blend(
    weights: Sequence[float], size: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Return the first `size` samples of Megatron's blend: which source, [size] int16, and which of
    its samples, [size] int64. A longer blend begins with the same samples, and no source is asked
    for more than `sizes_of` says. Raise DataError for weights that are not above 0 and finite."""
    # Megatron normalises twice, which may change the last bit, and with it how a tie is broken.
    return blend_greedily(_normalised(_normalised(weights)), size)


class MegatronBlend:
    """Orders the first `size` samples of a run from several sources, each read from its first
    sample in `MegatronOrder`'s order. Memory: 10 bytes per sample if there are several sources.
    Raises DataError for weights that are not above 0 and finite."""

    def __init__(self, weights: Sequence[float], size: int) -> None:
        self._weights, self._size = tuple(map(float, weights)), size
        self._blend = blend(weights, size) if len(weights) > 1 else None
        self._counted = 0, np.zeros(len(weights), np.int64)

    def locate(self, indices: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """Return source and sample number of the global sample `indices`, both [n]. Raise
        ValueError for an index outside the run."""
        indices = np.asarray(indices, np.int64)
        if indices.size and not 0 <= indices.min() <= indices.max() < self._size:
            raise ValueError(
                f"samples {indices.min()} … {indices.max()} are not among the run's {self._size}"
            )
        if self._blend is None:
            return np.zeros_like(indices), indices
        source, sample = self._blend
        return source[indices].astype(np.int64), sample[indices]

    def indices_of(self, source: int, sample: int, count: int) -> Int64s:
        """Return which of the run's first `count` samples are `sample` of a source, ascending."""
        if self._blend is None:
            return np.array([sample] if sample < count else [], np.int64)
        sources, samples = (x[:count] for x in self._blend)
        return np.flatnonzero((sources == source) & (samples == sample))

    def epochs(self, indices: npt.ArrayLike) -> None:
        """Return nothing: all epochs of this order are shuffled together."""
        return None

    def consumed(self, count: int) -> Int64s:
        """Return how many of the first `count` samples come from each source, [D]; their sum is
        `count`."""
        if self._blend is None:
            return np.array([count])
        # Counted on from the last answer, as steps ask for ever larger counts.
        since, before = (
            self._counted if self._counted[0] <= count else (0, np.zeros_like(self._counted[1]))
        )
        found = before + np.bincount(self._blend[0][since:count], minlength=len(before))
        self._counted = count, found
        return found

    def identity(self) -> list[Any]:
        """Return, as JSON values, everything that decides `locate` apart from the sources."""
        return ["megatron", list(self._weights), self._size]
