"""What a model computes, as data: how each layer mixes tokens, what its feed-forward part is, and
the few facts of the whole model that planning needs.

A family's config gives it (`ModelConfig.describe`) beside the table of weights, whose rows have the
sizes of single weights. The plan, the planner, the count of FLOPs and the KV cache read it, so that
none of them guesses what a layer computes from the names of its weights. Nothing here imports
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class MixerSpec:
    """Base of the kinds of mixers, the part of a layer in which tokens see each other.

    Attention is one. A family with another kind (latent, recurrent, …) subclasses this. FLOPs are
    counted by what it says, while the planner refuses kinds that it does not know."""

    def num_elements(self, hidden_size: int) -> int:
        """Return the elements of its matrices, biases and norms not counted."""
        raise NotImplementedError

    def seen(self, length: int) -> int:
        """Return to how many positions of a sequence of `length` a token attends at most."""
        return length

    def products(self, positions: int) -> int:
        """Return how often a token's features are multiplied with those of `positions` tokens, over
        all heads."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(MixerSpec):
    """Describes softmax attention with (grouped) heads."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    """Features of a head's queries and keys."""
    value_size: int
    """Features of a head's values."""
    window: int | None = None
    """Size of the sliding window in tokens, the attending token included: as many before it and,
    where attention is not causal, as many behind it. None: no window."""
    softcap: float | None = None
    """Cap of the scores. None: no cap."""
    scale: float | None = None
    """Factor of the scores. None: 1/√head_size."""
    causal: bool = True
    dropout: float = 0.0
    """Dropout of the probabilities."""
    bias: bool = False
    """True if a bias that is trained is added to the scores."""
    rope_size: int = 0
    """Features of a head's queries and keys that are rotated by their positions."""
    head_norms: bool = False
    """True if queries and keys are normalized."""

    @property
    def writes_scores(self) -> bool:
        """Return whether attention materializes its scores (eager attention), which fused kernels
        avoid."""
        return self.softcap is not None or self.bias or self.dropout > 0

    def num_elements(self, hidden_size: int) -> int:
        """Return the elements of the projections of queries, keys, values and output."""
        queries_keys = (self.num_heads + self.num_kv_heads) * self.head_size
        values_out = (self.num_heads + self.num_kv_heads) * self.value_size
        return (queries_keys + values_out) * hidden_size

    def seen(self, length: int) -> int:
        if self.window is None:
            return length
        # As many tokens on each side, and the token itself once.
        return min(self.window if self.causal else 2 * self.window - 1, length)

    def products(self, positions: int) -> int:
        """Return the multiplications of queries with keys, and of probabilities with values."""
        # q · k costs head_size a position and head, probabilities · v value_size. The softmax is
        # not counted.
        return positions * self.num_heads * (self.head_size + self.value_size)


@dataclass(frozen=True, kw_only=True)
class LatentSpec(AttentionSpec):
    """Describes latent attention, in which each head has keys and values made from one latent of a
    token. All heads share the features of keys that are rotated."""

    kv_rank: int
    """Features of that latent."""
    q_rank: int | None
    """Features of the latent that queries are made from. None: they are made from the hidden
    states."""

    def num_elements(self, hidden_size: int) -> int:
        """Return the elements of what makes latents, of what makes heads from them, and of the
        output."""
        heads, plain = self.num_heads, self.head_size - self.rope_size
        queries = heads * self.head_size
        # kv_a makes the latent, and the keys' part with positions that all heads share; kv makes
        # each head's other keys, and its values, of the latent.
        q = hidden_size * queries if self.q_rank is None else self.q_rank * (hidden_size + queries)
        kv = hidden_size * (self.kv_rank + self.rope_size) + self.kv_rank * heads * (
            plain + self.value_size
        )
        return q + kv + heads * self.value_size * hidden_size


@dataclass(frozen=True, kw_only=True)
class CrossSpec(AttentionSpec):
    """Describes attention within a decoder's sequence, and then as much to an encoder's states."""

    def num_elements(self, hidden_size: int) -> int:
        # q, k, v and out of each; keys and values of the second are made of the encoder's states.
        return 2 * super().num_elements(hidden_size)

    def source_elements(self, hidden_size: int) -> int:
        """Return the elements that an encoder's states are multiplied with: those that make keys
        and values of them."""
        return self.num_kv_heads * (self.head_size + self.value_size) * hidden_size


@dataclass(frozen=True, kw_only=True)
class FeedForwardSpec:
    """Describes a dense feed-forward part: up (and gate), activation, down."""

    inner: int
    """Features between the matrices."""
    gated: bool
    """True if the activation of a gate multiplies the up projection (SwiGLU, GeGLU)."""
    activation: str
    """Kind of the activation, such as silu, gelu or relu2."""
    dropout: float = 0.0
    """Dropout of what the last matrix takes."""

    @property
    def active_inner(self) -> int:
        """Return the inner features that a token has, over all experts it visits."""
        return self.inner

    def num_elements(self, hidden_size: int) -> int:
        """Return the elements of its matrices, biases not counted."""
        return self._of(self.inner, hidden_size)

    def _of(self, inner: int, hidden_size: int) -> int:
        # gate, up and down; or up and down.
        return (3 if self.gated else 2) * inner * hidden_size


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec(FeedForwardSpec):
    """Describes a mixture of experts of `inner` features each, with a router of a row for each
    expert."""

    num_experts: int
    experts_per_token: int
    """How many of them a token visits."""
    shared_inner: int = 0
    """Inner features of the experts that every token visits besides."""
    shared_gate: bool = False
    """True if a gate, of one output feature, weighs what these return."""

    @property
    def active_inner(self) -> int:
        return self.experts_per_token * self.inner + self.shared_inner

    def num_elements(self, hidden_size: int) -> int:
        """Return the elements of all experts and of the router."""
        inner = self.num_experts * self.inner + self.shared_inner
        # The router has a row for each expert, the gate of the shared ones is one row more.
        return self._of(inner, hidden_size) + (self.num_experts + self.shared_gate) * hidden_size


@dataclass(frozen=True)
class LayerSpec:
    """Describes one layer."""

    mixer: MixerSpec
    feed_forward: FeedForwardSpec
    num_norms: int = 2
    """Norms of hidden states."""
    joins: bool = False
    """True if a matrix [D, 2·D] first joins hidden states with the embedding of a later token, as in
    a predictor of further tokens."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Describes a whole model."""

    layers: tuple[LayerSpec, ...]
    norm: Literal["rms", "layer"]
    """Kind of all norms of hidden states."""
    predictors: tuple[LayerSpec, ...] = ()
    """Layers of multi-token prediction behind the last one, each of which predicts one token more,
    by the same head."""
    num_streams: int = 1
    """Tensors of hidden states [B,T,D] that a layer hands to the next: 2 where an encoder's go on
    beside a decoder's. Predictions are made from the last."""
    source_layers: int = 0
    """Layers, the first ones, that see an encoder's own sequence, which the batch has beside that
    of the others."""
    shared_tables: tuple[tuple[int, int], ...] = ()
    """Shapes of weights that layers of several stages use, which go along before the hidden states.
    Tensor ranks share the last dimension."""
    hidden_dropout: float = 0.0
    """Dropout of what attention and the feed-forward part add to the residual stream."""
    logit_softcap: float | None = None
    """Cap of the logits. None: no cap."""
    turning_points: range = range(0)
    """Sequence lengths after which one token more has all positions encoded differently (LongRoPE,
    dynamic NTK)."""

    @property
    def attentions(self) -> tuple[AttentionSpec, ...]:
        """Return the mixers that are attention, in the order of the layers."""
        return tuple(layer.mixer for layer in self.layers if isinstance(layer.mixer, AttentionSpec))
