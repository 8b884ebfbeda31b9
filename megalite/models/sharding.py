"""What each rank holds of a weight: read it from logical rows, say which parts of matrices it is, and
put what all ranks hold together again. All of it follows from the row of the table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.models.weights import Weight, joined

RowReader = Callable[[Weight, int, int, tuple[int, int] | None], Tensor]
"""(weight, first row, last row, column range of a matrix) → those logical elements."""


class Rectangle(NamedTuple):
    """A part of one of a weight's matrices that lies in one piece in a flattened local tensor:
    whole rows, or a part of a single row."""

    start: int
    """First of its elements in the local tensor."""
    stop: int
    matrix: int
    """Number of the matrix among the `row_groups`."""
    rows: tuple[int, int]
    """Range of logical rows."""
    columns: tuple[int, int]
    """Range of logical columns; (0, 1) where the weight has no columns."""


def local_part(weight: Weight, rank: int, tensor: int) -> tuple[Tensor, tuple[int, int]]:
    """Return the numbers of the logical rows, int64, and the range of columns that a rank holds of a
    matrix."""
    ranges = [torch.arange(low, high) for low, high in _row_ranges(weight, rank, tensor)]
    return torch.cat(ranges), _columns(weight, rank, tensor)


def _row_ranges(weight: Weight, rank: int, tensor: int, expert: int = 1) -> list[tuple[int, int]]:
    """Return the logical row ranges that make up the local rows, in local order. Padding rows, always
    last, are left out."""
    if expert > 1:
        # Holders are expert-major: which experts, then which part of them. Experts of a rank are
        # neighbours, so their rows lie `before` rows further on.
        number, rank = divmod(rank, tensor)
        own = weight.experts_of_one(expert, tensor)
        before = number * own.num_rows
        return [(before + low, before + high) for low, high in _row_ranges(own, rank, tensor)]
    rows = weight.num_rows
    if tensor == 1 or weight.shard in (None, "row"):
        return [(0, rows)]
    if weight.shard == "vocab":
        held = weight.local_shape(tensor)[0]
        first = min(rank * held, rows)
        return [(first, min(first + held, rows))]
    # Each group is cut on its own: the local rows are this rank's share of q, then of k, then of v.
    groups = (rows,) if weight.shard == "expert" else weight.row_groups
    ranges: list[tuple[int, int]] = []
    start = 0
    for size in groups:
        low = start + rank * size // tensor
        high = start + (rank + 1) * size // tensor
        ranges.append((low, high))
        start += size
    return ranges


def _columns(weight: Weight, rank: int, tensor: int) -> tuple[int, int]:
    """Return the range of input features that a rank holds."""
    if weight.shard == "row" and tensor > 1:
        width = weight.row_shape[0] // tensor
        return rank * width, (rank + 1) * width
    return 0, weight.row_shape[0]


def read_local(
    weight: Weight,
    read_rows: RowReader,
    rank: int,
    tensor: int,
    start: int,
    stop: int,
    expert: int = 1,
) -> Tensor:
    """Return elements [start, stop) of the flattened local tensor of `rank`, one of `expert` ×
    `tensor` ranks; `read_rows` gives logical rows. Padding is zero."""
    # Elements of one local row; 1 for a bias or a norm.
    width = prod(weight.local_shape(tensor, expert)[weight.stack + 1 :])
    # Whole rows are read, and what is too much at both ends is cut off at last.
    first, last = start // width, -(-stop // width)
    columns = _columns(weight, rank % tensor, tensor) if weight.row_shape else None
    found: list[Tensor] = []
    offset = 0
    for low, high in _row_ranges(weight, rank, tensor, expert):
        # Local rows [offset, end) are logical rows [low, high).
        end = offset + high - low
        begin, stop_here = max(first, offset), min(last, end)
        if begin < stop_here:
            to_logical = low - offset
            rows = read_rows(weight, begin + to_logical, stop_here + to_logical, columns)
            found.append(rows.reshape(-1))
        offset = end
    # Rows beyond the vocabulary: no logical row stands for them.
    padding = max(0, last - max(offset, first)) * width
    if padding or not found:
        found.append(found[0].new_zeros(padding) if found else torch.zeros(padding))
    flat = joined(found)
    before = first * width
    return flat[start - before : stop - before]


def rectangles(
    weight: Weight, rank: int, tensor: int, start: int, stop: int, expert: int = 1
) -> Iterator[Rectangle]:
    """Yield what elements [start, stop) of the flattened local tensor of `rank`, one of `expert` ×
    `tensor` ranks, are of the weight's matrices. Padding is left out."""
    left, right = _columns(weight, rank % tensor, tensor) if weight.row_shape else (0, 1)
    width, offset = right - left, 0
    ends = list(accumulate(weight.row_groups))
    for low, high in _row_ranges(weight, rank, tensor, expert):
        # A range of rows may go over several matrices (tensor rank's parts of q, k, v; experts).
        while low < high:
            matrix = bisect_right(ends, low)
            last = min(high, ends[matrix])
            begin, end = max(start, offset), min(stop, offset + (last - low) * width)
            while begin < end:
                row, inside = divmod(begin - offset, width)
                rows = (end - begin) // width if inside == 0 else 0
                # Whole rows at once where it begins with one, else the rest of the row that is cut.
                size = rows * width or min(width - inside, end - begin)
                within = (left, right) if rows else (left + inside, left + inside + size)
                yield Rectangle(
                    begin, begin + size, matrix, (low + row, low + row + max(rows, 1)), within
                )
                begin += size
            offset += (last - low) * width
            low = last


def assemble(weight: Weight, locals_: Sequence[Tensor], expert: int = 1) -> Tensor:
    """Return the logical tensor from the local tensors of all ranks that hold it (one, where it is
    replicated), of which `expert` share the experts."""
    if len(locals_) == 1:
        return locals_[0]
    tensor = len(locals_) // expert
    # The inverse of `read_local`, by the same ranges: there is no second mapping.
    full = locals_[0].new_empty(weight.num_rows, *weight.row_shape)
    for rank, local in enumerate(locals_):
        rows = local.flatten(0, weight.stack)
        columns = (slice(*_columns(weight, rank % tensor, tensor)),) if weight.row_shape else ()
        offset = 0
        for low, high in _row_ranges(weight, rank, tensor, expert):
            full[(slice(low, high), *columns)] = rows[offset : offset + high - low]
            offset += high - low
    return full.view(weight.shape)
