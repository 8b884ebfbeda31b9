"""Types of options that take numbers: each refuses what is out of its range, which argparse tells
with the option's name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from megalite.utils.counts import parse_count


def at_least(smallest: int, largest: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the `type` of an option that takes integers from `smallest` to `largest`."""

    def integer(text: str) -> int:
        # A ValueError of `int` argparse tells itself.
        if not smallest <= (value := int(text)) <= largest:
            raise argparse.ArgumentTypeError(f"{text} is not between {smallest:,} and {largest:,}")
        return value

    return integer


def number(smallest: float, largest: float = math.inf) -> Callable[[str], float]:
    """Return the `type` of an option that takes finite numbers from `smallest` to `largest`."""

    def number(text: str) -> float:
        # NaN is neither below nor above anything.
        if not (smallest <= (value := float(text)) <= largest and math.isfinite(value)):
            limit = (
                f"at least {smallest:g}" if largest == math.inf else f"{smallest:g} to {largest:g}"
            )
            raise argparse.ArgumentTypeError(f"{text} is not a number of {limit}")
        return value

    return number


def count(text: str) -> float:
    """Return the number that a `count` option such as 30M stands for."""
    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
