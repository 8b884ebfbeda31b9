"""Token files as training samples: ranges of the flat token stream, and weighted mixtures of them.

Nothing here is built ahead: a sample is found by arithmetic (`order.py`) and read through the memory map, so that
start-up costs O(number of sources), whatever the corpus holds.

Legend: n = samples asked for, L = seq_length, D = number of sources.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megalite.config import DataConfig, Source
from megalite.data.gather import gather
from megalite.data.indexed import DataError, IndexedDataset
from megalite.data.order import Blend, Int64s, Order, sample_in_epoch

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

# Part of every fingerprint: changes whenever a change here or in order.py gives other samples for the same config.
_SCHEME = "megalite-samples-1"


class TokenSource:
    """Tokens [first_token, last_token) of a dataset, cut into samples of L + 1 tokens; neighbours share one token, so
    that every token but the first is predicted exactly once; fewer than L tokens are left over at the end. Documents
    run on into each other.

    Raises DataError where the range is outside the dataset or too short for one sample."""

    def __init__(self, dataset: IndexedDataset, first_token: int, last_token: int, seq_length: int) -> None:
        if not 0 <= first_token <= last_token <= dataset.num_tokens:
            raise DataError(f"tokens [{first_token}, {last_token}) are outside the {dataset.num_tokens} there are")
        self.dataset, self.first_token, self.last_token = dataset, first_token, last_token
        self.seq_length = seq_length
        self.num_samples = (last_token - first_token - 1) // seq_length
        if self.num_samples < 1:
            raise DataError(
                f"{last_token - first_token} tokens are too few for one sample of seq_length {seq_length}: "
                f"at least {seq_length + 1} are needed"
            )

    def read(self, samples: Int64s) -> Int64s:
        """[n] numbers of samples → [n, L + 1] tokens. Raises IndexError for a number that is not in the range."""
        if samples.size and not 0 <= samples.min() <= samples.max() < self.num_samples:
            raise IndexError(f"samples {samples.min()} … {samples.max()} are not in [0, {self.num_samples})")
        out = np.empty((len(samples), self.seq_length + 1), np.int64)
        starts, places = self.first_token + samples * self.seq_length, np.arange(len(samples)) * out.shape[1]
        gather(self.dataset.tokens, starts, np.full_like(starts, out.shape[1]), places, out)
        return out

    def documents(self, samples: Int64s) -> Int64s:
        """[n] numbers of samples → [n, L]: which document of the sample each of its first L tokens is in, from 0 on."""
        out = np.empty((len(samples), self.seq_length), np.int64)
        for row, first in zip(out, self.first_token + samples * self.seq_length, strict=True):
            starts = self.dataset.document_starts(int(first) + 1, int(first) + self.seq_length) - first
            row[:] = np.searchsorted(starts, np.arange(self.seq_length), side="right")
        return out

    def fingerprint(self) -> str:
        return f"{self.dataset.fingerprint()}[{self.first_token}:{self.last_token}]/{self.seq_length}"


class Mixture:
    """An endless stream of samples out of several sources in proportion to their weights.

    Sample i is a function of (sources, weights, seed, order, i) alone. Blocks of 65,536 samples hold an exact quota of
    each source, and each source goes through its own epochs, each of which has every sample once."""

    def __init__(
        self, sources: Sequence[TokenSource], weights: Sequence[float], seq_length: int, seed: int, order: Order
    ) -> None:
        if len(sources) != len(weights):
            raise DataError(f"{len(sources)} sources have {len(weights)} weights")
        if any(source.seq_length != seq_length for source in sources):
            raise DataError(f"a source is cut by another seq_length than the mixture's {seq_length}")
        self.sources, self.weights = tuple(sources), tuple(map(float, weights))
        self.seq_length, self.seed, self.order = seq_length, seed, order
        self._fingerprint = ""
        try:
            self._blend = Blend(self.weights, seed, order)
        except ValueError as error:
            raise DataError(str(error)) from None

    def locate(self, indices: npt.ArrayLike) -> tuple[Int64s, Int64s]:
        """[n] global sample indices → which source, and which of its samples, both [n]."""
        source, position = self._blend.locate(indices)
        sample = np.empty_like(position)
        for number in np.unique(source):
            rows = source == number
            size = self.sources[number].num_samples
            sample[rows] = sample_in_epoch(position[rows], size, self.seed, int(number), self.order)
        return source, sample

    def samples(self, indices: npt.ArrayLike) -> Int64s:
        """[n] global sample indices → [n, L + 1] tokens. Raises ValueError for a negative index."""
        return self._read(indices, TokenSource.read)

    def documents(self, indices: npt.ArrayLike) -> Int64s:
        """[n] global sample indices → [n, L]: which document of its sample each of its first L tokens is in."""
        return self._read(indices, TokenSource.documents)

    def _read(self, indices: npt.ArrayLike, what: Callable[[TokenSource, Int64s], Int64s]) -> Int64s:
        source, sample = self.locate(indices)
        rows = [np.flatnonzero(source == number) for number in np.unique(source)]
        parts = [what(self.sources[source[row[0]]], sample[row]) for row in rows]
        out = np.empty((len(sample), parts[0].shape[1]), np.int64)
        for row, part in zip(rows, parts, strict=True):
            out[row] = part
        return out

    def consumed(self, count: int) -> Int64s:
        """How many of the first `count` samples come from each source, [D]."""
        return self._blend.consumed(count)

    def fingerprint(self) -> str:
        """Hexadecimal digest of all that decides which tokens sample i has; the files are read for it once."""
        if not self._fingerprint:
            parts = [source.fingerprint() for source in self.sources]
            identity = json.dumps([_SCHEME, parts, self.weights, self.seq_length, self.seed, self.order])
            self._fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
        return self._fingerprint


def split_range(dataset: IndexedDataset, shares: Sequence[float], which: Split) -> tuple[int, int]:
    """[first, last) token of a split: Megatron's rule over documents, so that no document is in two splits.

    shares: of train, valid and test, in any unit; they are normalised."""
    # float64 throughout and Python's round (half to even), as in Megatron, or a document would change sides.
    normalised = np.asarray(shares, np.float64) / np.sum(np.asarray(shares, np.float64))
    bookends = list(itertools.accumulate([0.0, *normalised.tolist()]))
    number = SPLITS.index(which)
    first, last = (round(bookend * float(dataset.num_documents)) for bookend in bookends[number : number + 2])
    return dataset.document_start(first), dataset.document_start(last)


def build_mixtures(config: DataConfig, seed: int) -> dict[str, Mixture | None]:
    """The mixtures "train", "valid" and "test" of a config; None where it has no data for one.

    Validation and test are read in sequential order, so that they start at sample 0 with the same samples every time.
    Raises DataError, naming the setting, where a source cannot be read or has too few tokens."""
    opened: dict[Path, IndexedDataset] = {}
    return {which: _build_mixture(config, which, seed, opened) for which in SPLITS}


def _build_mixture(config: DataConfig, which: Split, seed: int, opened: dict[Path, IndexedDataset]) -> Mixture | None:
    shares = config.split
    wanted: tuple[Source, ...] = getattr(config, which) if shares is None else config.train
    if not wanted or (shares is not None and shares[SPLITS.index(which)] == 0):
        return None
    sources = []
    for number, item in enumerate(wanted):
        if item.path not in opened:
            opened[item.path] = IndexedDataset(item.path)
        dataset = opened[item.path]
        tokens = (0, dataset.num_tokens) if shares is None else split_range(dataset, shares, which)
        try:
            sources.append(TokenSource(dataset, *tokens, config.seq_length))
        except DataError as error:
            setting = f"data.{which}[{number}]" if shares is None else f"data.split {list(shares)}: {which} part of"
            raise DataError(f"{setting} {item.path}: {error}") from None
    order: Order = config.order if which == "train" else "sequential"
    return Mixture(sources, [item.weight for item in wanted], config.seq_length, seed, order)
