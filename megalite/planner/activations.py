"""Counts the bytes that modules keep for the backward pass, tensor by tensor, and what passes hold
on top while they run. The counts follow models/, kernels/ and parallel/ with megalite's own
kernels; plain torch keeps more.

Letters: T tokens of a micro-batch on this rank, D hidden size, d hidden features a token has here
(D, or a share under sequence parallelism), Q and K features of its queries and of its keys, I of
its MLP, V rows of the vocabulary; all but D are per tensor rank. The MLP's first product has 2·I
output features if it is gated, otherwise I.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from megalite.kernels.attention import LARGEST_FLASH_HEAD, LOGITS_AT_ONCE
from megalite.kernels.quantised import AT_ONCE, BYTES_BESIDE
from megalite.parallel.expert import goes_to_all
from megalite.planner.shapes import LayerShapes, Shapes

Recompute = Literal["none", "selective", "full"]

FP32, INT64 = 4, 8

RANDOM_BYTES = 3 * INT64
"""Bytes held per number while counter_random makes dropout masks."""


@dataclass(frozen=True)
class PartBytes:
    """Holds the bytes of one part of the model for one micro-batch.

    Those of a pass are at its peak, and include what is kept."""

    kept: int
    """Kept from the forward to the backward pass."""
    forward: int
    backward: int
    backward_input: int
    """Peak of a zero-bubble schedule's input-gradient pass, which leaves both operands of each
    product behind."""
    for_weights: int
    """Both operands of each product, kept from that pass to the weight-gradient pass."""


def layer_bytes(shapes: LayerShapes, recompute: Recompute, on_gloo: bool = False) -> PartBytes:
    """Return the bytes of one layer of these `shapes`. `on_gloo`: collectives are the CPU's, which
    need buffers.

    `recompute` is the setting train.recompute."""
    layer = _Layer(shapes, recompute, on_gloo)
    of_mlp = max(layer.mlp_backward())
    of_attention = max(layer.attention_backward())
    dense = _dequantised(shapes)
    per_feature = shapes.tokens * shapes.element
    operands = [per_feature * features for features in _product_features(shapes)]
    return PartBytes(
        # A pass has several moments that may be its peak; the largest of them counts.
        kept=layer.kept,
        forward=max(layer.forward()) + dense,
        backward=max(of_mlp, of_attention) + dense,
        # Without weight gradients, the input of the MLP's second product stays alive; and all
        # operands of the MLP do until attention's backward pass.
        backward_input=max(
            of_mlp + layer.inner, of_attention + sum(operands[shapes.num_mixer_matrices :])
        )
        + dense,
        for_weights=sum(operands),
    )


def _dequantised(shapes: LayerShapes) -> int:
    """Count the largest matrix of a layer as a product takes it, and what is held beside while it
    is dequantised, where matrices are held in few bits."""
    if shapes.quantised is None:
        return 0
    sizes = (each.rows * each.columns for each in shapes.matrices if each.is_linear)
    largest = max(sizes, default=0)
    return largest * shapes.element + min(largest, AT_ONCE) * BYTES_BESIDE[shapes.quantised]


def _before_magnitudes(shapes: LayerShapes) -> int:
    """Count what matrices return before magnitudes scale it (DoRA), which their gradients need; as if
    all matrices that adapters could adapt had them."""
    if not shapes.dora:
        return 0
    features = sum(each.rows for each in shapes.matrices if each.is_linear)
    return shapes.tokens * features * shapes.element


class _Layer:
    """Counts the tensors of a layer, and what is alive at each moment of its passes that may be the
    peak."""

    def __init__(self, shapes: LayerShapes, recompute: Recompute, on_gloo: bool):
        self.shapes = shapes
        self.recompute = recompute
        self.on_gloo = on_gloo
        self.hidden = shapes.hidden_bytes
        self.norm = _norm(shapes)
        self.masks = self.hidden if shapes.hidden_dropout else 0
        """Mask of the dropout after attention; the one after the MLP has as many bytes."""
        if recompute == "selective" and shapes.writes_scores:
            self.attention = _lean_attention(shapes)
        else:
            self.attention = _attention(shapes, on_gloo)
        self.inner = shapes.tokens * shapes.inner * shapes.element
        """Input of the MLP's second product."""
        self.first = 2 * self.inner if shapes.gated else self.inner
        """Output of the MLP's first product."""
        # All in bytes, on this rank: two norms, attention, MLP, and the masks of dropout.
        norms = 2 * self.norm + _more_norms(shapes)
        gate = self.inner if shapes.gelu_gate else 0  # gelu(gate) is a tensor of its own
        if shapes.relu:  # its output says where its input was above 0
            self.first = 0 if shapes.inner_dropout is False else self.inner
        inner_mask = self.inner if shapes.inner_dropout else 0
        mlp = self.first + gate + self.inner + inner_mask
        self.routed = _routed(shapes)
        self.cross = _cross(shapes, recompute == "selective")
        """All that attention to an encoder keeps, its norm and mask included."""
        # A predictor's hidden states and embeddings as one, the operand of its first product.
        self.joined = 2 * self.hidden if shapes.joins else 0
        # Gradient of the residual stream. Beside a predictor's are those of all that the head takes,
        # and the input of the last norm.
        self.gradient = self.hidden * (3 + shapes.predictors if shapes.joins else 1)
        self.plain = (
            self.joined
            + norms
            + self.attention
            + self.cross
            + _latents(shapes)
            + mlp
            + self.routed
            + 2 * self.masks
            + _before_magnitudes(shapes)
        )
        """All that a layer keeps for its backward pass without recomputation, or holds after it has
        recomputed."""
        self.kept = self.plain
        if recompute == "selective":
            # activation_and_down_proj is recomputed from the first product's output.
            self.kept = self.plain - gate - self.inner - inner_mask
        elif recompute == "full":
            # Only the layer's input; a predictor has the embeddings beside it.
            self.kept = 2 * self.hidden if shapes.joins else self.hidden

    def forward(self) -> list[int]:
        """Return the bytes at the moments that may be the peak of the forward pass."""
        hidden = self.hidden
        # Until its end, even a layer that is recomputed in full holds three hidden states: its
        # input, the residual sum after attention and the norm of that. What attention added stays
        # in any case.
        at_end = self.plain
        if self.recompute == "full":
            at_end = 3 * hidden + self.first + self.inner
        # The second product's output, reduced over the tensor ranks; then added to the stream.
        second = max(_whole(self.shapes) + self._scatter(), 2 * hidden)
        moments = [
            self.norm + _attention_forward(self.shapes, self.on_gloo),
            at_end + hidden + second,
        ]
        if self.shapes.crosses:
            kept = 0 if self.recompute == "full" else self.attention
            moments.append(self.norm + kept + self.cross + _cross_forward(self.shapes))
        if self.masks:
            without_mask = 3 * hidden if self.recompute == "full" else self.kept - self.masks
            moments.append(without_mask + 2 * hidden + _mask_numbers(self.shapes))
        return moments

    def mlp_backward(self) -> list[int]:
        """Return the bytes at the moments of the MLP's backward pass that may be its peak.

        The gradient of the residual stream is alive beside each of them."""
        whole = _whole(self.shapes)
        before = self.gradient + self.plain - self.masks
        # Gradients of the second product's input, which is freed by then, and of the first one's
        # output.
        moments = [before + self.first]
        if self.shapes.visited:
            # Gradients of the rows of each expert, beside these.
            rows = self.shapes.visited * _routed_whole(self.shapes)
            moments.append(before + rows)
            if self.shapes.expert > 1:  # on their way
                moments.append(before + _under_way(self.shapes, self.on_gloo) * rows)
        if self.shapes.sequence:
            moments.append(before + max(_gathered(self.shapes), whole + self.inner))
            # The first product's input, gathered again, and its gradient; its output is freed by
            # then.
            moments.append(before - self.inner + 2 * whole + self._scatter())
        if self.recompute != "none":
            # Recomputation runs through the second product, whose output comes again.
            moments.append(before + self.masks + whole)
        if self.recompute == "full" and self.masks:
            moments.append(before + 2 * self.hidden + _mask_numbers(self.shapes))
        return moments

    def attention_backward(self) -> list[int]:
        """Return the bytes at the moments of attention's backward pass that may be its peak. The
        MLP is freed."""
        beside = self.gradient + self.norm + _attended(self.shapes)
        moments = [beside + _attention_backward(self.shapes, self.on_gloo)]
        if self.shapes.crosses:
            beside += self.shapes.source_bytes  # the gradient of the encoder's states
            moments = [each + self.shapes.source_bytes for each in moments]
            moments.append(beside + self.attention + self.cross + _cross_backward(self.shapes))
        if self.recompute == "full" or (
            self.recompute == "selective" and self.shapes.writes_scores
        ):
            moments.append(beside + _attention_forward(self.shapes, self.on_gloo))
            if self.shapes.crosses:
                masked = _masked_bias(self.shapes) if self.recompute == "full" else 0
                again = self.attention + masked + _cross(self.shapes)
                moments.append(beside + again + _cross_forward(self.shapes))
        return moments

    def _scatter(self) -> int:
        return _scatter(self.shapes, self.on_gloo)


def _routed(shapes: LayerShapes) -> int:
    """Count what a mixture of experts keeps beside the input and the output of its activation: each
    expert's output for each of its tokens, the router's probabilities, which token is where, and
    under sequence parallelism the tokens of all ranks. Where tokens travel to experts of other
    ranks, also those that arrive."""
    if not shapes.visited:
        return 0
    gathered = _routed_whole(shapes) if shapes.routed_tokens > _tokens_here(shapes) else 0
    probabilities = _tokens_here(shapes) * shapes.num_experts * FP32
    rows = shapes.routed_tokens * shapes.visited
    if shapes.expert == 1:
        return (
            gathered
            + shapes.visited * _routed_whole(shapes)
            + probabilities
            + rows * (2 * INT64 + FP32)
        )
    return 2 * shapes.visited * _routed_whole(shapes) + probabilities + rows * (4 * INT64 + FP32)


def _under_way(shapes: LayerShapes, on_gloo: bool) -> int:
    """Return how many times a rank's rows there are while their gradients travel to experts of other
    ranks, beside what the layer has kept: those that go and those that come, for each expert's
    output, which is freed by then; by all-gather a place for each row of all ranks, and gloo's
    received ones beside them."""
    num_rows, ranks = shapes.routed_tokens * shapes.visited, shapes.expert
    if not goes_to_all(num_rows, shapes.hidden * shapes.element, ranks):
        return 1
    return ranks + 4 + (ranks - 1) * on_gloo


def _routed_whole(shapes: LayerShapes) -> int:
    """Count the hidden states of the tokens that this rank sends to experts."""
    return shapes.routed_tokens * shapes.hidden * shapes.element


def _tokens_here(shapes: Shapes) -> int:
    """Return the tokens of the residual stream on this rank: a share under sequence parallelism."""
    return shapes.tokens // shapes.tensor if shapes.sequence else shapes.tokens


def _norm(shapes: Shapes) -> int:
    """Count a norm: its input, its output (an operand of the next product) and fp32 statistics.

    The input of the second norm is the residual sum after attention."""
    statistics = 1 if shapes.rms_norm else 2  # rstd; LayerNorm: mean as well
    return 2 * shapes.hidden_bytes + _tokens_here(shapes) * statistics * FP32


def _more_norms(shapes: LayerShapes) -> int:
    """Count the norms after attention and MLP, which some families have beside the usual two: input
    and statistics. Those of attention to an encoder are counted with it."""
    more = 0 if shapes.crosses else shapes.norms - 2
    return more * (shapes.hidden_bytes + _tokens_here(shapes) * FP32)


def _projection(shapes: LayerShapes) -> int:
    """Count queries, keys and values as one tensor, in which RoPE works in place."""
    return shapes.tokens * (shapes.q + shapes.kv) * shapes.element


def _latents(shapes: LayerShapes) -> int:
    """Count what latent attention keeps beside: latents and their norms, and the output without
    what values were filled up with."""
    of_values = shapes.tokens * shapes.heads * shapes.latent_value
    return (of_values + 2 * _tokens_here(shapes) * shapes.latents) * shapes.element


def _attended(shapes: LayerShapes) -> int:
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


def _attention(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count what attention keeps for its backward pass."""
    if _widens(shapes, on_gloo):
        masked = shapes.pairs if shapes.causal else 0
        return _widened(shapes) + _scores(shapes) * FP32 + masked + _attended(shapes)
    if _fuses_bias(shapes, on_gloo):
        # Keys and values once more for each head; and the bias with what is not attended to, if it
        # is not that of all layers.
        copied = shapes.key_tokens * shapes.kv * shapes.element + _masked_bias(shapes)
        return _lean_attention(shapes) + shapes.tokens * shapes.heads * FP32 + copied
    if _adds_bias(shapes, on_gloo):
        kept = _lean_attention(shapes) + shapes.tokens * shapes.heads * FP32
        return kept + (0 if shapes.element == FP32 else _exact_bias(shapes))
    if not shapes.writes_scores:
        # The projection, the output and its log-sum-exp.
        kept = _lean_attention(shapes) + shapes.tokens * shapes.heads * FP32
        if shapes.by_heads:  # the output of all tokens for some heads, and of some tokens for all
            kept += _attended(shapes)
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
    return _copied(shapes) + _attended(shapes) + scores + _before_head_norms(shapes)


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


def bias_bytes(shapes: LayerShapes) -> PartBytes:
    """Count the bias of a stack's scores that all its layers share: the bucket of each pair of
    positions, int64, kept until its gradient is added up; in the forward pass the bias itself."""
    bias = shapes.heads * shapes.pairs * shapes.element
    return PartBytes(shapes.pairs * INT64, bias, bias, bias, for_weights=0)


def _masked_bias(shapes: LayerShapes) -> int:
    """Count the bias of the scores put together with what is not attended to."""
    pairs = shapes.pairs if shapes.biased and shapes.causal else 0
    return shapes.heads * pairs * shapes.element


def _cross(shapes: LayerShapes, lean: bool = False) -> int:
    """Count what attention to an encoder's states keeps: the norm before it, queries, keys and
    values of these states, the output; and the states themselves, normalized, in the first layer
    that has it. `lean`: no scores, which are recomputed."""
    if not shapes.crosses:
        return 0
    stat = (1 if shapes.rms_norm else 2) * FP32
    kept = 2 * shapes.hidden_bytes + _tokens_here(shapes) * stat
    kept += shapes.hidden_bytes if shapes.hidden_dropout else 0
    if shapes.opens:
        kept += 2 * shapes.source_bytes + shapes.source_tokens * stat
        kept += shapes.source_bytes if shapes.hidden_dropout else 0
    if shapes.attention_dropout and not lean:
        kept += _cross_scores(shapes) * (FP32 + 2 * shapes.element)
    projections = _cross_projections(shapes)
    log_sum_exp = 0 if shapes.attention_dropout else shapes.tokens * shapes.heads * FP32
    return kept + projections * shapes.element + _attended(shapes) + log_sum_exp


def _cross_projections(shapes: LayerShapes) -> int:
    """Return the number (not bytes) of queries' features, and of those of the keys and values of all
    context ranks."""
    return shapes.tokens * shapes.q + shapes.source_tokens * shapes.context * shapes.kv


def _cross_scores(shapes: LayerShapes) -> int:
    """Return the number (not bytes) of scores of attention to an encoder's states."""
    return shapes.tokens * shapes.heads * shapes.source_length


def _cross_forward(shapes: LayerShapes) -> int:
    """Count what attention to an encoder's states holds beside what it keeps while it drops some of
    the probabilities."""
    if not shapes.attention_dropout:
        return 0
    # The scores in fp32, and the random numbers for the mask, in place of mask and product.
    scores = _cross_scores(shapes)
    numbers = scores * (FP32 + RANDOM_BYTES - shapes.element)
    return numbers + scores // shapes.micro_batch_size * INT64


def _cross_backward(shapes: LayerShapes) -> int:
    """Count the gradients of attention to an encoder's states."""
    projections = _cross_projections(shapes)
    scores = _cross_scores(shapes) * 2 * FP32 if shapes.attention_dropout else 0
    return projections * shapes.element + scores


def _lean_attention(shapes: LayerShapes) -> int:
    """Count the input and the output of attention alone."""
    return _projection(shapes) + _attended(shapes) + _before_head_norms(shapes)


def _before_head_norms(shapes: LayerShapes) -> int:
    """Count the input of the norms of queries and keys, and their statistics."""
    if not shapes.head_norms:
        return 0
    return _projection(shapes) + shapes.tokens * (shapes.heads + shapes.kv_heads) * FP32


def _attention_forward(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count what is alive at the peak of attention's forward pass."""
    size = _projection(shapes)
    scores = _scores(shapes)
    if _widens(shapes, on_gloo):
        # The scores, and with their bias; which is put together with what is not attended to.
        size += _widened(shapes) + 2 * scores * FP32 + _masked_bias(shapes)
    elif shapes.attention_dropout:
        # The scores and their softmax in fp32, its rounded copy, and the random numbers for the
        # mask with their indices, which all samples share.
        bytes_each = 2 * FP32 + shapes.element + RANDOM_BYTES
        indices = scores // shapes.micro_batch_size * INT64
        size += _copied(shapes) + scores * bytes_each + indices + _masked_bias(shapes)
    elif shapes.attention_softcap:
        # In fp32: the scores, capped, masked, and their softmax.
        size += _copied(shapes) + scores * 4 * FP32
    if shapes.logits_every:
        # Some of the logits, and as many masked ones; their queries; and for all heads a mask.
        at_once = min(LOGITS_AT_ONCE, scores)
        queries = at_once // shapes.seq_length * shapes.head_size * shapes.element
        mask = at_once // (shapes.micro_batch_size * shapes.heads)
        size = max(size, _projection(shapes) + at_once * 2 * shapes.element + queries + mask)
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


def _attention_backward(shapes: LayerShapes, on_gloo: bool) -> int:
    """Count what is alive at the peak of attention's backward pass: what it has kept, and its
    gradients."""
    size = _attention(shapes, on_gloo) + _projection(shapes)
    if not shapes.writes_scores:
        size += _repeated(shapes, on_gloo)
    if shapes.latents:  # gradients of the queries, and of what keys and values are made from
        size += _latents(shapes) + _projection(shapes)
    if _fuses_bias(shapes, on_gloo):
        size += _scores(shapes) * shapes.element  # the gradient of the bias, of each sample
    elif _adds_bias(shapes, on_gloo):
        size += _exact_bias(shapes)  # the gradient of the bias
    elif shapes.writes_scores:
        size += _scores(shapes) * 2 * FP32  # gradients of the probabilities and of the scores
    if shapes.by_heads:
        # Then the gradient as it is, in the order of ranks, as messages and as they arrive.
        size = max(size + _attended(shapes), 4 * _projection(shapes))
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


def _mask_numbers(shapes: Shapes) -> int:
    """Count the random numbers for a dropout mask of hidden states, and their indices, which all
    samples share."""
    numbers = shapes.tokens * shapes.norm_hidden
    indices = numbers // shapes.micro_batch_size * INT64
    return numbers * RANDOM_BYTES + indices


def _whole(shapes: Shapes) -> int:
    """Count T·D: the output of a row-parallel product, and the input of a column-parallel one."""
    return shapes.tokens * shapes.hidden * shapes.element


def _gathered(shapes: Shapes) -> int:
    """Count a gathered T·D: the ranks' slices in a row, and a copy in order if they are of several
    sequences."""
    return _whole(shapes) if shapes.micro_batch_size == 1 else 2 * _whole(shapes)


def _scatter(shapes: Shapes, on_gloo: bool) -> int:
    """Count the buffers of a reduce-scatter beside its input T·D: the own slice of the sum; all
    slices in a row, if they are of several sequences. gloo also receives the slices of the other
    ranks."""
    if not shapes.sequence:
        return 0
    whole = _whole(shapes)
    own = whole // shapes.tensor
    received = whole - own if on_gloo else 0
    return own + received + (whole if shapes.micro_batch_size > 1 else 0)


def _product_features(shapes: LayerShapes) -> list[int]:
    """Return the features per token of both operands of each product's weight-gradient GEMM."""
    features = []
    for matrix in shapes.matrices:
        # Sequence parallelism keeps a slice of the input, and gathers it again.
        gathers = matrix.gathers and shapes.sequence
        of_input = shapes.norm_hidden if gathers else matrix.columns
        # Of a stack, a token has the operands of those that it is multiplied with.
        features.append(ceil(matrix.count * matrix.used * (of_input + matrix.rows)))
    return features


def embedding_bytes(shapes: Shapes, largest_gradient: int) -> PartBytes:
    """Return the bytes of the embedding. `largest_gradient`: bytes of the largest gradient among
    its tables.

    Its output is the first layer's input and counted there."""
    gradient = _gathered(shapes) if shapes.sequence else _whole(shapes)
    # Either while the gradient is gathered, or when it is added into the table's own.
    backward = max(gradient, _whole(shapes) + largest_gradient)
    return PartBytes(0, 0, backward, backward, for_weights=0)


def rope_bytes(shapes: Shapes) -> int:
    """Return the bytes of the cos/sin tables, fp32, which all layers and all samples share."""
    return shapes.tokens // shapes.micro_batch_size * shapes.rope_size * FP32


def head_bytes(shapes: Shapes, by_autograd: bool, on_gloo: bool = False) -> PartBytes:
    """Return the bytes of the last norm, the head and the loss.

    The loss keeps the logits and their log-sum-exp, and overwrites the logits with their gradient.
    `by_autograd`: autograd makes the head's weight gradient, in a tensor beside them. `on_gloo` is
    that of `layer_bytes`."""
    if shapes.loss_chunk is not None:
        return _chunked_head_bytes(shapes, shapes.loss_chunk, by_autograd, on_gloo)
    # A soft cap keeps what its tanh gave beside the logits, and in both passes makes a third of
    # that size.
    logits = shapes.head_tokens * shapes.vocab * shapes.element
    capped = logits if shapes.logit_softcap else 0
    log_sum_exp = shapes.head_tokens * FP32
    # With predictors the head takes their outputs beside that of the last norm.
    times = 1 + shapes.predictors
    kept = _norm(shapes) + shapes.predictors * shapes.hidden_bytes + logits + capped + log_sum_exp
    gathered = times * _whole(shapes) if shapes.sequence else 0
    of_input = times * (_whole(shapes) + _scatter(shapes, on_gloo))
    of_weight = shapes.vocab * shapes.hidden * shapes.element if by_autograd else 0
    return PartBytes(
        kept=kept,
        forward=kept + max(gathered, capped),
        backward=kept + max(gathered + of_input + of_weight, capped),
        backward_input=kept + max(of_input, capped),
        for_weights=shapes.head_tokens * (shapes.norm_hidden + shapes.vocab) * shapes.element,
    )


def _chunked_head_bytes(shapes: Shapes, chunk: int, by_autograd: bool, on_gloo: bool) -> PartBytes:
    """Count a head whose logits exist for `chunk` tokens at a time.

    It keeps its input, whole also under sequence parallelism, and never defers its weight
    gradient."""
    norm = _norm(shapes) - shapes.hidden_bytes  # its output is the head's input, counted whole
    times = 1 + shapes.predictors
    kept = norm + times * (_whole(shapes) + shapes.tokens * FP32)
    logits = chunk * shapes.vocab * shapes.element
    # Autograd's gradient is accumulated in fp32 over the chunks, beside each chunk's share in the
    # weights' precision.
    of_weight = shapes.vocab * shapes.hidden * (FP32 + shapes.element) if by_autograd else 0
    backward = kept + times * _whole(shapes) + max(logits + of_weight, _scatter(shapes, on_gloo))
    return PartBytes(kept, kept + logits, backward, backward, for_weights=0)
