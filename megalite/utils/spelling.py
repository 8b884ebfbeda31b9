"""The right spelling of what somebody has mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LIKE = 0.6
"""Share of letters that two names must have in common (difflib's ratio) for one to be offered for
the other."""


def nearest(name: object, known: Iterable[str], like: float = LIKE) -> str | None:
    """Return the known name that `name` is most like, with `-` for `_` and in any case; None where
    none is."""
    by_plain = {_plain(each): each for each in known}
    close = difflib.get_close_matches(_plain(str(name)), by_plain, n=1, cutoff=like)
    return by_plain[close[0]] if close else None


def did_you_mean(name: object, known: Iterable[str], otherwise: str) -> str:
    """Return the end of an error message: the known name that `name` is most like, or
    `otherwise`."""
    close = nearest(name, known)
    return otherwise if close is None else f"did you mean {close!r}?"


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
