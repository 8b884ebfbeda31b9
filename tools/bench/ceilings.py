"""What the machine at hand can do at most, measured: the rates of a large matrix product and of a large copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 20
PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Rows and columns: few more would not be faster."""
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}
"""Far more than fits into caches."""


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of work that a GPU begins behind what it was given before: where that lasts long enough, the host has handed over
    all of `run` by then, and its own time does not count."""
    if device.type == "cpu":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return begin_event.elapsed_time(end_event) / 1e3


def product_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s, the median of many."""
    size = PRODUCT[device.type]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median(lambda: torch.mm(a, b, out=out), device)


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written, the median of many."""
    source, target = (torch.zeros(COPIED_BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * source.numel() / _median(lambda: target.copy_(source), device)


def _median(run: Callable[[], object], device: torch.device) -> float:
    for _ in range(3):
        run()
    return statistics.median(seconds_of(run, device) for _ in range(REPEATS))
