"""How context parallelism cuts sequences over its ranks.

A sequence is cut into twice as many pieces as there are ranks, and rank r takes pieces r and
2n-1-r, "zigzag" (Llama 3, Dubey et al. 2024). Under a causal mask a later piece attends to more, so
that the two of each rank come to the same work; and of another rank's keys either all queries
attend to exactly the front pieces, or exactly the back pieces' queries attend to all.

That holds where a sequence is one document. Where several are packed, whole documents may lie on
one rank, and the work of attention differs from rank to rank. Therefore each document can be cut
instead, by the same rule (TransformerEngine's THD format). TransformerEngine asks for documents
padded to multiples of 2n; here the pieces of a document differ by a token where 2n does not divide
it, and the longer ones go round from document to document, so that every rank has exactly as many
tokens.

All of it is arithmetic on the host, which must know what is not to be computed.

Letters in shapes: R ranks, B batch (1 where all rows are cut alike), S tokens of a sequence, T of
them on one rank, D documents of a row, N = 2R pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalite.kernels.attention_kinds import AttentionKind

TILE = 256
"""Queries of short documents that are computed at once, under a mask. Each call costs about as much
as attention among so many tokens."""


class Block(NamedTuple):
    """Some of a rank's queries and some of another rank's keys, to which they attend."""

    batch: slice
    rows: slice
    keys: slice
    causal: bool
    """True where the queries are the keys' own tokens, each of which attends to none behind it."""
    masked: bool
    """True where not every query attends to every key, beside what `causal` says."""
    first: bool
    """True where no block before this one has these queries."""


class _Run(NamedTuple):
    """A document's tokens on one rank, as a range there: from `start` to `middle` of the front
    piece, from there to `end` of the back piece."""

    start: int
    middle: int
    end: int
    front_at: int
    """Index of the front piece's first token in the whole sequence."""
    back_at: int
    """The same of the back piece."""
    length: int
    """Tokens of the whole document."""

    def parts(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Return of both pieces the first token here, the first one's index, and their number."""
        return (
            (self.start, self.front_at, self.middle - self.start),
            (self.middle, self.back_at, self.end - self.middle),
        )


@dataclass(frozen=True, eq=False)
class ContextCut:
    """Tells which tokens of its sequences each context rank has, and which of them meet."""

    index_RBT: Tensor
    """Index of each rank's tokens in their sequence, int64, ascending: on the host."""
    device_RBT: Tensor
    """The same on the device that computes."""
    is_back_RBT: Tensor
    """Whether the token is of a back piece; on the host."""
    document_BS: Tensor | None
    """Documents of the whole sequences, on the host; None: one document each."""
    document_RBT: Tensor | None
    """Documents of each rank's tokens, on the device."""
    _blocks: dict[tuple[int, int, bool, int | None], tuple[Block, ...]] = field(
        default_factory=dict
    )

    @classmethod
    def of(
        cls,
        length: int,
        ranks: int,
        document_BS: Tensor | None = None,
        by_documents: bool = False,
        device: torch.device | None = None,
    ) -> ContextCut:
        """Cut sequences of `length` over `ranks`. `document_BS`, on the host, numbers each token's
        document, ascending; `by_documents` cuts each of them, not the sequence.

        Raises ValueError where the sequence does not divide into 2 · `ranks` pieces."""
        if length % (2 * ranks):
            raise ValueError(
                f"a sequence of {length} tokens cannot be cut into 2 × {ranks} equal chunks"
            )
        if by_documents and document_BS is not None:
            piece_BS = np.stack([_pieces(_lengths(row), 2 * ranks) for row in document_BS.numpy()])
        else:
            piece_BS = (np.arange(length) // (length // (2 * ranks)))[None]
        # With 2 ranks and pieces 0 1 2 3: rank 0 takes 0 and 3, rank 1 takes 1 and 2.
        rank_BS = np.minimum(piece_BS, 2 * ranks - 1 - piece_BS).astype(np.int16)
        # Stable: each rank's tokens stay in their order.
        order_BS = np.argsort(rank_BS, axis=1, kind="stable")
        is_back_BS = np.take_along_axis(piece_BS >= ranks, order_BS, 1)
        index, is_back = (
            torch.from_numpy(each).unflatten(1, (ranks, -1)).transpose(0, 1).contiguous()
            for each in (order_BS, is_back_BS)
        )
        on_device = index.to(device or index.device)
        documents = None
        if document_BS is not None:
            documents = torch.stack([take(document_BS, each) for each in index]).to(
                on_device.device
            )
        return cls(index, on_device, is_back, document_BS, documents)

    def blocks(self, rank: int, source: int, kind: AttentionKind) -> tuple[Block, ...]:
        """Return what `rank` has to compute with the keys of the rank `source`: blocks that hold
        every pair of a query and a key that attend, once. Blocks with nothing to attend to are left
        out; the first ones of its own keys hold each query once."""
        key = (rank, source, kind.causal, kind.window)
        if key not in self._blocks:
            found = [
                block
                for row, batch in self._rows()
                for block in _of_row(
                    batch, self._runs[row][rank], self._runs[row][source], rank, source, kind
                )
            ]
            self._blocks[key] = tuple(sorted(found, key=lambda block: not block.first))
        return self._blocks[key]

    def mask(self, block: Block, rank: int, source: int, kind: AttentionKind) -> Tensor | None:
        """Return which queries of a block attend to which of its keys, [b,1,rows,keys] bool; None
        where all do, or `Block.causal` says it."""
        if not block.masked:
            return None
        # One row's cut, or that of all rows.
        batch = block.batch if self.index_RBT.shape[1] > 1 else slice(None)
        index = self.device_RBT
        back = (
            index[rank, batch, block.rows, None] - index[source, batch, None, block.keys]
        )  # how many tokens the key lies behind the query
        mask = torch.ones_like(back, dtype=torch.bool)
        if kind.causal:
            mask = back >= 0
        if kind.window is not None:
            mask = mask & (back.abs() < kind.window)
        if self.document_RBT is not None:
            own = self.document_RBT[rank, block.batch, block.rows, None]
            mask = mask & (own == self.document_RBT[source, block.batch, None, block.keys])
        return mask[:, None]

    def pairs(self, causal: bool = True, window: int | None = None) -> np.ndarray:
        """Return how many pairs of a query and a key that attend each rank has, [R] int64: its work
        in attention."""
        ranks, batch, _ = self.index_RBT.shape
        found = np.zeros(ranks, np.int64)
        documents = self.document_BS
        for row in range(batch if documents is None else len(documents)):
            length = self.index_RBT.shape[2] * ranks
            lengths = np.array([length]) if documents is None else _lengths(documents[row].numpy())
            place = np.arange(length) - np.repeat(lengths.cumsum() - lengths, lengths)
            before, behind = place + 1, np.repeat(lengths, lengths) - place
            reach = length if window is None else window
            number = np.minimum(before, reach)
            if not causal:
                number = number + np.minimum(behind, reach) - 1
            own = self.index_RBT[:, row if batch > 1 else 0].numpy()
            found += number[own].sum(1)
        return found

    def _rows(self) -> list[tuple[int, slice]]:
        """Return the rows that are computed apart: all at once where each is one document."""
        if self.document_BS is None:
            return [(0, slice(None))]
        return [(row, slice(row, row + 1)) for row in range(len(self.document_BS))]

    @cached_property
    def _runs(self) -> list[list[dict[int, _Run]]]:
        """For each row and rank, the documents it has tokens of, by number."""
        ranks, cuts, width = self.index_RBT.shape
        found = []
        for row, _ in self._rows():
            document = np.zeros(ranks * width, np.int64)
            if self.document_BS is not None:
                document = self.document_BS[row].numpy()
            cut = row if cuts > 1 else 0
            both = zip(
                self.index_RBT[:, cut].numpy(), self.is_back_RBT[:, cut].numpy(), strict=True
            )
            found.append([_runs_of(document, index, is_back) for index, is_back in both])
        return found


def take(x_BS: Tensor, index_BT: Tensor) -> Tensor:
    """Return the values of some tokens of each row, [B,T,…]; an index of one row is that of all."""
    return x_BS[torch.arange(len(x_BS), device=x_BS.device)[:, None], index_BT]


def _lengths(document_S: np.ndarray) -> np.ndarray:
    """Return the lengths of a row's documents, in their order: [D]."""
    starts = np.flatnonzero(np.diff(document_S, prepend=document_S[0] - 1))
    return np.diff(starts, append=len(document_S))


def _pieces(length_D: np.ndarray, pieces: int) -> np.ndarray:
    """Return which of the N `pieces` of its document each token is in, [S]."""
    rest_D = length_D % pieces
    # Where the tokens left over go: the next pieces in turn, over all documents.
    first_D = (rest_D.cumsum() - rest_D) % pieces
    is_longer_DN = (np.arange(pieces) - first_D[:, None]) % pieces < rest_D[:, None]
    size_DN = (length_D // pieces)[:, None] + is_longer_DN
    return np.repeat(np.tile(np.arange(pieces), len(length_D)), size_DN.ravel())


def _runs_of(document_S: np.ndarray, index_T: np.ndarray, is_back_T: np.ndarray) -> dict[int, _Run]:
    """Return the runs of one rank in one row, by the number of the document."""
    number_T = document_S[index_T]
    starts = np.flatnonzero(np.diff(number_T, prepend=number_T[0] - 1))
    ends = np.append(starts[1:], len(number_T))
    middles = starts + np.add.reduceat(~is_back_T, starts, dtype=np.int64)
    # Of a run without a back piece, any place: nothing is read there.
    back_at = index_T[np.minimum(middles, len(index_T) - 1)]
    numbers = number_T[starts]
    lengths = np.bincount(document_S)[numbers]
    columns = (starts, middles, ends, index_T[starts], back_at, lengths)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {number: _Run(*row) for number, row in zip(numbers.tolist(), rows, strict=True)}


def _windowed(
    batch: slice, run: _Run, there: _Run, rank: int, source: int, kind: AttentionKind
) -> Iterator[Block]:
    """Yield the blocks of one document that its window does not cover: bands of queries with the
    keys that any of them sees."""
    assert kind.window is not None
    before = kind.window - 1
    behind = 0 if kind.causal else before
    for part, (start, at, count) in enumerate(run.parts()):
        for other, (keys_start, keys_at, keys_count) in enumerate(there.parts()):
            for offset in range(0, count, TILE):
                # Indices in the sequence, first and last ones.
                first, last = at + offset, at + min(offset + TILE, count) - 1
                low = max(keys_at, first - before)
                high = min(keys_at + keys_count - 1, last + behind)
                if low > high:
                    continue
                sees_all = last - low <= before and high - first <= behind
                yield Block(
                    batch,
                    slice(start + first - at, start + last + 1 - at),
                    slice(keys_start + low - keys_at, keys_start + high + 1 - keys_at),
                    causal=False,
                    masked=not sees_all,
                    first=rank == source and part == other,
                )


def _of_row(
    batch: slice,
    own: dict[int, _Run],
    others: dict[int, _Run],
    rank: int,
    source: int,
    kind: AttentionKind,
) -> list[Block]:
    """Return the blocks of one row, or of all that are one document."""
    is_own, found = rank == source, list[Block]()
    several: list[tuple[slice, slice]] = []
    """Short documents that become one block."""

    def finish() -> None:
        if several:
            rows = slice(several[0][0].start, several[-1][0].stop)
            keys = slice(several[0][1].start, several[-1][1].stop)
            alone = len(several) == 1
            found.append(
                Block(batch, rows, keys, alone and is_own and kind.causal, not alone, is_own)
            )
            several.clear()

    for number, run in own.items():
        if (there := others.get(number)) is None:
            continue
        if kind.window is not None and kind.window < run.length:
            finish()
            found += _windowed(batch, run, there, rank, source, kind)
            continue
        # Of a higher rank's keys only our back pieces see any, and they see all; of a lower rank's
        # keys all our queries see the front pieces and none the back ones.
        rows = slice(run.middle if kind.causal and source > rank else run.start, run.end)
        keys = slice(there.start, there.middle if kind.causal and source < rank else there.end)
        if rows.start == rows.stop or keys.start == keys.stop:
            continue
        if several and max(rows.stop - several[0][0].start, keys.stop - several[0][1].start) > TILE:
            finish()
        several.append((rows, keys))
    finish()
    return found
