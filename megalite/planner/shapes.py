"""Say what one tensor rank computes: the matrices of its layers, and what each layer does from the
model's architecture. Layers need not be alike; equal ones are described once. `sizes.py` adds up
the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from math import ceil, prod
from typing import TypeVar

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.kernels.quantised import Kind
from megalite.models import model_config, weight_table
from megalite.models.architecture import (
    AttentionSpec,
    CrossSpec,
    ExpertsSpec,
    LatentSpec,
    LayerSpec,
)
from megalite.models.fp8 import fp8_weights
from megalite.models.weights import Weight
from megalite.plan import Cut, Place, Plan
from megalite.planner.sizes import LocalSizes

T = TypeVar("T")

FP32, INT64 = 4, 8
"""Bytes of a number."""

RANDOM_BYTES = 3 * INT64
"""Bytes held per number while counter_random makes dropout masks."""


@dataclass(frozen=True)
class Matrix:
    """Describes a matrix of a layer as one tensor rank holds it, or a stack of equal ones
    (experts)."""

    rows: int
    """Output features."""
    columns: int
    """Input features."""
    gathers: bool
    """True at the way into a tensor-parallel region: its input is gathered. Column-parallel
    matrices are there."""
    reduces: bool
    """True at the way out of it: its output is reduced. Row-parallel matrices are there; replicated
    ones are at neither way, and take the tokens that this rank has."""
    replicated: bool = False
    count: int = 1
    """Number of matrices in the stack."""
    used: float = 1.0
    """Share of them that a token of this rank is multiplied with, on average; more where tokens of
    others come."""
    sent: float = 1.0
    """Tokens that the collectives around it carry, for each of the layer's: those of an encoder, where
    it takes their states."""
    fp8: bool = False
    """True if `train.fp8` rounds the operands of its products."""

    @property
    def elements(self) -> int:
        return self.count * self.rows * self.columns

    @property
    def is_linear(self) -> bool:
        """Return whether adapters could adapt it: no expert and no router."""
        return self.count == 1 and not self.replicated

    def tokens_of_each(self, tokens: int) -> int:
        """Return how many of `tokens` each matrix of the stack has to multiply, on average."""
        return ceil(tokens * self.used)


@dataclass(frozen=True)
class Shapes:
    """Holds the sizes of a model on one tensor rank, unless a field says otherwise."""

    tokens: int
    """Tokens of a micro-batch on one context rank; of a layer, those of its own stack."""
    source_tokens: int
    """Those that an encoder reads beside the decoder's, on one context rank; 0 where there are
    none."""
    head_tokens: int
    """Predictions of the head: of some of these tokens, or of all, and of the further ones that
    predictors predict of each. Where their share changes during the run, the most of it."""
    mean_head_tokens: int
    """The same, as a mean over the run."""
    predictors: int
    """Predictors of further tokens: layers behind the last one, on the last stage."""
    micro_batch_size: int
    seq_length: int
    """Length of a whole sequence, over all context ranks."""
    source_length: int
    """Length of an encoder's whole sequence beside the decoder's; 0 where there is none."""
    hidden: int
    norm_hidden: int
    """Hidden features per token here: all of them, or under sequence parallelism this rank's share
    on average."""
    vocab: int
    loss_chunk: int | None
    """Tokens whose logits exist at a time, and are computed again in the backward pass. None: all,
    computed once."""
    rope_size: int
    """Features of a head that have cos/sin tables; 0 where no layer rotates any."""
    rms_norm: bool
    logit_softcap: bool
    hidden_dropout: bool
    frozen: bool
    """True if only adapters of the layers' matrices are trained."""
    quantised: Kind | None
    """The few bits that these matrices are held in, to be dequantised for each product."""
    dora: bool
    """True if what these matrices return is scaled by magnitudes that are trained (DoRA)."""
    logits_every: int
    """Steps between those that find the largest attention logits; 0: none does."""
    element: int
    """Bytes per element of an activation."""
    tensor: int
    sequence: bool
    context: int
    by_heads: bool
    """True if context ranks attend with some heads each (Ulysses), not in a ring."""
    document_mask: bool
    uneven: bool
    """True if packed documents leave context ranks with unequal attention: a ring that cuts rows
    and not documents."""

    @property
    def pairs(self) -> int:
        """Number of pairs of a query on this rank with a key of its whole sequence, of one sample."""
        return self.tokens // self.micro_batch_size * self.seq_length

    @property
    def tokens_here(self) -> int:
        """Tokens of the residual stream on this rank: a share under sequence parallelism."""
        return self.tokens // self.tensor if self.sequence else self.tokens

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a micro-batch's hidden states between two layers."""
        return self.tokens * self.norm_hidden * self.element

    @property
    def source_bytes(self) -> int:
        """Bytes of the hidden states of an encoder beside those of the decoder."""
        return self.source_tokens * self.norm_hidden * self.element

    @property
    def handed_bytes(self) -> int:
        """Bytes of what a stage of a pipeline hands to the next."""
        return self.hidden_bytes + self.source_bytes


@dataclass(frozen=True)
class LayerShapes(Shapes):
    """Holds the sizes of one layer on one tensor rank, beside those of the model."""

    heads: int
    kv_heads: int
    head_size: int
    """Features of a head's queries and keys."""
    value_size: int
    """Features of a head's values, filled up to those of its keys where they come from latents."""
    latent_value: int
    """Features of a head's values that come from latents, as they are; 0 where they do not."""
    latents: int
    """Features of a token's latents."""
    shared_keys: int
    """Features of a token's keys that all heads share, beside its latents."""
    inner: int
    """Features that a token has within the MLP, over all experts it visits."""
    routed_tokens: int
    """Tokens that this rank sends to experts. With expert-tensor ranks that have other tokens, also
    theirs."""
    expert: int
    """Ranks that share the layer's experts."""
    expert_tensor: int
    """Ranks that share every expert, where they are other ones than the tensor ranks; otherwise
    1."""
    num_experts: int
    """Experts of the layer; 0 where it has none."""
    visited: int
    """Experts that a token visits."""
    gated: bool
    gelu_gate: bool
    """True for GeGLU, whose gate is a kernel of its own (Gemma)."""
    rope: bool
    norms: int
    """Norms of hidden states in the layer."""
    joins: bool
    """True if it first joins hidden states with embeddings of later tokens (predictors)."""
    head_norms: bool
    """True if queries and keys are normalized (Qwen3)."""
    window: bool
    """True if it attends to a part of the sequence, which takes a mask."""
    causal: bool
    attention_softcap: bool
    attention_dropout: bool
    writes_scores: bool
    """True if attention materializes its scores (eager attention)."""
    matrices: tuple[Matrix, ...]
    """Matrices in the order of the forward pass. Those of adapters, which are small, are left
    out."""
    num_mixer_matrices: int
    """How many of them, the first ones, are attention's."""
    is_source: bool
    """True for a layer of an encoder beside a decoder."""
    crosses: bool
    """True if it attends to an encoder's states as well."""
    opens: bool
    """True if it normalizes these for all layers behind it."""
    biased: bool
    """True if a bias that is trained is added to the scores."""
    relu: bool
    """True if the MLP's activation is remembered by its output alone."""
    inner_dropout: bool

    @property
    def gathers(self) -> bool:
        """True if each context rank gathers the keys and values of all (`GatheredAttention`)."""
        return self.context > 1 and self.biased

    @property
    def key_tokens(self) -> int:
        """Tokens whose keys and values attention takes at once."""
        return self.tokens * (self.context if self.gathers else 1)

    @property
    def q(self) -> int:
        """Features of the queries."""
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        """Features of the keys and of the values, together."""
        return self.kv_heads * (self.head_size + self.value_size)

    @property
    def attended(self) -> int:
        """Features of attention's output."""
        return self.heads * self.value_size


@dataclass(frozen=True)
class LayerKind:
    """Describes the layers of a model that are equal, by their spec and their rows."""

    spec: LayerSpec
    attention: AttentionSpec
    matrices: tuple[Weight, ...]
    """Rows of the matrices of its first layer, in the order of the forward pass."""
    num_mixer_matrices: int
    fp8: tuple[bool, ...]
    """Which of the matrices `train.fp8` takes products of in fp8."""


class ModelTable:
    """Holds the rows of a model, its layers grouped by kind, and its sizes at each degree of tensor
    parallelism.

    A search makes thousands of plans; what does not depend on the plan is found here, once."""

    def __init__(self, config: Config):
        """Make the table of the `config`'s model, adapters included.

        Raises ConfigError for a layer that the planner does not know, or that its family describes
        wrongly."""
        self.config = config
        self.weights = weight_table(config.model, config.lora, config.train.fp8)
        self.vocab = next(weight for weight in self.weights if weight.shard == "vocab")
        """Row of the embedding."""
        self.kinds = self._kinds()
        """Kind of every layer, by its number, and then of predictors of further tokens; the same
        object for equal layers."""
        self.products = self._products()
        """Products of an optimizer that looks at whole matrices, for every layer and both ends of
        the model, each with how often it is made."""
        self._sizes: dict[tuple[int, Cut], LocalSizes] = {}

    @cached_property
    def frozen(self) -> ModelTable | None:
        """The table of the model that the objective holds beside this one; None where it holds
        none. Raises ConfigError where the planner does not know it."""
        folder = self.config.objective.frozen_model(self.config)
        if folder is None:
            return None
        model = model_config({"hf": folder}).without_predictors()
        return ModelTable(self.config.model_copy(update={"model": model, "lora": None}))

    def _products(self) -> dict[Place, Counter[tuple[int, int, int]]]:
        found: dict[Place, Counter[tuple[int, int, int]]] = {}
        for weight in self.weights:
            if not weight.frozen and (products := self.config.optimizer.products(weight)):
                found.setdefault(weight.place, Counter()).update(products)
        return found

    def sizes(self, plan: Plan) -> LocalSizes:
        """Return the sizes under a plan's degrees of tensor and expert parallelism. Raises
        ValueError where a weight cannot be split."""
        # Sizes depend on nothing else of a plan: a search's thousands of plans have few such pairs.
        cuts = plan.tensor, plan.experts
        if cuts not in self._sizes:
            self._sizes[cuts] = LocalSizes(self.weights, plan, self.config.optimizer)
        return self._sizes[cuts]

    def _kinds(self) -> tuple[LayerKind, ...]:
        """Return the kind of every layer."""
        architecture = self.config.model.architecture
        specs = (*architecture.layers, *architecture.predictors)
        rows: list[list[Weight]] = [[] for _ in specs]
        for weight in self.weights:
            # The adapters of LoRA are all that is not frozen beside them.
            is_adapter = self.config.lora is not None and not weight.frozen
            if (
                isinstance(weight.place, int)
                and weight.row_shape
                and weight.used
                and not is_adapter
            ):
                rows[weight.place].append(weight)
        found: dict[tuple[object, ...], LayerKind] = {}
        kinds = []
        fp8, num_layers = self.config.train.fp8, self.config.model.num_layers
        rounded = {w.name for w in fp8_weights(self.weights, fp8, num_layers)} if fp8 else set()
        for number, (spec, matrices) in enumerate(zip(specs, rows, strict=True)):
            # What decides the cost of a layer: names and place of its weights differ in every
            # layer.
            in_fp8 = tuple(w.name in rounded for w in matrices)
            sizes = ((w.shape, w.stack, w.shard, w.parts, w.unit, w.used) for w in matrices)
            key = (spec, in_fp8, *sizes)
            if key not in found:
                found[key] = replace(self._kind(number, spec, tuple(matrices)), fp8=in_fp8)
            kinds.append(found[key])
        return tuple(kinds)

    def _kind(self, number: int, spec: LayerSpec, matrices: tuple[Weight, ...]) -> LayerKind:
        """Return the kind of a layer with this `number`, after comparing its `spec` with the rows
        of its `matrices`."""
        model = self.config.model
        if not isinstance(spec.mixer, AttentionSpec):
            raise ConfigError(
                f"the planner does not know what layer {number} of model.family = {model.family!r} computes: its mixer "
                f"is {type(spec.mixer).__name__}, and the planner knows attention"
            )
        # Some figures come from the spec and others from the rows: a family whose two descriptions
        # differ would be planned wrongly without a word.
        described = [
            part.num_elements(model.hidden_size) for part in (spec.mixer, spec.feed_forward)
        ]
        described[0] += spec.joins * 2 * model.hidden_size**2
        # Rows are in the order of the forward pass: the mixer's matrices are the first that have
        # its size.
        sums = [
            sum(weight.numel for weight in matrices[:count]) for count in range(len(matrices) + 1)
        ]
        if sums[-1] != sum(described) or described[0] not in sums:
            raise ConfigError(
                f"model.family = {model.family!r} describes layer {number} as matrices of {described[0]:,} elements of "
                f"its mixer, then {described[1]:,} of its feed-forward part; its rows have "
                f"{', '.join(f'{weight.name} {weight.numel:,}' for weight in matrices)}"
            )
        none = (False,) * len(matrices)
        return LayerKind(spec, spec.mixer, matrices, sums.index(described[0]), none)


def _matrices(kind: LayerKind, plan: Plan, routed: float, of_source: float) -> tuple[Matrix, ...]:
    """Return the matrices of a layer on one rank. It sends a share `routed` of its tokens to
    experts; an encoder's states have `of_source` times as many tokens."""
    experts = [weight for weight in kind.matrices if weight.shard == "expert"]
    mixer, found = kind.attention, []
    # In the order of the forward pass: attention within the sequence comes first.
    half = kind.num_mixer_matrices // 2 if isinstance(mixer, CrossSpec) else len(kind.matrices)
    for number, weight in enumerate(kind.matrices):
        makes_keys = (
            isinstance(mixer, CrossSpec)
            and half <= number < kind.num_mixer_matrices
            and weight.numel == mixer.source_elements(weight.shape[-1])
        )
        shape = weight.local_shape(*plan.cut_of(weight))
        folded = weight.is_expert and plan.folds_experts
        found.append(
            Matrix(
                # Behind the dimensions of the stack, [experts, rows, columns]; the rest is
                # flattened.
                rows=shape[weight.stack],
                columns=prod(shape[weight.stack + 1 :]),
                # Whole experts on a rank: tokens enter before the first matrix of theirs, and leave
                # behind the last. Experts that are folded over other ranks have collectives of
                # their own (`Costs.dispatch`).
                gathers=not folded and (weight.shard == "column" or weight in experts[:1]),
                reduces=not folded and (weight.shard == "row" or weight in experts[-1:]),
                replicated=weight.shard is None,
                count=prod(shape[: weight.stack]),
                # `used` is k / num_experts, of the tokens of one rank. A folded expert gets those
                # of all `expert` ranks, and each of these sends the share `routed` of its own.
                used=weight.used * plan.experts.expert * routed
                if folded
                else weight.used * (of_source if makes_keys else 1.0),
                sent=of_source if makes_keys else 1.0,
                fp8=kind.fp8[number],
            )
        )
    return tuple(found)


def shapes_of(
    config: Config, plan: Plan, table: ModelTable
) -> tuple[Shapes, tuple[LayerShapes, ...]]:
    """Return the shapes of a model under `plan`, and those of each of its layers; equal layers
    share an object.

    Raises ConfigError for a model the planner does not know."""
    architecture, train = config.model.architecture, config.train
    _, source, length = config.lengths
    tokens = plan.micro_batch_size * length // plan.context
    hidden, num_predicted = config.model.hidden_size, 1 + len(architecture.predictors)
    model = Shapes(
        tokens=tokens,
        source_tokens=plan.micro_batch_size * source // plan.context,
        head_tokens=max(ceil(tokens * config.objective.most_predicted() * num_predicted), 1),
        mean_head_tokens=max(ceil(tokens * config.objective.predicted() * num_predicted), 1),
        predictors=len(architecture.predictors),
        micro_batch_size=plan.micro_batch_size,
        seq_length=length,
        source_length=source,
        hidden=hidden,
        norm_hidden=hidden // plan.tensor if plan.sequence else hidden,
        vocab=table.vocab.local_shape(plan.tensor)[0],
        loss_chunk=None if train.loss_chunk is None else min(train.loss_chunk, tokens),
        rope_size=max((mixer.rope_size for mixer in architecture.attentions), default=0),
        rms_norm=architecture.norm == "rms",
        logit_softcap=architecture.logit_softcap is not None,
        hidden_dropout=architecture.hidden_dropout > 0,
        frozen=config.lora is not None,
        quantised=config.lora.quantize_base if config.lora else None,
        dora=config.lora is not None and config.lora.dora,
        logits_every=1 if config.optimizer.qk_clip else config.observe.layers_every,
        element=2 if train.precision == "bf16" else 4,
        tensor=plan.tensor,
        sequence=plan.sequence,
        context=plan.context,
        by_heads=plan.context > 1 and plan.context_method == "ulysses",
        document_mask=config.data.document_mask,
        uneven=_is_uneven(config, plan),
    )
    if not architecture.source_layers:
        return model, tuple(each(table.kinds, lambda kind: _layer_shapes(model, plan, kind)))
    of_source = replace(model, tokens=model.source_tokens, seq_length=source)
    split, kinds = architecture.source_layers, table.kinds
    encoder = each(kinds[:split], lambda kind: _layer_shapes(of_source, plan, kind, is_source=True))
    return model, (*encoder, *each(kinds[split:], lambda kind: _layer_shapes(model, plan, kind)))


def _is_uneven(config: Config, plan: Plan) -> bool:
    is_ring = plan.context > 1 and plan.context_method == "ring"
    return is_ring and config.data.document_mask and plan.context_balance == "sequence"


def _layer_shapes(
    model: Shapes, plan: Plan, kind: LayerKind, is_source: bool = False
) -> LayerShapes:
    mixer, feed_forward = kind.attention, kind.spec.feed_forward
    routed, expert_tensor = model.tokens, 1
    # The tokens that a rank has (its slice, under sequence parallelism), of all expert-tensor
    # ranks: each of them computes its part of an expert for the tokens of all.
    if plan.folds_experts and (plan.sequence or plan.experts.tensor != plan.tensor):
        expert_tensor = plan.experts.tensor
        routed = model.tokens // (plan.tensor if plan.sequence else 1) * expert_tensor
    heads, kv_heads = mixer.num_heads, mixer.num_kv_heads
    latent = mixer if isinstance(mixer, LatentSpec) else None
    return LayerShapes(
        **vars(model),
        heads=heads // model.tensor,
        kv_heads=kv_heads // model.tensor,
        head_size=mixer.head_size,
        # Flash attention needs keys and values of one width: the values of latent attention are
        # padded.
        value_size=max(mixer.value_size, mixer.head_size) if latent else mixer.value_size,
        latent_value=latent.value_size if latent else 0,
        latents=latent.kv_rank + (latent.q_rank or 0) if latent else 0,
        shared_keys=latent.rope_size if latent else 0,
        inner=feed_forward.active_inner // model.tensor,
        routed_tokens=routed,
        expert=plan.experts.expert,
        expert_tensor=expert_tensor,
        num_experts=feed_forward.num_experts if isinstance(feed_forward, ExpertsSpec) else 0,
        visited=feed_forward.experts_per_token if isinstance(feed_forward, ExpertsSpec) else 0,
        gated=feed_forward.gated,
        gelu_gate=feed_forward.gated and feed_forward.activation == "gelu",
        rope=mixer.rope_size > 0,
        norms=kind.spec.num_norms,
        joins=kind.spec.joins,
        head_norms=mixer.head_norms,
        window=mixer.seen(model.seq_length) < model.seq_length,
        causal=mixer.causal,
        attention_softcap=mixer.softcap is not None,
        attention_dropout=mixer.dropout > 0,
        writes_scores=mixer.writes_scores,
        matrices=_matrices(kind, plan, routed / model.tokens, model.source_tokens / model.tokens),
        num_mixer_matrices=kind.num_mixer_matrices,
        is_source=is_source,
        crosses=isinstance(mixer, CrossSpec),
        opens=isinstance(mixer, CrossSpec) and kind.spec.num_norms > 3,
        biased=mixer.bias,
        relu=feed_forward.activation == "relu",
        inner_dropout=feed_forward.dropout > 0,
    )


K = TypeVar("K")


def each(layers: Sequence[K], function: Callable[[K], T]) -> list[T]:
    """Return what `function` makes of each layer. It is called once for all layers that are the
    same object."""
    # By identity: `shapes_of` gives equal layers as one object.
    found: dict[int, T] = {}
    for layer in layers:
        if id(layer) not in found:
            found[id(layer)] = function(layer)
    return [found[id(layer)] for layer in layers]


def runs(parts: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Yield the parts that are different objects, each with how many times it follows itself."""
    for _, equal in groupby(parts, key=id):
        same = list(equal)
        yield len(same), same[0]
