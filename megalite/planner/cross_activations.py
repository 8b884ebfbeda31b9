"""Counts the bytes that a decoder's attention to an encoder's states keeps for the backward pass,
and what its passes hold on top while they run. Letters are those of `activations`."""

from __future__ import annotations

from megalite.planner.attention_activations import attended
from megalite.planner.shapes import FP32, INT64, RANDOM_BYTES, LayerShapes


def cross_kept(shapes: LayerShapes, lean: bool = False) -> int:
    """Count what attention to an encoder's states keeps: the norm before it, queries, keys and
    values of these states, the output; and the states themselves, normalized, in the first layer
    that has it. `lean`: no scores, which are recomputed."""
    if not shapes.crosses:
        return 0
    stat = (1 if shapes.rms_norm else 2) * FP32
    kept = 2 * shapes.hidden_bytes + shapes.tokens_here * stat
    kept += shapes.hidden_bytes if shapes.hidden_dropout else 0
    if shapes.opens:
        kept += 2 * shapes.source_bytes + shapes.source_tokens * stat
        kept += shapes.source_bytes if shapes.hidden_dropout else 0
    if shapes.attention_dropout and not lean:
        kept += _cross_scores(shapes) * (FP32 + 2 * shapes.element)
    projections = _cross_projections(shapes)
    log_sum_exp = 0 if shapes.attention_dropout else shapes.tokens * shapes.heads * FP32
    return kept + projections * shapes.element + attended(shapes) + log_sum_exp


def _cross_projections(shapes: LayerShapes) -> int:
    """Return the number (not bytes) of queries' features, and of those of the keys and values of all
    context ranks."""
    return shapes.tokens * shapes.q + shapes.source_tokens * shapes.context * shapes.kv


def _cross_scores(shapes: LayerShapes) -> int:
    """Return the number (not bytes) of scores of attention to an encoder's states."""
    return shapes.tokens * shapes.heads * shapes.source_length


def cross_forward(shapes: LayerShapes) -> int:
    """Count what attention to an encoder's states holds beside what it keeps while it drops some of
    the probabilities."""
    if not shapes.attention_dropout:
        return 0
    # The scores in fp32, and the random numbers for the mask, in place of mask and product.
    scores = _cross_scores(shapes)
    numbers = scores * (FP32 + RANDOM_BYTES - shapes.element)
    return numbers + scores // shapes.micro_batch_size * INT64


def cross_backward(shapes: LayerShapes) -> int:
    """Count the gradients of attention to an encoder's states."""
    projections = _cross_projections(shapes)
    scores = _cross_scores(shapes) * 2 * FP32 if shapes.attention_dropout else 0
    return projections * shapes.element + scores
