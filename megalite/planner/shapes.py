"""Reads from the weight table what one tensor rank holds and computes. A new family needs no line here as long as it is
made of the parts below; otherwise it is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.models.weights import Weight
from megalite.plan import Place, Plan, StageSpan

LOOKED_UP = ("embedding.weight", "positions.weight")
"""Weights that are looked up in instead of multiplied with."""


@dataclass(frozen=True)
class Matrix:
    """Describes a matrix of a layer as one tensor rank holds it."""

    rows: int
    """Output features."""
    columns: int
    """Input features."""
    column_parallel: bool
    """True if split by output features: its input is gathered. Otherwise (row-parallel) its output is reduced."""


@dataclass(frozen=True)
class Shapes:
    """Holds the sizes of a model on one tensor rank, unless a field says otherwise."""

    tokens: int
    """Tokens of a micro-batch on one context rank."""
    micro_batch_size: int
    seq_length: int
    """Length of a whole sequence, over all context ranks."""
    hidden: int
    norm_hidden: int
    """Hidden features per token here: all of them, or under sequence parallelism this rank's share on average."""
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Features of the MLP."""
    vocab: int
    loss_chunk: int | None
    """Tokens whose logits exist at a time, and are computed again in the backward pass. None: all, computed once."""
    gated: bool
    gelu_gate: bool
    """True for GeGLU, whose gate is a kernel of its own (Gemma)."""
    rope: bool
    rms_norm: bool
    norms: int
    """Norms of hidden states in a layer."""
    head_norms: bool
    """True if queries and keys are normalized (Qwen3)."""
    window: bool
    """True if some layer attends to a part of the sequence, which takes a mask."""
    attention_softcap: bool
    logit_softcap: bool
    hidden_dropout: bool
    attention_dropout: bool
    matrices: tuple[Matrix, ...]
    """Matrices of one layer in the order of the forward pass. Those of adapters, which are small, are left out."""
    frozen: bool
    """True if only adapters of the layers' matrices are trained."""
    element: int
    """Bytes per element of an activation."""
    tensor: int
    sequence: bool
    context: int

    @property
    def q(self) -> int:
        """Features of the queries."""
        return self.heads * self.head_size

    @property
    def writes_scores(self) -> bool:
        """True if attention materializes its scores (eager attention)."""
        return self.attention_dropout or self.attention_softcap

    @property
    def kv(self) -> int:
        """Features of the keys, and of the values."""
        return self.kv_heads * self.head_size

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a micro-batch's hidden states between two layers."""
        return self.tokens * self.norm_hidden * self.element


def shapes_of(config: Config, plan: Plan, weights: Sequence[Weight]) -> Shapes:
    """Read the shapes of a model under `plan` from its table of `weights` and its `config`.

    Raises ConfigError for a model with weights the planner does not know."""
    model: Any = config.model
    # The weights of the first layer, without the prefix "layers.0.": all layers are alike.
    layer = {}
    for weight in weights:
        if weight.place == 0:
            layer[weight.name.split(".", 2)[2]] = weight
    for weight in layer.values():
        if len(weight.shape) > 2:  # an estimate that ignores what it does not know would be worse than none
            raise ConfigError(f"the planner does not know what {weight.name} of shape {list(weight.shape)} computes")
    matrices = []
    for weight in layer.values():
        is_adapter = config.lora and not weight.frozen
        if len(weight.shape) == 2 and not is_adapter:
            rows, columns = weight.local_shape(plan.tensor)
            matrices.append(Matrix(rows, columns, column_parallel=weight.shard == "column"))
    # Families differ in their settings: what one lacks, it does without.
    heads = model.num_attention_heads
    head_size = model.head_size
    kv_heads = getattr(model, "kv_heads", heads)
    train = config.train
    length = config.data.seq_length
    windows = [model.window(number) or length for number in range(model.num_layers)]
    tokens = plan.micro_batch_size * length // plan.context
    return Shapes(
        tokens=tokens,
        micro_batch_size=plan.micro_batch_size,
        seq_length=length,
        hidden=model.hidden_size,
        norm_hidden=model.hidden_size // plan.tensor if plan.sequence else model.hidden_size,
        heads=heads // plan.tensor,
        kv_heads=kv_heads // plan.tensor,
        head_size=head_size,
        inner=_inner(layer, plan.tensor),
        vocab=_vocab(weights).local_shape(plan.tensor)[0],
        loss_chunk=None if train.loss_chunk is None else min(train.loss_chunk, tokens),
        gated="mlp.gate_up.weight" in layer,
        gelu_gate=getattr(model, "GATE", None) == "gelu",
        rope=not any(weight.name == "positions.weight" for weight in weights),
        rms_norm="attention_norm.bias" not in layer,
        norms=sum(name.endswith("norm.weight") and "." not in name[:-7] for name in layer),
        head_norms=any("q_norm" in name for name in layer),
        window=any(window < length for window in windows),
        attention_softcap=getattr(model, "attention_softcap", None) is not None,
        logit_softcap=getattr(model, "logit_softcap", None) is not None,
        hidden_dropout=bool(getattr(model, "hidden_dropout", 0.0)),
        attention_dropout=bool(getattr(model, "attention_dropout", 0.0)),
        matrices=tuple(matrices),
        frozen=config.lora is not None,
        element=2 if train.precision == "bf16" else 4,
        tensor=plan.tensor,
        sequence=plan.sequence,
        context=plan.context,
    )


def _inner(layer: dict[str, Weight], tensor: int) -> int:
    if "mlp.down.weight" not in layer:
        raise ConfigError(f"the planner does not know a layer without mlp.down.weight; it has {', '.join(layer)}")
    return layer["mlp.down.weight"].local_shape(tensor)[1]


def _vocab(weights: Sequence[Weight]) -> Weight:
    return next(weight for weight in weights if weight.shard == "vocab")


@dataclass(frozen=True)
class StageSizes:
    """Holds the numbers of elements that one tensor rank has of a stage's weights."""

    before: int
    """Embeddings, before the layers."""
    layers: tuple[int, ...]
    after: int
    """Last norm and head, after the layers. A tied head counts on both ends of a pipeline."""
    largest: int
    """The largest single weight."""
    largest_looked_up: int
    """The largest embedding, or 0 if the stage has none."""

    unfrozen: StageSizes | None = None
    """The same for the trained weights only, if some are frozen."""

    @property
    def total(self) -> int:
        return self.before + sum(self.layers) + self.after

    @property
    def trained(self) -> StageSizes:
        """Sizes of the weights that are trained."""
        return self.unfrozen or self


class LocalSizes:
    """Adds up the elements of all weights on one tensor rank, by the place of the weight in the model."""

    def __init__(self, weights: Sequence[Weight], tensor: int):
        """Add up `weights` at a degree of `tensor` parallelism. Raises ValueError where one cannot be split."""
        self.total: dict[Place, int] = {}
        self.largest: dict[Place, int] = {}
        self.largest_looked_up = 0
        for weight in weights:
            size = prod(weight.local_shape(tensor))
            if weight.name in LOOKED_UP:
                self.largest_looked_up = max(self.largest_looked_up, size)
            self.total[weight.place] = self.total.get(weight.place, 0) + size
            self.largest[weight.place] = max(self.largest.get(weight.place, 0), size)
        unfrozen = [weight for weight in weights if not weight.frozen]
        self.unfrozen: LocalSizes | None = None
        if len(unfrozen) < len(weights):
            self.unfrozen = LocalSizes(unfrozen, tensor)

    def of(self, stage: StageSpan) -> StageSizes:
        """Return the sizes of a pipeline stage."""
        first, last, both = (self.total.get(place, 0) for place in ENDS)
        ends = [place for place in ENDS if stage.holds(place)]
        layers = range(stage.start, stage.stop)
        places = [*layers, *ends]
        return StageSizes(
            before=first + both if stage.first else 0,
            layers=tuple(self.total.get(number, 0) for number in layers),
            # A tied weight exists once if the stage is the first and the last.
            after=last + (0 if stage.first else both) if stage.last else 0,
            largest=max((self.largest.get(place, 0) for place in places), default=0),
            largest_looked_up=self.largest_looked_up if stage.first else 0,
            unfrozen=self.unfrozen.of(stage) if self.unfrozen else None,
        )


ENDS: tuple[Place, ...] = ("first", "last", "both")
"""Places outside the layers; "both" is a tied weight."""


class Together:
    """Stands for all weights of one place as a single row of the table.

    A search makes thousands of plans, and a plan asks only for sums of weights."""

    def __init__(self, place: Place, frozen: bool, weights: Sequence[Weight]):
        """Sum up `weights`, all of this `place` and all `frozen` or not."""
        self.place = place
        self.frozen = frozen
        self.name = f"{place} frozen" if frozen else f"{place}"
        self.numel = sum(weight.numel for weight in weights)
        self._weights = weights
        self._local: dict[int, tuple[int]] = {}

    def local_shape(self, tensor: int) -> tuple[int, ...]:
        """Return the number of elements on one of `tensor` ranks, as a shape of one dimension.

        Raises ValueError where a weight cannot be split."""
        if tensor not in self._local:
            elements = sum(prod(weight.local_shape(tensor)) for weight in self._weights)
            self._local[tensor] = (elements,)
        return self._local[tensor]


def together(weights: Sequence[Weight]) -> list[Together]:
    """Group weights by place and by whether they are frozen."""
    places: dict[tuple[Place, bool], list[Weight]] = {}
    for weight in weights:
        places.setdefault((weight.place, weight.frozen), []).append(weight)
    return [Together(*kind, rows) for kind, rows in places.items()]
