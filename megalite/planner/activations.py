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

from megalite.kernels.quantised import AT_ONCE, BYTES_BESIDE
from megalite.parallel.expert import goes_to_all
from megalite.planner.attention_activations import (
    attended,
    attention_backward,
    attention_forward,
    attention_kept,
    attention_kept_lean,
    latents,
    masked_bias,
)
from megalite.planner.cross_activations import cross_backward, cross_forward, cross_kept
from megalite.planner.shapes import FP32, INT64, RANDOM_BYTES, LayerShapes, Shapes

Recompute = Literal["none", "selective", "full"]


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
            self.attention = attention_kept_lean(shapes)
        else:
            self.attention = attention_kept(shapes, on_gloo)
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
        self.cross = cross_kept(shapes, recompute == "selective")
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
            + latents(shapes)
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
            self.norm + attention_forward(self.shapes, self.on_gloo),
            at_end + hidden + second,
        ]
        if self.shapes.crosses:
            kept = 0 if self.recompute == "full" else self.attention
            moments.append(self.norm + kept + self.cross + cross_forward(self.shapes))
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
        beside = self.gradient + self.norm + attended(self.shapes)
        moments = [beside + attention_backward(self.shapes, self.on_gloo)]
        if self.shapes.crosses:
            beside += self.shapes.source_bytes  # the gradient of the encoder's states
            moments = [each + self.shapes.source_bytes for each in moments]
            moments.append(beside + self.attention + self.cross + cross_backward(self.shapes))
        if self.recompute == "full" or (
            self.recompute == "selective" and self.shapes.writes_scores
        ):
            moments.append(beside + attention_forward(self.shapes, self.on_gloo))
            if self.shapes.crosses:
                masked = masked_bias(self.shapes) if self.recompute == "full" else 0
                again = self.attention + masked + cross_kept(self.shapes)
                moments.append(beside + again + cross_forward(self.shapes))
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
    gathered = _routed_whole(shapes) if shapes.routed_tokens > shapes.tokens_here else 0
    probabilities = shapes.tokens_here * shapes.num_experts * FP32
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


def _norm(shapes: Shapes) -> int:
    """Count a norm: its input, its output (an operand of the next product) and fp32 statistics.

    The input of the second norm is the residual sum after attention."""
    statistics = 1 if shapes.rms_norm else 2  # rstd; LayerNorm: mean as well
    return 2 * shapes.hidden_bytes + shapes.tokens_here * statistics * FP32


def _more_norms(shapes: LayerShapes) -> int:
    """Count the norms after attention and MLP, which some families have beside the usual two: input
    and statistics. Those of attention to an encoder are counted with it."""
    more = 0 if shapes.crosses else shapes.norms - 2
    return more * (shapes.hidden_bytes + shapes.tokens_here * FP32)


def bias_bytes(shapes: LayerShapes) -> PartBytes:
    """Count the bias of a stack's scores that all its layers share: the bucket of each pair of
    positions, int64, kept until its gradient is added up; in the forward pass the bias itself."""
    bias = shapes.heads * shapes.pairs * shapes.element
    return PartBytes(shapes.pairs * INT64, bias, bias, bias, for_weights=0)


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
