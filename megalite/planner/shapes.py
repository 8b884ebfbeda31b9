"""What one tensor rank holds and computes, read from the table of weights: a new family needs no line here as long as
it is made of the parts below, and is refused by name where it is not."""

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
"""Matrices that are looked up in instead of multiplied with."""


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer as one tensor rank holds it."""

    rows: int
    """Output features."""
    columns: int
    """Input features."""
    column_parallel: bool
    """Cut by rows: its input is gathered before it. Otherwise its output is summed over the tensor ranks."""


@dataclass(frozen=True)
class Shapes:
    """Sizes on one tensor rank; those of whole sequences are given as such."""

    tokens: int
    """Of a micro-batch, on one context rank."""
    micro_batch_size: int
    seq_length: int
    """Of a whole sequence, over all context ranks."""
    hidden: int
    norm_hidden: int
    """Hidden features a token has to itself here: hidden, or where sequence parallelism cuts the tokens, its share."""
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab: int
    loss_chunk: int | None
    """Tokens whose logits exist at a time; None: all, and their product is not computed again."""
    gated: bool
    gelu_gate: bool
    """GeGLU: its gate is a pass of its own (Gemma)."""
    rope: bool
    rms_norm: bool
    norms: int
    """Of hidden states in a layer."""
    head_norms: bool
    """Queries and keys are normalised (Qwen3)."""
    window: bool
    """Some layer attends to a part of the sequence: by a mask."""
    attention_softcap: bool
    logit_softcap: bool
    hidden_dropout: bool
    attention_dropout: bool
    matrices: tuple[Matrix, ...]
    """Of one layer, in the order of the forward pass; those of adapters, which are small, are left out."""
    frozen: bool
    """No matrix is trained itself, but adapters of those of the layers are."""
    element: int
    """Bytes of an activation."""
    tensor: int
    sequence: bool
    context: int

    @property
    def q(self) -> int:
        return self.heads * self.head_size

    @property
    def writes_scores(self) -> bool:
        return self.attention_dropout or self.attention_softcap

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_size

    @property
    def hidden_bytes(self) -> int:
        """Of a micro-batch's hidden states, as they lie between two layers."""
        return self.tokens * self.norm_hidden * self.element


def shapes_of(config: Config, plan: Plan, weights: Sequence[Weight]) -> Shapes:
    """Raises ConfigError for a model with weights the planner cannot place."""
    model: Any = config.model
    layer = {weight.name.split(".", 2)[2]: weight for weight in weights if weight.place == 0}
    for weight in layer.values():
        if len(weight.shape) > 2:
            raise ConfigError(f"the planner does not know what {weight.name} of shape {list(weight.shape)} computes")
    matrices = tuple(
        Matrix(rows, columns, column_parallel=weight.shard == "column")
        for weight in layer.values()
        if len(weight.shape) == 2 and not (config.lora and not weight.frozen)
        for rows, columns in [weight.local_shape(plan.tensor)]
    )
    heads, head_size = model.num_attention_heads, model.head_size
    kv_heads = getattr(model, "kv_heads", heads)
    train, length = config.train, config.data.seq_length
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
        window=any((model.window(number) or length) < length for number in range(model.num_layers)),
        attention_softcap=getattr(model, "attention_softcap", None) is not None,
        logit_softcap=getattr(model, "logit_softcap", None) is not None,
        hidden_dropout=bool(getattr(model, "hidden_dropout", 0.0)),
        attention_dropout=bool(getattr(model, "attention_dropout", 0.0)),
        matrices=matrices,
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
    """Elements that one tensor rank holds of a stage's weights."""

    before: int
    """What stands before the layers: embeddings."""
    layers: tuple[int, ...]
    after: int
    """What stands behind them: the last norm and the head. A tied head counts on both ends of a pipeline."""
    largest: int
    """The largest single weight."""
    largest_looked_up: int
    """The largest of those that are looked up in, where the stage has them."""

    unfrozen: StageSizes | None = None
    """Where some weights are frozen, those of the others."""

    @property
    def total(self) -> int:
        return self.before + sum(self.layers) + self.after

    @property
    def trained(self) -> StageSizes:
        return self.unfrozen or self


class LocalSizes:
    """Elements of every weight on one of `tensor` ranks, summed by the place of the weight."""

    def __init__(self, weights: Sequence[Weight], tensor: int):
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
        self.unfrozen = LocalSizes(unfrozen, tensor) if len(unfrozen) < len(weights) else None

    def of(self, stage: StageSpan) -> StageSizes:
        first, last, both = (self.total.get(place, 0) for place in ENDS)
        places = [*range(stage.start, stage.stop), *(place for place in ENDS if stage.holds(place))]
        return StageSizes(
            before=first + both if stage.first else 0,
            layers=tuple(self.total.get(number, 0) for number in range(stage.start, stage.stop)),
            # A tied weight is held once where the stage is both ends.
            after=last + (0 if stage.first else both) if stage.last else 0,
            largest=max((self.largest.get(place, 0) for place in places), default=0),
            largest_looked_up=self.largest_looked_up if stage.first else 0,
            unfrozen=self.unfrozen.of(stage) if self.unfrozen else None,
        )


ENDS: tuple[Place, ...] = ("first", "last", "both")


class Together:
    """All weights of one place, frozen ones or not, as one row for `make_plan`: a search makes thousands of plans, and
    what a plan asks of the table are sums."""

    def __init__(self, place: Place, frozen: bool, weights: Sequence[Weight]):
        self.place, self.frozen, self.name = place, frozen, f"{place}{' frozen' * frozen}"
        self.numel = sum(weight.numel for weight in weights)
        self._weights = weights
        self._local: dict[int, tuple[int]] = {}

    def local_shape(self, tensor: int) -> tuple[int, ...]:
        """Raises ValueError where one of them cannot be cut."""
        if tensor not in self._local:
            self._local[tensor] = (sum(prod(weight.local_shape(tensor)) for weight in self._weights),)
        return self._local[tensor]


def together(weights: Sequence[Weight]) -> list[Together]:
    places: dict[tuple[Place, bool], list[Weight]] = {}
    for weight in weights:
        places.setdefault((weight.place, weight.frozen), []).append(weight)
    return [Together(*kind, rows) for kind, rows in places.items()]
