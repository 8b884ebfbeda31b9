"""The right spelling of what somebody has mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

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


LIKE_PATHS = 0.75
"""As `LIKE`, for names of files, many of which end alike."""
MOST_ENTRIES = 10_000
"""Limit on the entries of a folder that are looked at."""


def instead_of(path: str | Path, ending: str = "") -> str:
    """Return the end of an error message about a path that is not there: the name in its folder that
    begins with it or is most like it, without `ending`, which the names must have. Return nothing
    where none is."""
    wanted = Path(path)
    names: list[str] = []
    with suppress(OSError):
        names = [each.name for each in islice(wanted.parent.iterdir(), MOST_ENTRIES)]
    names = sorted(name.removesuffix(ending) for name in names if name.endswith(ending))
    longer = [name for name in names if wanted.name and name.startswith(wanted.name)]
    close = longer[0] if longer else nearest(wanted.name, names, LIKE_PATHS)
    return f"; did you mean {wanted.parent / close}?" if close else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
