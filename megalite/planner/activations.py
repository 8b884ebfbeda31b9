"""Bytes that the modules keep for the backward pass, counted from models/, kernels/ and parallel/ tensor by tensor, and
what passes hold on top while they run. Counted with megalite's own kernels: plain torch keeps more.

Letters: T tokens of a micro-batch on this rank, D hidden features, d those a token has here (a share under sequence
parallelism), Q and K features of its queries and of its keys, I of its MLP, V rows of the vocabulary, all but D per
tensor rank. The MLP's first product gives F = 2I features where it has a gate, otherwise I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalite.planner.shapes import Shapes

Recompute = Literal["none", "selective", "full"]

FP32 = 4

INT64 = 8

RANDOM_BYTES = 3 * INT64
"""Held per number while counter_random makes dropout masks."""


@dataclass(frozen=True)
class PartBytes:
    """Of a part of the model and one micro-batch. Those of a pass are at its fullest moment, what is kept included."""

    kept: int
    """From its forward to its backward pass."""
    forward: int
    backward: int
    backward_input: int
    """Of a zero-bubble schedule's pass, which goes on to keep both sides of each product."""
    for_weights: int
    """Both sides of each product, from that pass to the weights'."""


def layer_bytes(shapes: Shapes, recompute: Recompute, on_gloo: bool = False) -> PartBytes:
    """`on_gloo`: collectives are those of the CPU."""
    hidden, norms, attention = shapes.hidden_bytes, _norms(shapes), _attention(shapes)
    inner = shapes.tokens * shapes.inner * shapes.element
    first = 2 * inner if shapes.gated else inner
    everything = norms + attention + first + inner
    if recompute == "selective" and shapes.attention_dropout:
        attention = _projection(shapes) + _attended(shapes)
    kept = {"none": everything, "selective": norms + attention + first, "full": hidden}[recompute]

    # Till its end the layer holds what attention added to the residual stream. There the second product gives its
    # output, which is summed over the tensor ranks and then added.
    at_end = {"none": kept, "selective": kept + inner, "full": 3 * hidden + first + inner}[recompute]
    at_end += _added(shapes) + max(_whole(shapes) + _scatter(shapes, on_gloo), _added(shapes) + hidden)
    attending = norms // 2 + _attention_forward(shapes)

    # The residual stream's gradient is there all the time.
    of_mlp = hidden + norms + attention
    # Gradients of the second product's input, which is free by then, and of the first one's output.
    activation = of_mlp + first + inner + first
    of_attention = hidden + norms // 2 + _attention_backward(shapes, recompute)
    moments = [activation, of_attention]
    if shapes.sequence:
        moments.append(of_mlp + first + inner + max(_gathered(shapes), _whole(shapes) + inner))
        # The first product's input, gathered, and the gradient of it.
        moments.append(of_mlp + first + _whole(shapes) + _whole(shapes) + _scatter(shapes, on_gloo))
    if recompute != "none":
        # As far as the second product, which gives its output again.
        again = everything if recompute == "full" else kept + inner
        moments.append(hidden + again + _whole(shapes))
    if recompute == "full":
        moments.append(hidden + attending)

    products = [shapes.tokens * shapes.element * features for features in _product_features(shapes)]
    return PartBytes(
        kept=kept,
        forward=max(at_end, attending),
        backward=max(moments),
        backward_input=max(*moments, activation + inner, of_attention + sum(products[2:])),
        for_weights=sum(products),
    )


def _norms(shapes: Shapes) -> int:
    """Both norms: input (of the second: the sum of the residual stream and what is added to it), output (the product
    behind it keeps it) and fp32 statistics."""
    statistics = (1 if shapes.rms_norm else 2) * FP32
    return 2 * (2 * shapes.hidden_bytes + _cut_tokens(shapes) * statistics)


def _cut_tokens(shapes: Shapes) -> int:
    return shapes.tokens // shapes.tensor if shapes.sequence else shapes.tokens


def _projection(shapes: Shapes) -> int:
    """Queries, keys and values, in which positions are turned in place."""
    return shapes.tokens * (shapes.q + 2 * shapes.kv) * shapes.element


def _attended(shapes: Shapes) -> int:
    """What attention gives."""
    return shapes.tokens * shapes.q * shapes.element


def _attention(shapes: Shapes) -> int:
    """The fused projection, the output and its log-sum-exp."""
    if shapes.attention_dropout:
        # Written out: probabilities in fp32, the mask of the dropout and what it left, and which tokens attend to
        # which; queries, keys and values are copied for their products, and the projection is free.
        scores = _scores(shapes) * (FP32 + 2 * shapes.element) + shapes.seq_length**2
        size = 3 * _attended(shapes) + scores + _attended(shapes)
    else:
        size = _projection(shapes) + _attended(shapes) + shapes.tokens * shapes.heads * FP32
    if shapes.head_norms:
        # What they were computed from, and statistics.
        size += _projection(shapes) + shapes.tokens * (shapes.heads + shapes.kv_heads) * FP32
    if shapes.hidden_dropout:
        size += 2 * shapes.hidden_bytes  # masks behind attention and MLP
    return size


def _scores(shapes: Shapes) -> int:
    """How many are written out."""
    return shapes.tokens * shapes.heads * shapes.seq_length


def _attention_forward(shapes: Shapes) -> int:
    """At the fullest moment of attention itself, which is fuller than the layer's end where it makes masks, or where
    keys and values travel a ring."""
    size = _projection(shapes)
    if shapes.attention_dropout:
        # The scores, their softmax, that in the activations' precision; the mask's random numbers and their indices,
        # which all samples share.
        scores = _scores(shapes) * (2 * FP32 + shapes.element + RANDOM_BYTES)
        size += 3 * _attended(shapes) + scores + _scores(shapes) * INT64 // shapes.micro_batch_size
    if shapes.context > 1:
        # Own and arriving keys and values, a block's output, and all blocks' and a block's in fp32.
        per_token = 4 * shapes.kv * shapes.element + shapes.q * (shapes.element + 2 * FP32)
        size += shapes.tokens * per_token
    return size


def _attention_backward(shapes: Shapes, recompute: Recompute) -> int:
    """What is kept of it, the output's gradient and the projection's."""
    if shapes.attention_dropout:
        # The gradient of the probabilities, of the scores, and of the scores before those that do not count.
        beside = _scores(shapes) * 2 * FP32
        again = _attention_forward(shapes) if recompute == "selective" else 0
        return _attended(shapes) + max(_attention(shapes) + beside, again)
    size = _attention(shapes) + _attended(shapes) + _projection(shapes)
    if shapes.context > 1:
        # Own and arriving keys and values; in fp32, the queries' gradient and that of keys and values twice, own and
        # arriving.
        size += shapes.tokens * (4 * shapes.kv * shapes.element + (shapes.q + 4 * shapes.kv) * FP32)
    return size


def _whole(shapes: Shapes) -> int:
    """T·D: what a row-parallel product gives, and what a column-parallel one takes."""
    return shapes.tokens * shapes.hidden * shapes.element


def _gathered(shapes: Shapes) -> int:
    """Slices of T·D gathered one behind another, and put together where they are of several sequences."""
    return _whole(shapes) if shapes.micro_batch_size == 1 else 2 * _whole(shapes)


def _added(shapes: Shapes) -> int:
    """What is added to the residual stream, T·d: under sequence parallelism a slice of the T·D that were summed, all of
    which it keeps alive."""
    return _whole(shapes) if shapes.sequence else shapes.hidden_bytes


def _scatter(shapes: Shapes, on_gloo: bool) -> int:
    """Beside a tensor of T·D while it is summed over the tensor ranks, each of which keeps a slice: its slices one
    behind another; gloo takes the other ranks' slices beside them."""
    if not shapes.sequence:
        return 0
    received = _whole(shapes) * (shapes.tensor - 1) // shapes.tensor if on_gloo else 0
    return _whole(shapes) + received


def _product_features(shapes: Shapes) -> list[int]:
    """Features per token that each product of a layer needs for its weight's gradient: its input's (a slice, where
    sequence parallelism gathers it again) and its output's."""
    return [
        (shapes.norm_hidden if matrix.column_parallel and shapes.sequence else matrix.columns) + matrix.rows
        for matrix in shapes.matrices
    ]


def embedding_bytes(shapes: Shapes, largest_gradient: int) -> PartBytes:
    """Its output is the first layer's input, and counted there. Only where a sequence is cut is that a slice of more
    (`_added`). The gradients of what it looked up, of which the largest has so many bytes, are as large as itself."""
    kept = _added(shapes) - shapes.hidden_bytes
    gradient = _gathered(shapes) if shapes.sequence else _whole(shapes)
    backward = kept + max(gradient, _whole(shapes) + largest_gradient)
    return PartBytes(kept, kept, backward, backward, 0)


def rope_bytes(shapes: Shapes) -> int:
    """Cosine and sine of a pair of numbers of a head, in fp32, which all samples share."""
    return shapes.tokens // shapes.micro_batch_size * shapes.head_size * FP32 if shapes.rope else 0


def head_bytes(shapes: Shapes, by_autograd: bool, on_gloo: bool = False) -> PartBytes:
    """Of the last norm, the head and the loss, which keeps the logits and their log-sum-exp and in its backward pass
    overwrites the logits with their gradient. `by_autograd`: the head's own gradient is made beside them."""
    logits = shapes.tokens * shapes.vocab * shapes.element
    kept = _norms(shapes) // 2 + logits + shapes.tokens * FP32
    gathered = _whole(shapes) if shapes.sequence else 0
    gradients = _whole(shapes) + _scatter(shapes, on_gloo)
    of_weight = shapes.vocab * shapes.hidden * shapes.element if by_autograd else 0
    return PartBytes(
        kept=kept,
        forward=kept + gathered,
        backward=kept + gathered + gradients + of_weight,
        backward_input=kept + gradients,
        for_weights=shapes.tokens * (shapes.norm_hidden + shapes.vocab) * shapes.element,
    )
