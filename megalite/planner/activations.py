"""Bytes that the modules keep for the backward pass, counted from models/, kernels/ and parallel/ tensor by tensor, and
what passes hold on top while they run. Counted with megalite's own kernels: plain torch keeps more.

Letters: T tokens of a micro-batch on this rank, D hidden features, d those a token has here (a share under sequence
parallelism), Q and K features of its queries and of its keys, I of its MLP, V rows of the vocabulary, all but D per
tensor rank. The MLP's first product gives 2·I features where it has a gate, otherwise I.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megalite.planner.shapes import Shapes

Recompute = Literal["none", "selective", "full"]

FP32, INT64 = 4, 8

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
    layer = _Layer(shapes, recompute, on_gloo)
    of_mlp, of_attention = max(layer.mlp_backward()), max(layer.attention_backward())
    products = [shapes.tokens * shapes.element * features for features in _product_features(shapes)]
    return PartBytes(
        kept=layer.kept,
        forward=max(layer.forward()),
        backward=max(of_mlp, of_attention),
        # The second product's input is not free, nor anything of the MLP's products by the time of attention's.
        backward_input=max(of_mlp + layer.inner, of_attention + sum(products[2:])),
        for_weights=sum(products),
    )


class _Layer:
    """What stands in a layer, and what there is at each moment of its passes that may be the fullest."""

    def __init__(self, shapes: Shapes, recompute: Recompute, on_gloo: bool):
        self.shapes, self.recompute, self.on_gloo = shapes, recompute, on_gloo
        self.hidden = shapes.hidden_bytes
        self.norm = _norm(shapes)
        self.masks = self.hidden if shapes.hidden_dropout else 0
        """Of the dropout behind attention, and as much behind the MLP."""
        lean_attention = recompute == "selective" and shapes.writes_scores
        self.attention = (_lean_attention if lean_attention else _attention)(shapes)
        self.inner = shapes.tokens * shapes.inner * shapes.element
        """The input of the MLP's second product."""
        self.first = 2 * self.inner if shapes.gated else self.inner
        """The output of its first."""
        norms = 2 * self.norm + _more_norms(shapes)
        gate = self.inner if shapes.gelu_gate else 0  # gelu(gate), by itself
        self.plain = norms + self.attention + self.first + gate + self.inner + 2 * self.masks
        """All that a layer keeps for its backward pass where nothing is computed again, or has when it was."""
        self.kept = {"none": self.plain, "selective": self.plain - gate - self.inner, "full": self.hidden}[recompute]

    def forward(self) -> list[int]:
        hidden, added = self.hidden, _added(self.shapes)
        # Of what `full` drops, the sum with what attention added, and its norm, stay till the layer's end; what
        # attention added stays in any case.
        at_end = {"none": self.plain, "selective": self.plain, "full": 3 * hidden + self.first + self.inner}
        moments = [
            self.norm + _attention_forward(self.shapes),
            # The second product's output, summed over the tensor ranks; then added.
            at_end[self.recompute] + added + max(_whole(self.shapes) + self._scatter(), added + hidden),
        ]
        if self.masks:
            without_mask = 3 * hidden if self.recompute == "full" else self.kept - self.masks
            moments.append(without_mask + 2 * added + _mask_numbers(self.shapes))
        return moments

    def mlp_backward(self) -> list[int]:
        """Beside it, the residual stream's gradient."""
        before = self.hidden + self.plain - self.masks
        # Gradients of the second product's input, which is free by then, and of the first one's output.
        moments = [before + self.first]
        if self.shapes.sequence:
            moments.append(before + max(_gathered(self.shapes), _whole(self.shapes) + self.inner))
            # The first product's input, gathered, and the gradient of it; its output is free by then.
            moments.append(before - self.inner + 2 * _whole(self.shapes) + self._scatter())
        if self.recompute != "none":
            # As far as the second product, which gives its output again.
            moments.append(before + self.masks + _whole(self.shapes))
        if self.recompute == "full" and self.masks:
            moments.append(before + 2 * _added(self.shapes) + _mask_numbers(self.shapes))
        return moments

    def attention_backward(self) -> list[int]:
        """All of the MLP is free."""
        beside = self.hidden + self.norm
        moments = [beside + _attended(self.shapes) + _attention_backward(self.shapes)]
        if self.recompute == "full" or (self.recompute == "selective" and self.shapes.writes_scores):
            moments.append(beside + _attended(self.shapes) + _attention_forward(self.shapes))
        return moments

    def _scatter(self) -> int:
        return _scatter(self.shapes, self.on_gloo)


def _norm(shapes: Shapes) -> int:
    """Input (of the second norm: the sum of the residual stream and what is added to it), output (the product behind it
    keeps it) and fp32 statistics."""
    tokens = shapes.tokens // shapes.tensor if shapes.sequence else shapes.tokens
    return 2 * shapes.hidden_bytes + tokens * (1 if shapes.rms_norm else 2) * FP32


def _more_norms(shapes: Shapes) -> int:
    """Beyond two, which stand behind attention and MLP: inputs and statistics."""
    tokens = shapes.tokens // shapes.tensor if shapes.sequence else shapes.tokens
    return (shapes.norms - 2) * (shapes.hidden_bytes + tokens * FP32)


def _projection(shapes: Shapes) -> int:
    """Queries, keys and values as one tensor, in which positions are turned in place."""
    return shapes.tokens * (shapes.q + 2 * shapes.kv) * shapes.element


def _attended(shapes: Shapes) -> int:
    """What attention gives."""
    return shapes.tokens * shapes.q * shapes.element


def _scores(shapes: Shapes) -> int:
    """How many, where they are written out."""
    return shapes.tokens * shapes.heads * shapes.seq_length


def _attention(shapes: Shapes) -> int:
    """The projection, the output and its log-sum-exp."""
    if not shapes.writes_scores:
        mask = shapes.seq_length**2 * (shapes.element + 1) if shapes.window else 0
        return _lean_attention(shapes) + shapes.tokens * shapes.heads * FP32 + mask
    # Written out: probabilities in fp32, and who attends to whom; queries, keys and values are copied for their
    # products, and the projection is free.
    scores = _scores(shapes) * (FP32 + shapes.element) + shapes.seq_length**2
    if shapes.attention_dropout:
        scores += _scores(shapes) * shapes.element  # its mask beside what it left
    if shapes.attention_softcap:
        scores += _scores(shapes) * FP32  # what the tanh gave
    return 3 * _attended(shapes) + scores + _attended(shapes) + _before_head_norms(shapes)


def _lean_attention(shapes: Shapes) -> int:
    """What it begins with and what it gives."""
    return _projection(shapes) + _attended(shapes) + _before_head_norms(shapes)


def _before_head_norms(shapes: Shapes) -> int:
    """What they were computed from, and statistics."""
    if not shapes.head_norms:
        return 0
    return _projection(shapes) + shapes.tokens * (shapes.heads + shapes.kv_heads) * FP32


def _attention_forward(shapes: Shapes) -> int:
    """At the fullest moment of attention itself."""
    size = _projection(shapes)
    if shapes.attention_dropout:
        # Scores and their softmax in fp32, and that in the activations' precision, for the mask of which random numbers
        # are being made.
        scores = _scores(shapes) * (2 * FP32 + shapes.element + RANDOM_BYTES)
        size += 3 * _attended(shapes) + scores + _scores(shapes) // shapes.micro_batch_size * INT64
    elif shapes.attention_softcap:
        # Scores, capped, masked, and their softmax.
        size += 3 * _attended(shapes) + _scores(shapes) * 4 * FP32
    if shapes.context > 1:
        # Keys and values twice, own and arriving; a block's output, in fp32 as well, and that of all blocks.
        size += shapes.tokens * (4 * shapes.kv * shapes.element + shapes.q * (shapes.element + 2 * FP32))
    return size


def _attention_backward(shapes: Shapes) -> int:
    """What attention has kept, and the gradients it makes, of which the projection's is what it gives."""
    size = _attention(shapes) + _projection(shapes)
    if shapes.writes_scores:
        # Of the probabilities, and of the scores.
        size += _scores(shapes) * 2 * FP32
    if shapes.context > 1:
        # Keys and values twice, own and arriving. Gradients in fp32: queries', keys' and values' twice. The last
        # block's, of half of the queries or half of the keys; and the projection's in pieces before it is whole.
        fp32 = (shapes.q + 4 * shapes.kv) * FP32
        block = max(shapes.q // 2 + 2 * shapes.kv, shapes.q + shapes.kv) * shapes.element
        size += shapes.tokens * (4 * shapes.kv * shapes.element + fp32 + block) + _projection(shapes)
    return size


def _mask_numbers(shapes: Shapes) -> int:
    """What makes a dropout's mask for hidden states: random numbers, and their indices, which all samples share."""
    numbers = shapes.tokens * shapes.norm_hidden
    return numbers * RANDOM_BYTES + numbers // shapes.micro_batch_size * INT64


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
    """Beside a T·D while it is summed over the tensor ranks, of which each keeps a slice: its slices one behind
    another. gloo receives the other ranks' slices beside them."""
    if not shapes.sequence:
        return 0
    return _whole(shapes) + (_whole(shapes) * (shapes.tensor - 1) // shapes.tensor if on_gloo else 0)


def _product_features(shapes: Shapes) -> list[int]:
    """Features per token that each product of a layer needs for its weight's gradient: its input's (a slice, where
    sequence parallelism gathers it again) and its output's."""
    return [
        (shapes.norm_hidden if matrix.column_parallel and shapes.sequence else matrix.columns) + matrix.rows
        for matrix in shapes.matrices
    ]


def embedding_bytes(shapes: Shapes, largest_gradient: int) -> PartBytes:
    """Its output is the first layer's input, and counted there but for what it keeps alive (`_added`). Of the gradients
    of what it looked up, the largest has so many bytes."""
    kept = _added(shapes) - shapes.hidden_bytes
    gradient = _gathered(shapes) if shapes.sequence else _whole(shapes)
    backward = kept + max(gradient, _whole(shapes) + largest_gradient)
    return PartBytes(kept, kept, backward, backward, for_weights=0)


def rope_bytes(shapes: Shapes) -> int:
    """Cosine and sine for each pair of a head's numbers, in fp32, which all layers and all samples share."""
    return shapes.tokens // shapes.micro_batch_size * shapes.head_size * FP32 if shapes.rope else 0


def head_bytes(shapes: Shapes, by_autograd: bool, on_gloo: bool = False) -> PartBytes:
    """Of the last norm, the head and the loss, which keeps the logits and their log-sum-exp and in its backward pass
    overwrites the logits with their gradient. `by_autograd`: the head's own gradient is made beside them."""
    if shapes.loss_chunk is not None:
        return _chunked_head_bytes(shapes, shapes.loss_chunk, by_autograd, on_gloo)
    # A soft cap keeps what its tanh gave beside the logits, and in both passes makes a third of that size.
    logits = shapes.tokens * shapes.vocab * shapes.element
    capped = logits if shapes.logit_softcap else 0
    kept = _norm(shapes) + logits + capped + shapes.tokens * FP32
    gathered = _whole(shapes) if shapes.sequence else 0
    of_input = _whole(shapes) + _scatter(shapes, on_gloo)
    of_weight = shapes.vocab * shapes.hidden * shapes.element if by_autograd else 0
    return PartBytes(
        kept=kept,
        forward=kept + max(gathered, capped),
        backward=kept + max(gathered + of_input + of_weight, capped),
        backward_input=kept + max(of_input, capped),
        for_weights=shapes.tokens * (shapes.norm_hidden + shapes.vocab) * shapes.element,
    )


def _chunked_head_bytes(shapes: Shapes, chunk: int, by_autograd: bool, on_gloo: bool) -> PartBytes:
    """Logits of a chunk of tokens at a time. What is kept is the head's input, whole also where a sequence is cut; and
    weight gradients are never put off."""
    kept = _norm(shapes) - shapes.hidden_bytes + _whole(shapes) + shapes.tokens * FP32
    logits = chunk * shapes.vocab * shapes.element
    # Autograd's is summed in fp32 over the chunks, and each of those in the activations' precision beside it.
    of_weight = shapes.vocab * shapes.hidden * (FP32 + shapes.element) if by_autograd else 0
    backward = kept + _whole(shapes) + max(logits + of_weight, _scatter(shapes, on_gloo))
    return PartBytes(kept, kept + logits, backward, backward, for_weights=0)
