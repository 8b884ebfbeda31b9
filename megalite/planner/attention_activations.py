"""Counts the bytes that a stack's attention to itself keeps for the backward pass, and what its
passes hold on top while they run. Letters are those of `activations`."""

from __future__ import annotations

from megalite.kernels.attention_on_gpus import LARGEST_FLASH_HEAD
from megalite.kernels.largest_logits import LOGITS_AT_ONCE
from megalite.planner.shapes import FP32, INT64, RANDOM_BYTES, LayerShapes


def _projection(shapes: LayerShapes) -> int:
    """Count queries, keys and values as one tensor, in which RoPE works in place."""
    return shapes.tokens * (shapes.q + shapes.kv) * shapes.element


def latents(shapes: LayerShapes) -> int:
    """Count what latent attention keeps beside: the output without what values were filled up with,
    and what heads are made from."""
    of_values = shapes.tokens * shapes.heads * shapes.latent_value
    return of_values * shapes.element + _sources_of_heads(shapes)


def _sources_of_heads(shapes: LayerShapes) -> int:
    """Count latents, and their norms."""
    return 2 * shapes.tokens_here * shapes.latents * shapes.element


def attended(shapes: LayerShapes) -> int:
    """Count the output of attention."""
    return shapes.tokens * shapes.attended * shapes.element


def _copied(shapes: LayerShapes) -> int:
    """Count the copies of queries, keys and values for the products of attention that materializes
    its scores, in which every query head has keys and values of its own."""
    of_keys = shapes.key_tokens * (shapes.q + shapes.attended)
    return (shapes.tokens * shapes.q + of_keys) * shapes.element


def _scores(shapes: LayerShapes) -> int:
    """Return the number (not bytes) of attention scores, for attention that materializes them."""
    return shapes.tokens * shapes.heads * shapes.seq_length


def _mask(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count the mask that attention keeps, in numbers to add to the scores, where torch's kernel
    takes one: on a GPU, where variable-length attention does not compute it, for windows and for
    documents, which differ from row to row."""
    if on_gloo:
        return 0
    size = shapes.head_size
    if (
        shapes.element != FP32
        and size == shapes.value_size
        and size % 8 == 0
        and size <= LARGEST_FLASH_HEAD
    ):
        return 0
    rows = shapes.tokens if shapes.document_mask else shapes.seq_length
    is_masked = (shapes.window or shapes.document_mask) and shapes.context == 1
    return rows * shapes.seq_length * shapes.element if is_masked else 0


def _repeated(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count the keys and values of every query head, which the GPU's kernel for masks and for fp32
    takes."""
    if on_gloo or shapes.context > 1 or shapes.heads == shapes.kv_heads:
        return 0
    if shapes.element == FP32 or _mask(shapes, on_gloo):
        return shapes.tokens * (shapes.q + shapes.attended) * shapes.element
    return 0


def attention_kept(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count what attention keeps for its backward pass."""
    if _widens(shapes, on_gloo):
        masked = shapes.pairs if shapes.causal else 0
        return _widened(shapes) + _scores(shapes) * FP32 + masked + attended(shapes)
    if _fuses_bias(shapes, on_gloo):
        # Keys and values once more for each head; and the bias with what is not attended to, if it
        # is not that of all layers.
        copied = shapes.key_tokens * shapes.kv * shapes.element + masked_bias(shapes)
        return attention_kept_lean(shapes) + shapes.tokens * shapes.heads * FP32 + copied
    if _adds_bias(shapes, on_gloo):
        kept = attention_kept_lean(shapes) + shapes.tokens * shapes.heads * FP32
        return kept + (0 if shapes.element == FP32 else _exact_bias(shapes))
    if not shapes.writes_scores:
        # The projection, the output and its log-sum-exp.
        kept = attention_kept_lean(shapes) + shapes.tokens * shapes.heads * FP32
        if shapes.by_heads:  # the output of all tokens for some heads, and of some tokens for all
            kept += attended(shapes)
        return kept + _mask(shapes, on_gloo) + _repeated(shapes, on_gloo)
    # Materialized: probabilities in fp32 and rounded, and the mask. Queries, keys and values are
    # copied for their products, after which the projection is freed. [B, H, T, S] in fp32 and in
    # the model's dtype, and a bool mask [T, S].
    scores = _scores(shapes) * (FP32 + shapes.element)
    scores += shapes.pairs if shapes.causal else 0
    if shapes.attention_dropout:
        scores += _scores(shapes) * shapes.element  # the dropout's mask beside its output
    if shapes.attention_softcap:
        scores += _scores(shapes) * FP32  # the output of tanh
    return _copied(shapes) + attended(shapes) + scores + _before_head_norms(shapes)


def _widens(shapes: LayerShapes, on_gloo: bool) -> bool:
    """Return whether torch adds the bias of the scores, and computes with them, in fp32: on the CPU,
    where nothing is dropped, and keys come from other context ranks."""
    gathers = shapes.context > 1
    return shapes.biased and not shapes.attention_dropout and on_gloo and gathers


def _adds_bias(shapes: LayerShapes, on_gloo: bool) -> bool:
    """Return whether megalite's kernel adds the bias of the scores: on the CPU, where nothing is
    dropped, and all keys are here."""
    gathers = shapes.context > 1
    return shapes.biased and not shapes.attention_dropout and on_gloo and not gathers


def _exact_bias(shapes: LayerShapes) -> int:
    """Count the bias of the scores in fp32."""
    return shapes.heads * shapes.pairs * FP32


def _fuses_bias(shapes: LayerShapes, on_gloo: bool) -> bool:
    """Return whether torch's kernel adds the bias of the scores, which are not written: on GPUs,
    where nothing is dropped."""
    return shapes.biased and not shapes.attention_dropout and not on_gloo


def _widened(shapes: LayerShapes) -> int:
    """Count queries, keys and values in fp32."""
    return (shapes.tokens * shapes.q + shapes.key_tokens * shapes.kv) * FP32


def masked_bias(shapes: LayerShapes) -> int:
    """Count the bias of the scores put together with what is not attended to."""
    pairs = shapes.pairs if shapes.biased and shapes.causal else 0
    return shapes.heads * pairs * shapes.element


def attention_kept_lean(shapes: LayerShapes) -> int:
    """Count the input and the output of attention alone."""
    return _projection(shapes) + attended(shapes) + _before_head_norms(shapes)


def _before_head_norms(shapes: LayerShapes) -> int:
    """Count the input of the norms of queries and keys, and their statistics."""
    if not shapes.head_norms:
        return 0
    return _projection(shapes) + shapes.tokens * (shapes.heads + shapes.kv_heads) * FP32


def attention_forward(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count what is alive at the peak of attention's forward pass."""
    size = _projection(shapes)
    scores = _scores(shapes)
    if _widens(shapes, on_gloo):
        # The scores, and with their bias; which is put together with what is not attended to.
        size += _widened(shapes) + 2 * scores * FP32 + masked_bias(shapes)
    elif shapes.attention_dropout:
        # The scores and their softmax in fp32, its rounded copy, and the random numbers for the
        # mask with their indices, which all samples share.
        bytes_each = 2 * FP32 + shapes.element + RANDOM_BYTES
        indices = scores // shapes.micro_batch_size * INT64
        size += _copied(shapes) + scores * bytes_each + indices + masked_bias(shapes)
    elif shapes.attention_softcap:
        # In fp32: the scores, capped, masked, and their softmax.
        size += _copied(shapes) + scores * 4 * FP32
    if shapes.logits_every:
        # Some of the logits, and as many masked ones; their queries; and for all heads a mask.
        at_once = min(LOGITS_AT_ONCE, scores)
        queries = at_once // shapes.seq_length * shapes.head_size * shapes.element
        mask = at_once // (shapes.micro_batch_size * shapes.heads)
        size = max(size, _projection(shapes) + at_once * 2 * shapes.element + queries + mask)
    if shapes.latents:
        # Beside what heads are put together as: queries, and keys without positions and values.
        features = 2 * shapes.head_size - shapes.shared_keys + shapes.latent_value
        put_together = shapes.tokens * shapes.heads * features * shapes.element
        size = max(size, _projection(shapes) + put_together + _sources_of_heads(shapes))
    if shapes.by_heads:
        # Its features by rank; as they arrive, behind each other, and in the order of tokens.
        size = max(size, 5 * _projection(shapes))
    elif shapes.context > 1 and not shapes.gathers:
        # Keys and values twice, own and arriving; a block's output, in fp32 as well, and the sum of
        # all blocks.
        keys_values = 2 * shapes.kv * shapes.element
        outputs = shapes.attended * (shapes.element + 2 * FP32)
        size += shapes.tokens * (keys_values + outputs)
    return size


def attention_backward(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count what is alive at the peak of attention's backward pass: what it has kept, and its
    gradients."""
    size = attention_kept(shapes, on_gloo) + _projection(shapes)
    if not shapes.writes_scores:
        size += _repeated(shapes, on_gloo)
    # The output without what was filled up is freed by then, and whatever follows needs less: a
    # gradient of heads is a part of the projection's.
    size += _sources_of_heads(shapes)
    if _fuses_bias(shapes, on_gloo):
        size += _scores(shapes) * shapes.element  # the gradient of the bias, of each sample
    elif _adds_bias(shapes, on_gloo):
        size += _exact_bias(shapes)  # the gradient of the bias
    elif shapes.writes_scores:
        size += _scores(shapes) * 2 * FP32  # gradients of the probabilities and of the scores
    if shapes.by_heads:
        # Then the gradient as it is, in the order of ranks, as messages and as they arrive.
        size = max(size + attended(shapes), 4 * _projection(shapes))
    elif shapes.context > 1 and not shapes.gathers:
        # Keys and values twice, own and arriving. In fp32 the gradients of queries, and of keys and
        # values twice. The gradients of the last block, which has half of the queries or half of
        # the keys. And the projection's gradient in pieces before it is whole.
        keys_values = 2 * shapes.kv * shapes.element
        fp32 = (shapes.q + 2 * shapes.kv) * FP32
        half_queries = shapes.q // 2 + shapes.kv
        half_keys = shapes.q + shapes.kv // 2
        block = max(half_queries, half_keys) * shapes.element
        size += shapes.tokens * (keys_values + fp32 + block) + _projection(shapes)
    return size
