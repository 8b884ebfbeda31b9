"""Predicts the time of single kernels on a chip: matrix products, attention, and passes over
memory."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.errors import ConfigError
from megalite.kernels.fp8 import Name
from megalite.planner.hardware import Chip

MEMORY_SHARE = 0.85
"""Share of the datasheet's bandwidth that element-wise kernels reach on large tensors."""

TILES = ((128, 256), (256, 128), (128, 128))
"""Rows and columns of the result that one multiprocessor computes at a time (the shapes cuBLAS and
CUTLASS prefer)."""

PROLOGUE = 128
"""Set-up and write-out of a tile, in the time that this many elements of the summed dimension take
to multiply."""

RAMP = 450
"""Length of a sequence at which flash attention reaches half of its rate: on an A100 with heads of
128, forward and backward, 99 TFLOP/s at 512, 133 at 1k, 155 at 2k, 173 at 4k, 182 at 8k and 189 at
16k (Dao 2023, figure 4)."""

WHOLE_HEAD, NARROW_HEAD = 128, 0.2
"""Head size from which on flash attention is as quick as it gets, and the power of a smaller one's
share of it with which it slows down: by 13% at 64 (Shah et al. 2024, figure 6)."""

LAUNCH_US = 4.0
"""Lower bound of a kernel's time in µs: PyTorch's host side of an operation. It matters for small
models only."""


@dataclass(frozen=True)
class Software:
    """Describes how a trainer uses the chip."""

    name: str
    hides_tensor: bool
    """True if tensor-parallel collectives run in pieces beside the pieces of their product, in both
    passes. Otherwise only what `parallel/tensor.py` overlaps: both collectives of a column-parallel
    layer's backward pass."""
    sequence_first: bool
    """True if activations are [sequence, batch, …]: slices of a sequence are contiguous and never
    copied."""
    norm_adds: bool
    """True if the residual addition is fused with the norm after it."""
    loss_bytes: tuple[int, int]
    """Bytes read and written per bf16 logit in the forward and in the backward pass."""
    score_bytes: tuple[int, int] = (30, 40)
    """Bytes moved per score in the forward and in the backward pass of attention that materializes
    them."""
    attention: float = 1.0
    """Rate of its flash attention, as a share of FlashAttention-2's."""
    elementwise: float = 1.0
    """Bytes that its element-wise operations move, as a multiple of those of fused kernels."""
    stops_early: bool = False
    """True if a recomputed layer ends before its last product, whose output no backward pass needs
    (torch's non-reentrant checkpoints)."""
    selective_products: float = 0.0
    """Share of the products that its selective recomputation computes again."""
    fp8_experts: bool = False
    """True if `train.fp8` takes products of experts in fp8, too."""
    once_a_node: bool = False
    """True if a token travels to another node once, however many of its experts are there, and is
    spread within it (DeepEP, HybridEP). Otherwise each of its rows travels by itself."""
    hides_experts: bool = False
    """True if rows travel to experts and back beside the work on another micro-batch (Megatron's
    overlap_moe_expert_parallel_comm). Otherwise nothing runs beside them."""


MEGALITE = Software(
    "megalite",
    hides_tensor=False,
    sequence_first=False,
    norm_adds=True,
    # kernels/loss.py: the logits are read once; then again, and overwritten with their gradient.
    loss_bytes=(2, 4),
)

MEGATRON = Software(
    "Megatron-LM",
    hides_tensor=True,
    sequence_first=True,
    norm_adds=False,
    # core/tensor_parallel/cross_entropy.py. Forward: to fp32 (6), maximum (4), subtraction (8),
    # exponential (8), sum (4), division (8). Backward: scaled by the loss's gradient (8), to bf16
    # (6).
    loss_bytes=(38, 14),
)
"""Megatron-LM as its published figures were measured: with --tp-comm-overlap, and its default
loss."""


@dataclass(frozen=True)
class Kernels:
    """Computes the seconds of kernels on a chip."""

    chip: Chip
    software: Software
    element: int
    """Bytes per element of the matrix products."""
    recipe: Name | None = None
    """Recipe of `train.fp8`, for the products that are in fp8."""

    @property
    def _peak(self) -> float:
        """Peak in FLOP/s. Raises ConfigError for fp32."""
        if self.element != 2:
            raise ConfigError(
                "train.precision: fp32 has no peak in configs/chips.yaml (it depends on TF32); plan with "
                "train.precision=bf16"
            )
        return self.chip.bf16_tflops * 1e12

    @property
    def multiplies_codes(self) -> bool:
        """Return whether products in fp8 take 8-bit codes; elsewhere rounded operands are multiplied
        in the precision of training."""
        return self.recipe is not None and self.chip.multiplies(self.recipe)

    def rounding(self, elements: float, codes: bool = True) -> float:
        """Return the seconds to round an operand of so many elements to fp8 in one pass, to 8-bit
        `codes` or to numbers of the precision of training."""
        written = 1 if codes and self.multiplies_codes else self.element
        return self.memory(elements * (self.element + written), 1)

    def product(self, m: int, n: int, k: int, fp8: bool = False) -> float:
        """Return the seconds of the product [`m`,`k`] × [`k`,`n`]; of codes in `fp8`, where the chip
        multiplies these.

        Multiprocessors compute tiles in waves of one tile each, of which the last may be partly
        empty (wave quantization). A small product is bound by memory or by its launch instead."""
        # The library takes the tile shape that suits the product best.
        full = max(_fill(m, n, tile, self.chip.num_sms) for tile in TILES)
        share = self.chip.product_share * full * k / (k + PROLOGUE)
        peak, read = self._peak, self.element
        if fp8 and self.multiplies_codes:
            assert self.chip.fp8_tflops is not None
            # Of its own peak, products keep the same share.
            peak, read = self.chip.fp8_tflops * 1e12, 1
        computing = 2.0 * m * n * k / (peak * share)
        moved = (m * k + k * n) * read + m * n * self.element
        return max(computing, self.memory(moved), LAUNCH_US * 1e-6)

    def attention(self, operations: float, length: int, head_size: int) -> float:
        """Return the seconds of flash attention with so many `operations`, masked ones not counted,
        over sequences of `length` tokens."""
        rate = self._peak * self.chip.attention_share * self.chip.clock * self.software.attention
        rate *= length / (length + RAMP) * min(1.0, head_size / WHOLE_HEAD) ** NARROW_HEAD
        return max(operations / rate, LAUNCH_US * 1e-6)

    def memory(self, num_bytes: float, kernels: int = 0) -> float:
        """Return the seconds to move `num_bytes` to and from memory in `kernels` launches."""
        bandwidth = self.chip.memory_tb_s * 1e12 * MEMORY_SHARE
        return max(num_bytes / bandwidth, kernels * LAUNCH_US * 1e-6)


def _fill(m: int, n: int, tile: tuple[int, int], num_sms: int) -> float:
    """Return the share of the multiprocessors' time that goes into the result, over whole waves of
    whole tiles."""
    tiles = -(-m // tile[0]) * -(-n // tile[1])
    waves = -(-tiles // num_sms)
    return m * n / (waves * num_sms * tile[0] * tile[1])
