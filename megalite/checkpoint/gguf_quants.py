"""Numbers of GGUF files in few bits: what the gguf package does not quantise itself.

Q4_K is llama.cpp's own format: 256 numbers of a row in 8 blocks of 32, each number q of 0 to 15 standing
for d·s·q − m·t, where s and t are the block's scale and minimum in 6 bits, and d and m are fp16 for
all 256."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]
SUPER, BLOCK = 256, 32
ROWS_AT_ONCE = 1 << 14
"""Blocks of 256 that are quantised at a time, which bounds the memory beside the outcome."""
STEPS = 20
"""Scales that are tried for each block."""


def _fit(x: Floats) -> tuple[Floats, Floats]:
    """Return scale and minimum (at most 0, its sign turned) of blocks [N, 32]: of the steps tried
    those with the least squared error, weighed by sizes, each refitted by least squares
    (llama.cpp's make_qkx2_quants)."""
    weights = np.abs(x) + np.sqrt(np.mean(x * x, -1, keepdims=True))
    low, high = np.minimum(x.min(-1), 0), x.max(-1)
    span = high - low
    flat = span <= 0
    span[flat] = 1
    sum_w, sum_x = weights.sum(-1), (weights * x).sum(-1)
    best_scale, best_low = span / 15, low

    def round_to(steps: Floats) -> Floats:
        return np.clip(np.rint(steps[:, None] * (x - best_low[:, None])), 0, 15)

    def error(scale: Floats, least: Floats, q: Floats) -> Floats:
        return (weights * (scale[:, None] * q + least[:, None] - x) ** 2).sum(-1)

    best = error(best_scale, best_low, round_to(15 / span))
    for step in range(STEPS + 1):
        # From the best minimum so far, as llama.cpp has it, which need not be the least number.
        q = round_to((14 + 0.1 * step) / np.where(flat, 1, high - best_low))
        sum_q, sum_qq = (weights * q).sum(-1), (weights * q * q).sum(-1)
        sum_xq = (weights * x * q).sum(-1)
        det = sum_w * sum_qq - sum_q * sum_q
        safe = np.where(det > 0, det, 1)
        scale = (sum_w * sum_xq - sum_x * sum_q) / safe
        least = (sum_qq * sum_x - sum_q * sum_xq) / safe
        # A minimum above 0 cannot be stored: a scale alone then.
        above = least > 0
        least[above] = 0
        scale[above] = (sum_xq / np.where(sum_qq > 0, sum_qq, 1))[above]
        found = error(scale, least, q)
        better = (det > 0) & (found < best)
        for kept, new in ((best, found), (best_scale, scale), (best_low, least)):
            kept[better] = new[better]
    best_scale[flat] = 0
    return best_scale, -best_low


def _six_bits(x: Floats) -> tuple[Floats, NDArray[np.uint8], Floats]:
    """Return 8 positive numbers of each row as fp16 times integers of 6 bits: the factor as fp32
    [N, 1], the integers [N, 8], and the factor as it is stored."""
    largest = x.max(-1, keepdims=True)
    factor = np.where(largest > 0, 63 / np.where(largest > 0, largest, 1), 0)
    integers = np.minimum(np.rint(factor * x), 63).astype(np.uint8)
    stored = (largest / 63).astype(np.float16)
    return stored.astype(np.float32), integers, stored


def _pack_scales(scales: NDArray[np.uint8], mins: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return 8 scales and 8 minima of 6 bits, [N, 8] each, in 12 bytes: of the first four the low
    six bits of a byte, of the others four bits, and their upper two above those of the first."""
    low_scales, high_scales = scales[:, :4], scales[:, 4:]
    low_mins, high_mins = mins[:, :4], mins[:, 4:]
    first = low_scales | (high_scales >> 4) << 6
    second = low_mins | (high_mins >> 4) << 6
    third = (high_scales & 15) | (high_mins & 15) << 4
    return np.concatenate((first, second, third), -1)


def quantise_q4_k(matrix: Floats) -> NDArray[np.uint8]:
    """Return a matrix [out, in] in Q4_K, [out, bytes]; `in` must be a multiple of 256."""
    rows = matrix.reshape(-1, SUPER)
    parts = [rows[at : at + ROWS_AT_ONCE] for at in range(0, len(rows), ROWS_AT_ONCE)]
    return np.concatenate([_q4_k(part) for part in parts]).reshape(len(matrix), -1)


def _q4_k(rows: Floats) -> NDArray[np.uint8]:
    count = len(rows)
    x = rows.reshape(-1, BLOCK)
    scale, least = _fit(x)
    d, scales, stored_d = _six_bits(scale.reshape(count, -1))
    m, mins, stored_m = _six_bits(np.maximum(least.reshape(count, -1), 0))
    # From the scales as they are stored, not as they were found.
    step = (d * scales)[..., None]
    shifted = x.reshape(count, -1, BLOCK) + (m * mins)[..., None]
    is_step = step > 0
    rounded = np.rint(shifted / np.where(is_step, step, 1))
    q = np.clip(rounded, 0, 15) * is_step
    # Of each 64 numbers the first 32 are in the low halves of 32 bytes.
    pairs = q.astype(np.uint8).reshape(count, -1, 2, BLOCK)
    low, high = pairs[:, :, 0], pairs[:, :, 1]
    bytes_of_q = (low | high << 4).reshape(count, -1)
    header = np.concatenate((stored_d, stored_m), -1).view(np.uint8)
    return np.concatenate((header, _pack_scales(scales, mins), bytes_of_q), -1)
