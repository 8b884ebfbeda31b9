"""Keys for everything that must be random and yet the same in every layout: weights, dropout, the
order of samples."""

from __future__ import annotations

import hashlib


def key_of(*parts: int | str) -> int:
    """Return a 64-bit key of a seed, an epoch, names: a different key for every different list of
    parts."""
    # repr keeps the boundaries and the types apart: (1, 23) is not (12, 3), nor is 1 the same as
    # "1".
    text = repr([part if isinstance(part, str) else int(part) for part in parts])
    # A real hash, since Python's own differs from process to process.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
