"""Cut token files into training samples, the same for all runs with the same settings, whatever the
ranks.

A source says which pieces of its token file make up a sample; `read_windows` reads them. Cutting
the flat stream (`TokenSource`) needs no index: start-up is O(1) in the size of the corpus.

Legend: n = samples asked for, L = seq_length, P = pieces of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megalite.config import Lengths
from megalite.data.gather import gather
from megalite.data.indexed import IndexedDataset
from megalite.data.megatron_order import MegatronOrder
from megalite.data.order import Int64s
from megalite.data.packing import Packing, best_fit
from megalite.errors import DataError

LONG = {"refuse": "refused", "drop": "left out", "cut": "cut at the end"}
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Pieces(NamedTuple):
    """Holds ranges of a token file, in the order in which they fill the rows. All [P]."""

    row: Int64s
    start: Int64s
    length: Int64s


class Windows(NamedTuple):
    """Holds the raw tokens of n samples, one more than the model sees, with what belongs to
    them."""

    tokens: Int64s  # [n, L + 1]
    filled: Int64s  # [n], tokens of each row; what follows them is zeros
    # [n, L + 1], from 0 on in every row; what follows the tokens counts as one more.
    documents: Int64s | None
    mask: Int64s | None = None  # [n, L + 1], as in PREFIX.mask; 1 where a source has none
    removed: npt.NDArray[np.bool_] | None = (
        None  # [n, L + 1], of a document that was taken out; None: none is
    )


class SampleSource(Protocol):
    """Describes a token file cut into samples."""

    dataset: IndexedDataset
    seq_length: int
    num_samples: int
    """Samples in one epoch."""

    def pieces(self, samples: Int64s, by_document: bool) -> Pieces:
        """Return the pieces of `samples`, [n]: at most L + 1 tokens for each of rows 0 … n - 1.

        With `by_document`, no piece holds tokens of two documents and no two pieces of a row belong
        to the same one. Raise IndexError for a number out of range."""

    def samples_with(self, start: int, stop: int) -> Int64s:
        """Return the samples that hold any of the tokens [start, stop) of the file, ascending."""

    def fingerprint(self) -> str:
        """Return a name for everything that decides the content of each sample."""


def empty_windows(
    count: int, seq_length: int, by_document: bool, masked: bool = False, removed: bool = False
) -> Windows:
    """Allocate windows for `count` samples of `seq_length` + 1 tokens. Documents are there with
    `by_document`, a mask (all ones) with `masked`, what was taken out (nothing) with `removed`."""
    shape = count, seq_length + 1
    documents = np.empty(shape, np.int64) if by_document else None
    mask = np.ones(shape, np.int64) if masked else None
    holes = np.zeros(shape, bool) if removed else None
    return Windows(np.empty(shape, np.int64), np.empty(count, np.int64), documents, mask, holes)


def read_windows(source: SampleSource, samples: Int64s, into: Windows, rows: Int64s) -> None:
    """Read `samples` ([m] numbers) of `source` into the rows `rows` ([m]) of `into`; also documents
    and mask, if `into` has room for them."""
    if samples.size and not 0 <= samples.min() <= samples.max() < source.num_samples:
        raise IndexError(
            f"samples {samples.min()} … {samples.max()} are not in [0, {source.num_samples})"
        )
    tokens, documents = into.tokens, into.documents
    width = tokens.shape[1]
    row, start, length = source.pieces(samples, documents is not None)
    source.dataset.fetch(start, length)
    # Where each piece goes in `tokens`, flattened: behind the earlier pieces of its row.
    places = rows[row] * width + _before(length, row)
    gather(source.dataset.tokens, start, length, places, tokens)
    if into.mask is not None and source.dataset.mask is not None:
        gather(source.dataset.mask, start, length, places, into.mask)
    if into.removed is not None and source.dataset.removed is not None:
        into.removed[rows] = source.dataset.is_removed(places_in_file(source, samples))
    filled = np.bincount(row, length, len(samples)).astype(np.int64)
    into.filled[rows] = filled
    # A piece is a document: its number is how many pieces stand before it in the row.
    numbers = np.repeat(_before(np.ones_like(row), row), length) if documents is not None else None
    # Full rows need no padding: skip the masks below.
    if (filled == width).all():
        if documents is not None and numbers is not None:
            documents[rows] = numbers.reshape(len(rows), width)
        return
    # gather wrote only what is filled; the rest is memory of np.empty.
    is_filled = np.arange(width) < filled[:, None]
    tokens[rows] *= is_filled
    if documents is not None and numbers is not None:
        # Padding gets the number behind the last document's, so that nothing attends to it.
        of_rows = np.repeat(np.bincount(row, minlength=len(samples))[:, None], width, 1)
        of_rows[is_filled] = numbers
        documents[rows] = of_rows


def places_in_file(source: SampleSource, samples: Int64s) -> Int64s:
    """Return where in the token file each token of `samples` stands, [m, L + 1]; -1 for what
    follows the tokens."""
    row, start, length = source.pieces(samples, True)
    places = np.full((len(samples), source.seq_length + 1), -1)
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    column = np.repeat(_before(length, row), length) + within
    places[np.repeat(row, length), column] = np.repeat(start, length) + within
    return places


def _before(sizes: Int64s, row: Int64s) -> Int64s:
    """Return the sum of `sizes` that precede each piece in its row, [P]."""
    total = np.cumsum(sizes) - sizes
    is_first = np.diff(row, prepend=-1) > 0
    # The running sum at a row's first piece, carried forward, is what earlier rows contributed.
    return total - np.maximum.accumulate(np.where(is_first, total, 0))


class TokenSource:
    """Cuts tokens [first_token, last_token) of a dataset into samples of L + 1 tokens.

    Neighbours share one token, so that every token but the first is predicted exactly once; fewer
    than L tokens are left over at the end. Documents run on into each other. Raises DataError if
    the range is outside the dataset or too short for one sample."""

    def __init__(
        self, dataset: IndexedDataset, first_token: int, last_token: int, seq_length: int
    ) -> None:
        if not 0 <= first_token <= last_token <= dataset.num_tokens:
            raise DataError(
                f"tokens [{first_token}, {last_token}) are outside the {dataset.num_tokens} there are"
            )
        self.dataset, self.first_token, self.last_token = dataset, first_token, last_token
        self.seq_length = seq_length
        # n samples take n · L + 1 tokens, since neighbours share one.
        self.num_samples = (last_token - first_token - 1) // seq_length
        if self.num_samples < 1:
            raise DataError(
                f"{last_token - first_token} tokens are too few for one sample of seq_length {seq_length}: "
                f"at least {seq_length + 1} are needed: lower data.seq_length, or give more data"
            )

    def pieces(self, samples: Int64s, by_document: bool) -> Pieces:
        """Return the pieces of `samples`, split at document borders with `by_document`; see
        `SampleSource`."""
        first, width = self.first_token + samples * self.seq_length, self.seq_length + 1
        if not by_document:
            return Pieces(np.arange(len(samples)), first, np.full(len(samples), width))
        # Borders within each row; one at its first token would give an empty piece.
        counts, borders = self.dataset.document_starts(first + 1, first + width)
        row = np.repeat(np.arange(len(samples)), counts + 1)
        is_first = np.diff(row, prepend=-1) > 0
        start = np.empty(len(row), np.int64)
        # A row begins at its first token; its further pieces begin where documents do.
        start[is_first], start[~is_first] = first, borders
        # A piece ends where the next begins; the last of a row at the row's end.
        end = np.append(start[1:], 0)
        end[np.append(is_first[1:], True)] = first + width
        return Pieces(row, start, end - start)

    def samples_with(self, start: int, stop: int) -> Int64s:
        # Sample s holds tokens s · L … (s + 1) · L of the range, both ends included.
        first = max(-(-(start - self.first_token) // self.seq_length) - 1, 0)
        last = min((stop - 1 - self.first_token) // self.seq_length, self.num_samples - 1)
        return np.arange(first, max(last + 1, first))

    def fingerprint(self) -> str:
        return (
            f"{self.dataset.fingerprint()}[{self.first_token}:{self.last_token}]/{self.seq_length}"
        )


class PackedSource:
    """Packs documents [first, last) of a dataset such that as few as possible are cut.

    A document longer than `capacity` tokens is cut; what fits together best then makes a sample of
    at most as many. It needs all lengths at the start: about 30 bytes of memory per document.
    Raises DataError if there are no documents."""

    def __init__(
        self, dataset: IndexedDataset, first: int, last: int, seq_length: int, capacity: int
    ) -> None:
        if not 0 <= first < last <= dataset.num_documents:
            raise DataError(
                f"documents [{first}, {last}) are none of the {dataset.num_documents} there are"
            )
        self.dataset, self.seq_length, self._documents = dataset, seq_length, (first, last)
        self._starts = dataset.starts_of_documents(first, last)
        self._packing = best_fit(np.diff(self._starts), capacity)
        self._cut = f"{seq_length}" if capacity == seq_length + 1 else f"{seq_length}/{capacity}"
        self.num_samples = len(self._packing.first_piece) - 1

    def pieces(self, samples: Int64s, by_document: bool) -> Pieces:
        """Return the pieces of `samples`; they never cross a document (`by_document` or not). See
        `SampleSource`."""
        packing = self._packing
        first, last = packing.first_piece[samples], packing.first_piece[samples + 1]
        row = np.repeat(np.arange(len(samples)), last - first)
        piece = np.repeat(first, last - first) + _before(np.ones_like(row), row)
        start = self._starts[packing.document[piece]] + packing.offset[piece]
        return Pieces(row, start, packing.length[piece].astype(np.int64))

    def samples_with(self, start: int, stop: int) -> Int64s:
        packing = self._packing
        begin = self._starts[packing.document] + packing.offset
        return _samples_of(packing, (begin < stop) & (begin + packing.length > start))

    def fingerprint(self) -> str:
        first, last = self._documents
        return f"{self.dataset.fingerprint()}best_fit[{first}:{last}]/{self._cut}"


def _samples_of(packing: Packing, pieces: npt.NDArray[np.bool_]) -> Int64s:
    """Return the bins that have any of the `pieces`, ascending."""
    found = np.searchsorted(packing.first_piece, np.flatnonzero(pieces), side="right") - 1
    return np.unique(found).astype(np.int64)


class RowSource:
    """Packs rows of labelled data, documents [first, last) of a dataset, without cutting them.

    As many rows as fit make a sample of at most `capacity` tokens, of which the model sees L.
    Groups of `together` consecutive rows stay together: 2 for the answers of a preference.
    `long_rows` decides about groups longer than a sample: "refuse", "drop" (leave out) or "cut"
    (lose the end). Memory as for `PackedSource`. Raises DataError if rows are refused, or none is
    left."""

    def __init__(
        self,
        dataset: IndexedDataset,
        first: int,
        last: int,
        seq_length: int,
        capacity: int,
        together: int = 1,
        long_rows: Literal["refuse", "drop", "cut"] = "refuse",
    ) -> None:
        if not 0 <= first < last <= dataset.num_documents or (last - first) % together:
            raise DataError(
                f"rows [{first}, {last}) are none of the {dataset.num_documents} there are"
            )
        self.dataset, self.seq_length, self._first = dataset, seq_length, first
        self._identity = f"rows[{first}:{last}]/{seq_length}/{capacity}/{together}/{long_rows}"
        self._starts, self.together = dataset.starts_of_documents(first, last), together
        self._lengths = np.diff(self._starts)
        # Groups, not rows, are packed: the two answers of a preference must be in one sample.
        sizes = self._sizes(capacity)
        num_long, what = (
            int(np.count_nonzero(sizes > capacity)),
            "pairs" if together == 2 else "rows",
        )
        long = f"{num_long:,} of {len(sizes):,} {what} are longer than {self._room(capacity)}"
        if num_long and long_rows == "refuse":
            raise DataError(f"{long}, the longest {self._longest()}")
        self.remark = f"{dataset.prefix}: {long}, and are {LONG[long_rows]}" if num_long else ""
        """What the user should know about rows that are too long; empty if there are none."""
        kept = sizes <= capacity
        if long_rows == "cut":
            # The answers of a pair share the sample evenly.
            is_cut = self._lengths > capacity // together
            self._lengths = np.minimum(self._lengths, capacity // together)
            sizes = self._lengths.reshape(-1, together).sum(1)
            kept = np.ones(len(sizes), bool)
            kept[np.unique(np.flatnonzero(is_cut & ~self._is_learned(is_cut)) // together)] = False
            if empty := int(np.count_nonzero(~kept)):
                self.remark += (
                    f"; {empty:,} of them have nothing to learn before the cut, and are left out"
                )
        self._kept = np.flatnonzero(kept)
        if not len(self._kept):
            raise DataError(
                f"{long}, so that none is left with something to learn; raise data.seq_length"
            )
        self._packing = best_fit(sizes[self._kept], capacity)
        self.num_samples = len(self._packing.first_piece) - 1

    def _sizes(self, capacity: int) -> Int64s:
        """Return what each group takes of the `capacity` of a sample."""
        return self._lengths.reshape(-1, self.together).sum(1)

    def _room(self, capacity: int) -> str:
        """Return what a sample has room for, for a message."""
        return f"the {capacity:,} tokens of a sample"

    def _longest(self) -> str:
        """Return how long the longest group is and what to do, for an error."""
        return (
            f"{self._sizes(0).max():,}; raise data.seq_length, or set data.long_rows to drop (leave them out) or cut "
            "(they lose their ends)"
        )

    def _is_learned(self, asked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return for the rows in `asked` whether anything is learned from what is left of them,
        [rows]; True for all others."""
        learned = np.ones(len(asked), bool)
        if (mask := self.dataset.mask) is not None:
            rows = np.flatnonzero(asked)
            starts, stops = self._starts[rows], self._starts[rows] + self._lengths[rows]
            self.dataset.fetch(starts, stops - starts)
            learned[rows] = [
                mask[start:stop].any() for start, stop in zip(starts, stops, strict=True)
            ]
        return learned

    @property
    def num_rows(self) -> int:
        """Return the number of rows that are learned from; of pairs, where `together` is 2."""
        return len(self._kept)

    @property
    def most_documents(self) -> int:
        """Return the largest number of documents in a sample."""
        return int(np.diff(self._packing.first_piece).max()) * self.together

    def pieces(self, samples: Int64s, by_document: bool) -> Pieces:
        """Return the pieces of `samples`, one per row of data (`by_document` or not). See
        `SampleSource`."""
        row, document = self.rows_of(samples)
        document = document - self._first
        return Pieces(row, self._starts[document], self._lengths[document].astype(np.int64))

    def rows_of(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        """Return the documents of `samples` [n] in their order: the sample that each belongs to, 0 …
        n - 1, and its number in the token file, both [documents]."""
        first_piece = self._packing.first_piece
        first, last = first_piece[samples], first_piece[samples + 1]
        num_pieces = last - first
        row = np.repeat(np.arange(len(samples)), num_pieces)
        within = _before(np.ones_like(row), row)
        piece = np.repeat(first, num_pieces) + within
        # What was packed are groups among those kept: back to their numbers, then to their rows.
        group = self._kept[self._packing.document[piece]]
        document = group[:, None] * self.together + np.arange(self.together)
        return np.repeat(row, self.together), document.ravel() + self._first

    def samples_with(self, start: int, stop: int) -> Int64s:
        begin = self._starts[:-1]
        wanted = np.flatnonzero((begin < stop) & (begin + self._lengths > start))
        groups = np.isin(self._kept, wanted // self.together)
        return _samples_of(self._packing, groups[self._packing.document])

    def fingerprint(self) -> str:
        return f"{self.dataset.fingerprint()}{self._identity}"


class SourceTargetRows(RowSource):
    """Packs rows of a source and a target, both sides of which must have room in a sample: the
    source, of which nothing is learned, in an encoder's tokens, and the target in a decoder's. The
    largest share of the two is what a row takes."""

    # So fine that rounding up costs a row no room, and so coarse that the products below stay under
    # 2^63 for rows of a million tokens in samples of a million.
    SHARES = 1 << 20

    def __init__(
        self,
        dataset: IndexedDataset,
        first: int,
        last: int,
        lengths: Lengths,
        long_rows: Literal["refuse", "drop", "cut"],
    ) -> None:
        """`lengths` are those of both sides. Raise DataError as `RowSource` does."""
        self._sides = lengths
        super().__init__(dataset, first, last, lengths.read, self.SHARES, long_rows=long_rows)

    def _sizes(self, capacity: int) -> Int64s:
        targets, sources = self._of_sides()
        shares = (
            np.maximum(sources * self._sides.target, targets * self._sides.source) * self.SHARES
        )
        # Up: rows whose shares fit into a sample then have room for their tokens on both sides.
        return -(-shares // (self._sides.source * self._sides.target))

    def _of_sides(self) -> tuple[Int64s, Int64s]:
        """Return how many tokens the target of each row has, and its source."""
        assert self.dataset.mask is not None
        first, last = self._starts[[0, -1]].tolist()
        self.dataset.fetch(np.array([first]), np.array([last - first]))
        # A byte a token; a running sum would take eight. Rows without tokens begin where others do,
        # and reduceat would give them the first token of those.
        is_target = np.asarray(self.dataset.mask[first:last]) > 0
        targets, there = np.zeros_like(self._lengths), self._lengths > 0
        begins = (self._starts[:-1] - first)[there]
        targets[there] = np.add.reduceat(is_target, begins, dtype=np.int64)
        return targets, self._lengths - targets

    def _room(self, capacity: int) -> str:
        return f"a sample, which has {self._sides.source:,} tokens of a source and {self._sides.target:,} of a target"

    def _longest(self) -> str:
        targets, sources = self._of_sides()
        return (
            f"with {sources.max():,} and {targets.max():,}; raise data.seq_length or objective.target_length, or set "
            "data.long_rows to drop (leave them out)"
        )

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}/{self._sides.source}+{self._sides.target}"


class MegatronSource:
    """Hands out sequences [first, last) of a dataset as Megatron-LM's GPTDataset does.

    There are `num_samples` samples, over as many epochs as that takes, already shuffled by `seed`.
    Raises DataError if there are too few tokens."""

    def __init__(
        self,
        dataset: IndexedDataset,
        first: int,
        last: int,
        seq_length: int,
        num_samples: int,
        seed: int,
    ) -> None:
        lengths = dataset.lengths(first, last)
        self.dataset, self.seq_length = dataset, seq_length
        self._sequences, self._asked, self._seed = (first, last), num_samples, seed
        self._order = MegatronOrder(lengths, num_samples, seq_length, seed)
        self._starts = dataset.token_of_sequence(first) + np.append(
            0, np.cumsum(lengths, dtype=np.int64)
        )
        self.num_samples = self._order.num_samples

    def pieces(self, samples: Int64s, by_document: bool) -> Pieces:
        row, sequence, offset, length = self._order.pieces(samples)
        return Pieces(row, self._starts[sequence] + offset, length)

    def samples_with(self, start: int, stop: int) -> Int64s:
        first, last = (
            int(np.searchsorted(self._starts, x, side="right")) for x in (start, stop - 1)
        )
        found = [np.empty(0, np.int64)]
        for sequence in range(max(first - 1, 0), min(last, len(self._starts) - 1)):
            begin, end = self._starts[sequence : sequence + 2].tolist()
            low, high = max(begin, start), min(end, stop)
            if low < high:
                found.append(self._order.samples_with(sequence, low - begin, high - low))
        return np.unique(np.concatenate(found))

    def fingerprint(self) -> str:
        first, last = self._sequences
        cut = f"megatron[{first}:{last}]/{self.seq_length}"
        return f"{self.dataset.fingerprint()}{cut}*{self._asked}#{self._seed}"


def split_range(size: int, shares: Sequence[float], which: Split) -> tuple[int, int]:
    """Return the documents [first, last) of `size` that belong to the split `which`, by Megatron's
    rule. `shares` are those of train, valid and test, in any unit; they are normalised."""
    # float64 and Python's round (half to even), as in Megatron; otherwise a document could change
    # its split.
    normalised = np.asarray(shares, np.float64) / np.sum(np.asarray(shares, np.float64))
    bookends = list(itertools.accumulate([0.0, *normalised.tolist()]))
    number = SPLITS.index(which)
    first, last = (round(bookend * float(size)) for bookend in bookends[number : number + 2])
    return first, last
