"""What the machine at hand can do at most, measured: the rates of a large matrix product and of a
large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from megalite.observe.throughput import HostEvent

REPEATS = 20
PRODUCT = {"cpu": 1024, "cuda": 8192}
"""Rows and columns: few more would not be faster."""
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Far more than fits into caches."""


def event(device: torch.device) -> Any:
    """Recorded here: in a GPU's stream it is when the device comes to it."""
    found = HostEvent() if device.type == "cpu" else torch.cuda.Event(enable_timing=True)
    found.record()
    return found


def seconds_between(begin: Any, end: Any) -> float:
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    begin = event(device)
    run()
    return seconds_between(begin, event(device))


class Product:
    """One product at a call."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16):
        size = PRODUCT[device.type]
        self.a, self.b, self.out = (
            torch.randn(size, size, dtype=dtype, device=device) for _ in range(3)
        )
        self.work = 2 * size**3
        """Floating-point operations."""

    def __call__(self) -> None:
        torch.mm(self.a, self.b, out=self.out)


class Copy:
    """One copy at a call. It also drives everything else out of the caches."""

    def __init__(self, device: torch.device):
        self.source, self.target = (
            torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
            for _ in range(2)
        )
        self.work = 2 * self.source.numel()
        """Bytes read and written."""

    def __call__(self) -> None:
        self.target.copy_(self.source)


def product_rate(device: torch.device) -> float:
    """FLOP/s in bf16: the median of many, or of what two seconds allow a CPU that has no
    instructions for bf16."""
    product = Product(device)
    seconds: list[float] = []
    product()
    until = time.perf_counter() + 2
    while len(seconds) < REPEATS and (not seconds or time.perf_counter() < until):
        seconds.append(seconds_of(product, device))
    return product.work / statistics.median(seconds)
