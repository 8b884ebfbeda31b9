"""Best-fit packing: documents into rows with no more cuts than their lengths require.

After Ding et al. 2024, "Fewer Truncations Improve Language Modeling". Cutting a stream of documents
wherever a row ends breaks many of them; here only documents longer than a row are cut, and rows are
still nearly full."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.data.order import Int64s

Int32s = npt.NDArray[np.int32]
# Documents of equal length are placed in strides of a prime larger than their number. In the order
# of the corpus, its first documents would more often have a bin to themselves than its last.
_STRIDE = 2654435761
_Bin = list[tuple[int, int, int]]  # (document, offset, length), the longest piece first


class Packing(NamedTuple):
    """Holds bins of pieces: those of bin b are [first_piece[b], first_piece[b + 1]), in the order
    of their documents. Bins are ordered by where their longest piece stands in the corpus, so that
    a bin's position says nothing about the lengths of its pieces."""

    first_piece: Int64s  # [bins + 1]
    document: Int32s  # [pieces]
    offset: Int32s  # [pieces], first token within the document
    length: Int32s  # [pieces] tokens, at least 1; those of a bin are the capacity at most
    num_truncated: int  # documents in more than one piece


def best_fit(lengths: npt.NDArray[np.integer], capacity: int) -> Packing:
    """Pack documents of `lengths` tokens, [D], into bins of `capacity` tokens.

    A document longer than the capacity is cut into pieces that fill a bin each, and a remainder.
    All remainders are then placed, longest first, into the bin with the least space that suffices
    (of equals, the one that came to that space last) or a new one. Time O(D · log capacity).
    Memory: 12 bytes per document and 16 per bin during the work; 12 per piece and 8 per bin stay.
    Raise ValueError for a capacity or a length out of range, and for lengths of another shape or
    dtype."""
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or len(lengths) >= 2**31:
        raise ValueError(
            f"lengths must be less than 2^31 integers in a row, not {lengths.dtype} {lengths.shape}"
        )
    if not 1 <= capacity < 2**31:
        raise ValueError(f"capacity {capacity} is not in 1 … 2^31 - 1")
    if len(lengths) and not 0 <= lengths.min() <= lengths.max() < 2**31:
        raise ValueError(f"lengths {lengths.min()} … {lengths.max()} are not in 0 … 2^31 - 1")
    first_piece, document, offset, length = pack(np.ascontiguousarray(lengths, np.int32), capacity)
    return Packing(first_piece, document, offset, length, int(np.count_nonzero(lengths > capacity)))


def pack_reference(lengths: Int32s, capacity: int) -> tuple[Int64s, Int32s, Int32s, Int32s]:
    """Return the arrays of `best_fit` for checked lengths; `csrc/data/packing.cpp` does the same
    faster."""
    remainders = lengths % capacity
    bins: list[_Bin] = []
    for number in np.flatnonzero(lengths >= capacity).tolist():
        last = int(lengths[number]) - capacity
        bins += [[(number, start, capacity)] for start in range(0, last + 1, capacity)]
    spaces: list[int] = []  # ascending, of all bins that have some
    with_space: dict[int, list[_Bin]] = {}
    strides = np.arange(len(lengths)) * _STRIDE % max(len(lengths), 1)
    longest_first = strides[np.argsort(-remainders[strides], kind="stable")]
    for number in longest_first[: np.count_nonzero(remainders)].tolist():
        rest = int(remainders[number])
        # Best fit: the smallest remaining space that suffices. Equal spaces share one entry, so
        # that the list stays short.
        fitting = bisect_left(spaces, rest)
        if fitting == len(spaces):
            space, pieces = capacity, _Bin()
            bins.append(pieces)
        else:
            space = spaces[fitting]
            pieces = with_space[space].pop()
            if not with_space[space]:
                del spaces[fitting]
        pieces.append((number, int(lengths[number]) - rest, rest))
        if left := space - rest:
            others = with_space.setdefault(left, [])
            if not others:
                insort(spaces, left)
            others.append(pieces)
    bins.sort(key=lambda pieces: pieces[0])
    first_piece = np.cumsum([0, *map(len, bins)], dtype=np.int64)
    table = np.array([piece for pieces in bins for piece in sorted(pieces)], np.int32).reshape(
        -1, 3
    )
    document, offset, length = map(np.ascontiguousarray, table.T)
    return first_piece, document, offset, length


try:
    from megalite._data import pack
except ImportError:  # installed without a compiler
    pack = pack_reference
