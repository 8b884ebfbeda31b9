"""Milliseconds of attention in training, forward and backward, by megalite's kernel and by torch's, on
the CPU: CPU time of one thread, which other work on the machine moves little.

Both take turns, and the median of each is told."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from megalite.kernels.attention_kinds import AttentionKind

TOKENS, HEADS, SIZE = 1024, 8, 64
"""Tokens of a micro-batch, or one row where rows are longer; heads, and the size of one."""
FULL, WINDOW, CAUSAL = AttentionKind(causal=False), AttentionKind(64, causal=False), AttentionKind()
CASES = {
    "full": (FULL, 1, False),
    "full, four documents": (FULL, 4, False),
    "window of 64": (WINDOW, 1, False),
    "window of 64, four documents": (WINDOW, 4, False),
    "full, biased": (FULL, 1, True),
    "full, biased, four documents": (FULL, 4, True),
    "causal": (CAUSAL, 1, False),
    "causal, biased": (CAUSAL, 1, True),
    "causal, window of 64": (AttentionKind(64), 1, False),
}
"""Kind, documents of a row, and whether scores have a bias that is trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for length in arguments.lengths:
            for case in CASES:
                own, torchs = measure(case, dtype, length, arguments.rounds)
                print(
                    f"{str(dtype)[6:]:9}{length:6} {case:29} megalite {own:8.1f} ms   torch {torchs:8.1f} ms   "
                    f"{torchs / own:5.2f}",
                    flush=True,
                )


def measure(case: str, dtype: torch.dtype, length: int, rounds: int) -> tuple[float, float]:
    """Return the milliseconds of megalite's kernel and of torch's."""
    from megalite.config import KernelsConfig
    from megalite.kernels import library
    from megalite.kernels.attention import self_attention

    kind, documents, is_biased = CASES[case]
    rows = max(1, TOKENS // length)
    qkv = torch.randn(rows, length, 3 * HEADS, SIZE).to(dtype).requires_grad_()
    bias = torch.randn(1, HEADS, length, length).to(dtype).requires_grad_() if is_biased else None
    grad = torch.randn(rows, length, HEADS * SIZE).to(dtype)
    number_T = torch.arange(documents).repeat_interleave(length // documents)
    document_BT = None if documents == 1 else number_T.expand(rows, -1).contiguous()
    taken: dict[str, list[float]] = {"megalite": [], "torch": []}
    for turn in range(rounds + 1):
        for wish, times in taken.items():
            library.use(KernelsConfig(attention=wish))
            for x in (qkv, bias):
                clear(x)
            began = time.process_time()
            self_attention(qkv, HEADS, HEADS, document_BT, kind, bias).backward(grad)
            if turn:  # the first is to warm up
                times.append(1e3 * (time.process_time() - began))
    own, torchs = (statistics.median(times) for times in taken.values())
    return own, torchs


def clear(x: Tensor | None) -> None:
    if x is not None:
        x.grad = None


if __name__ == "__main__":
    main()
