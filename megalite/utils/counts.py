"""Numbers as people write them: 1e12, 300B, 15T; and what divides one."""

from __future__ import annotations

import contextlib
import re
from math import isqrt

UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_count(text: str) -> float:
    """Return the number that `text` stands for. Raises ValueError for one that is not above 0."""
    found = re.fullmatch(r"([0-9.]+(?:e\+?[0-9]+)?)\s*([KMBT]?)", text.strip(), re.IGNORECASE)
    count = 0.0
    if found:
        with contextlib.suppress(ValueError):  # "1.2.3" matches, but is not a number
            count = float(found[1]) * UNITS[found[2].upper()]
    if not 0 < count < float("inf"):
        raise ValueError("give a number such as 1e12, 300B or 15T")
    return count


def compact(number: float) -> str:
    """Format a count or a rate with about three digits: 1234567 → 1.23M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            scaled = number / size
            if abs(scaled) < 10:
                digits = 2
            else:
                digits = 1 if abs(scaled) < 100 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{number:.0f}"


def divisors(number: int) -> list[int]:
    """Return what divides a number above 0, the least first."""
    # Divisors come in pairs, one of which is at most the square root.
    small = [each for each in range(1, isqrt(number) + 1) if number % each == 0]
    return small + [number // each for each in reversed(small) if each * each != number]
