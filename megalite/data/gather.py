"""Tokens out of a memory map into the rows of a batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from megalite.data.order import Int64s


def gather_reference(tokens: npt.NDArray, starts: Int64s, lengths: Int64s, places: Int64s, out: Int64s) -> None:
    """out.flat[places[i] : places[i] + lengths[i]] = tokens[starts[i] : starts[i] + lengths[i]], in numpy."""
    tokens, flat = np.asarray(tokens), out.reshape(-1)
    for start, length, place in zip(starts.tolist(), lengths.tolist(), places.tolist(), strict=True):
        flat[place : place + length] = tokens[start : start + length]


gather = gather_reference
