"""Copy pieces of a token file into a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megalite.data.order import Int64s


def gather_reference(
    tokens: npt.NDArray, starts: Int64s, lengths: Int64s, places: Int64s, out: Int64s
) -> None:
    """Copy pieces: out.flat[places[i] : places[i] + lengths[i]] = tokens[starts[i] : starts[i] +
    lengths[i]] for each i in order.

    tokens: [N] of any dtype that Megatron writes; starts, lengths, places: [P] int64; out: int64 of
    any shape, contiguous. Raise IndexError, before anything is written, for a piece outside the
    tokens or `out`, and ValueError for a float that is no int64. `csrc/data/gather.cpp` does the
    same faster."""
    if not starts.shape == lengths.shape == places.shape == (starts.size,):
        raise ValueError("starts, lengths and places must have one shape [P]")
    if not out.flags.c_contiguous:
        raise ValueError("out must be contiguous")
    tokens, flat = np.asarray(tokens), out.reshape(-1)  # slices of a memmap itself are slow to make
    # Subtracted, not added: first + length may overflow, size - length cannot.
    for what, firsts, size in (("tokens", starts, len(tokens)), ("places", places, len(flat))):
        wrong = np.flatnonzero((lengths < 0) | (firsts < 0) | (firsts > size - lengths))
        if wrong.size:
            first, length = firsts[wrong[0]], lengths[wrong[0]]
            raise IndexError(
                f"{what} [{first}, {first} + {length}) are outside the {size} there are"
            )
    for start, length, place in zip(
        starts.tolist(), lengths.tolist(), places.tolist(), strict=True
    ):
        taken = tokens[start : start + length]
        if taken.dtype.kind == "f" and not np.all(np.abs(taken) < 2.0**63):  # false for NaN as well
            raise ValueError(f"tokens from {start} on hold a float that is no int64")
        flat[place : place + length] = taken


try:
    from megalite._data import gather
except ImportError:  # installed without a compiler
    gather = gather_reference
