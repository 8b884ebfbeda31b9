"""Bytes that the modules keep for the backward pass, counted from models/ and parallel/ tensor by tensor, and what
passes hold on top while they run.

Letters: T tokens of a micro-batch on this rank, d hidden features of a token here (a share under sequence parallelism),
Q and K features of its queries and of its keys, I of its MLP, V rows of the vocabulary, all per tensor rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalite.planner.shapes import Shapes

Recompute = Literal["none", "selective", "full"]

FP32 = 4

RANDOM_BYTES = 3 * 8
"""Held per number while counter_random makes dropout masks."""


@dataclass(frozen=True)
class LayerBytes:
    """Of one layer and one micro-batch."""

    kept: int
    """From its forward to its backward pass."""
    transient: int
    """More than `kept`, at the fullest moment of its passes."""
    for_weights: int
    """What a zero-bubble schedule keeps from the input's backward pass to the weights': both sides of each product."""


def layer_bytes(shapes: Shapes, recompute: Recompute, fused_norm: bool) -> LayerBytes:
    """`fused_norm`: rms_norm is one kernel, as on CUDA; on the CPU it is written out, and keeps fp32 copies."""
    everything = _norms(shapes, fused_norm) + _attention(shapes) + _mlp(shapes, recompute)
    backward = _mlp_backward(shapes, recompute)
    if shapes.attention_dropout:
        # Random numbers of a dropout are made in int64, three at a time; the layer's MLP is not there yet.
        scores = shapes.tokens * shapes.heads * shapes.seq_length
        backward = max(backward, scores * RANDOM_BYTES - _mlp(shapes, recompute))
    for_weights = shapes.tokens * shapes.element * sum(_product_features(shapes))
    if recompute == "full":
        # The layer's input; the rest comes back, one layer at a time.
        return LayerBytes(shapes.hidden_bytes, everything - shapes.hidden_bytes + backward, for_weights)
    return LayerBytes(everything, backward, for_weights)


def _norms(shapes: Shapes, fused: bool) -> int:
    """Both norms: input, output (the product behind it keeps it) and statistics."""
    size = shapes.norm_hidden * shapes.element
    statistics = FP32 if shapes.rms_norm else 2 * shapes.element
    if shapes.rms_norm and not fused:
        # fp32 input and fp32 normalised input instead of the input itself.
        size += 2 * shapes.norm_hidden * FP32
    else:
        size *= 2
    return 2 * _cut_tokens(shapes) * statistics + 2 * shapes.tokens * size


def _cut_tokens(shapes: Shapes) -> int:
    return shapes.tokens // shapes.tensor if shapes.sequence else shapes.tokens


def _attention(shapes: Shapes) -> int:
    element, q, kv = shapes.element, shapes.q, shapes.kv
    if shapes.context > 1:
        per_token = (q + 2 * kv + q) * element  # queries, keys and values stacked for the ring, output
    else:
        per_token = (q + 2 * kv + q) * element  # the fused projection, kept alive by its values; and the output
        if shapes.rope:
            per_token += (q + kv) * element  # rotated copies
    if shapes.head_norms:
        per_token += (q + kv) * element
    if shapes.attention_dropout:
        # Written out: probabilities in fp32, the mask of the dropout and what it left; keys and values are copied.
        per_token += shapes.heads * shapes.seq_length * (FP32 + 2 * element) + 2 * q * element
    else:
        per_token += shapes.heads * FP32  # log-sum-exp
    if shapes.hidden_dropout:
        per_token += 2 * shapes.norm_hidden * element  # masks behind attention and MLP
    return shapes.tokens * per_token


def _mlp(shapes: Shapes, recompute: Recompute) -> int:
    """What comes out of the first product; and unless recomputed silu(gate) and the product behind it, or gelu."""
    per_token = (2 if shapes.gated else 1) * shapes.inner
    if recompute != "selective":
        per_token += (2 if shapes.gated else 1) * shapes.inner
    return shapes.tokens * per_token * shapes.element


def _mlp_backward(shapes: Shapes, recompute: Recompute) -> int:
    """The widest place of a backward pass: gradients of gate and up, apart and joined, while the first product's output
    is still held; silu(gate) and the second product's input are free by then."""
    gradients = 4 if shapes.gated else 2
    freed = 0 if recompute == "selective" else (2 if shapes.gated else 1)
    inner = shapes.tokens * shapes.inner * shapes.element
    return inner * max(1, gradients - freed) + 2 * shapes.hidden_bytes


def _product_features(shapes: Shapes) -> list[int]:
    """Features per token that each product of a layer needs for its weight's gradient: its input's (a slice, where
    sequence parallelism gathers it again) and its output's."""
    return [
        (shapes.norm_hidden if matrix.column_parallel and shapes.sequence else matrix.columns) + matrix.rows
        for matrix in shapes.matrices
    ]


@dataclass(frozen=True)
class HeadBytes:
    """Of the last norm, the head and the loss, for one micro-batch."""

    kept: int
    forward: int
    """At the fullest moment of the forward pass, `kept` included."""
    backward: int
    """At the fullest moment of the backward pass, `kept` included."""


def head_bytes(shapes: Shapes, fused_norm: bool) -> HeadBytes:
    logits = shapes.tokens * shapes.vocab
    norm = _norms(shapes, fused_norm) // 2
    if shapes.tensor > 1:
        # Probabilities, in place in an fp32 copy; their gradient is made in the same place and cast.
        cast = shapes.element if shapes.element < FP32 else 0
        return HeadBytes(norm + logits * FP32, norm + logits * (shapes.element + FP32), norm + logits * (FP32 + cast))
    # Log-probabilities beside fp32 logits; in the backward pass beside their gradient and that of the logits.
    copy = FP32 if shapes.element < FP32 else 0
    return HeadBytes(norm + logits * FP32, norm + logits * (shapes.element + copy + FP32), norm + logits * 3 * FP32)
