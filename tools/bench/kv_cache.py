"""Milliseconds of one decode step's attention in one layer, and the bytes of its KV cache, in bf16
and in 8 bits, on the CPU.

All slots hold sequences of one length. Kinds take turns, and the best of each is told."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Literal

import torch

KINDS: tuple[Literal["int8", "fp8"] | None, ...] = (None, "int8", "fp8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for length in arguments.lengths:
        for slots in arguments.slots:
            measure(arguments, length, slots)


@torch.inference_mode()
def measure(arguments: argparse.Namespace, length: int, slots: int) -> None:
    """Print a line for each kind of cache."""
    from megalite.infer.cache import KVCache, Row, lay_out
    from megalite.kernels.attention_kinds import PLAIN

    cpu = torch.device("cpu")
    sizes = [
        (arguments.heads, arguments.head_size),
        *[(arguments.kv_heads, arguments.head_size)] * 2,
    ]
    caches = {kind: KVCache(slots, kind) for kind in KINDS}
    q, k, v = (torch.randn(slots, length, *size, dtype=torch.bfloat16) for size in sizes)
    _, places, _ = lay_out([Row(slot, 0, [0] * length, length) for slot in range(slots)], cpu)
    for cache in caches.values():
        cache.attend(q, k, v, places, PLAIN)
    rows = [Row(slot, length, [0], length + 1) for slot in range(slots)]
    _, places, _ = lay_out(rows, cpu)
    best = dict.fromkeys(KINDS, float("inf"))
    for _ in range(arguments.rounds):
        for kind, cache in caches.items():
            began = time.perf_counter()
            cache.attend(q[:, :1], k[:, :1], v[:, :1], places, PLAIN)
            best[kind] = min(best[kind], time.perf_counter() - began)
    for kind, cache in caches.items():
        buffers = [
            getattr(x, name, None)
            for x in (cache.keys, cache.values)
            for name in ("numbers", "scales")
        ]
        line = {
            "kv_cache": kind or "bf16", "length": length, "slots": slots,
            "milliseconds": round(1e3 * best[kind], 3), "ratio": round(best[None] / best[kind], 2),
            "mb": round(sum(x.nbytes for x in buffers if x is not None) / 1e6, 1),
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
