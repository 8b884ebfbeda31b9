"""Random numbers as a function of (key, index): no state, so every layout draws the same ones.

A rank that holds a slice of a weight, or some of the tokens of a sample, computes the indices it
needs and gets what one process would have drawn for them. The mixer is splitmix64's finaliser
(Steele, Lea, Flood 2014) over a Weyl sequence, as in counter-based generators (Salmon et al. 2011).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned 64-bit number."""
    return value - (1 << 64) if value >= 1 << 63 else value


_WEYL = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's shifts of int64 copy the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_bits(key: Tensor | int, index: Tensor) -> Tensor:
    """Return 64 random bits for every index (int64, wrapping). `key` is from `key_of`, or an int64
    tensor that broadcasts against `index`."""
    # int64 wraps around, as unsigned arithmetic would: the bits are those of splitmix64.
    x = index * _WEYL + (_signed(key) if isinstance(key, int) else key)
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(key: Tensor | int, index: Tensor) -> Tensor:
    """Return float32 in [0, 1), from 24 random bits each."""
    # 24 bits are what a float32 holds exactly: more would round up to 1.
    return _shift_right(random_bits(key, index), 40).float() * 2.0**-24


def normal(key: int, start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Return float32 standard normal numbers for the indices [start, stop) on `device`, by Box and
    Muller in float64. `key` is from `key_of`.

    Works in slices, so the int64 and float64 temporaries stay small beside a large weight."""
    out = torch.empty(stop - start, device=device)
    step = 1 << 22
    for first in range(start, stop, step):
        last = min(first + step, stop)
        # One draw of 64 bits gives both of Box and Muller's numbers: the high half the radius, the
        # low half the angle. The half added keeps the logarithm finite.
        bits = random_bits(key, torch.arange(first, last, device=device))
        radius = ((_shift_right(bits, 32).double() + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = (bits & 0xFFFFFFFF).double().mul_(2.0**-32 * 2.0 * math.pi)
        out[first - start : last - start] = radius * angle.cos_()
    return out
