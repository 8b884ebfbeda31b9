"""A layout: how weights are cut, which stage has what, and all that follows from a config as one
object, with its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal, NamedTuple, Protocol, TypeVar

from megalite.config import Config, OptimizerConfig, ParallelConfig

Place = int | Literal["first", "last", "both"]
"""Where a weight is used: in a layer (its number), before the first one, after the last one, or at
both ends (a tied embedding, or one that predictors of further tokens look up)."""


class Cut(NamedTuple):
    """Over how many ranks weights are cut."""

    tensor: int
    """Ranks that share every matrix."""
    expert: int = 1
    """Ranks that each hold some of the experts; 1 for weights that are not of experts."""

    @property
    def holders(self) -> int:
        """Return how many ranks hold different parts of a weight."""
        return self.expert * self.tensor


class Sized(Protocol):
    """Describes the part of a weight's row that the plan needs."""

    @property
    def name(self) -> str: ...
    @property
    def numel(self) -> int: ...
    @property
    def multiplied(self) -> float: ...
    @property
    def place(self) -> Place: ...
    @property
    def frozen(self) -> bool: ...
    @property
    def is_expert(self) -> bool: ...
    @property
    def coded(self) -> bool: ...
    def local_shape(self, tensor: int, expert: int = 1) -> tuple[int, ...]: ...
    def quantised_bytes(self, tensor: int, expert: int = 1) -> int: ...
    def num_states(self, optimizer: OptimizerConfig) -> float: ...


W = TypeVar("W", bound=Sized)


@dataclass(frozen=True)
class StageSpan:
    """Holds the part of the model that one pipeline stage computes: layers [start, stop), and
    possibly an end of the model."""

    index: int
    start: int
    stop: int
    first: bool = True
    last: bool = True
    predictors: int = 0
    """Layers of multi-token prediction, on the last stage behind the last layer."""

    @property
    def layers(self) -> range:
        """Return the numbers of the layers that the stage has, predictors included."""
        return range(self.start, self.stop + self.predictors)

    def holds(self, place: Place) -> bool:
        """Return whether a weight used at `place` belongs to this stage. An embedding at both ends
        belongs to the first and the last."""
        if isinstance(place, int):
            return place in self.layers
        return (self.first and place in ("first", "both")) or (
            self.last and place in ("last", "both")
        )

    def weights(self, weights: Sequence[W]) -> list[W]:
        """Return the stage's rows of the table, in the order in which a forward pass uses them."""
        held = [weight for weight in weights if self.holds(weight.place)]
        # The last stage's copy of the embedding is met last.
        # sorted is stable: all others keep the order of the table.
        return held if self.first else sorted(held, key=lambda weight: weight.place == "both")


@dataclass(frozen=True)
class Plan:
    """Holds everything that follows from a config on `world_size` ranks."""

    world_size: int
    pipeline: int
    data: int
    context: int
    context_method: Literal["ring", "ulysses"]
    context_balance: Literal["sequence", "documents"]
    """What a context rank takes a front and a back piece of."""
    tensor: int
    experts: Cut
    """How experts are cut. Dense weights are cut over the tensor ranks."""
    sequence: bool
    """Whether sequence parallelism is on: requested, and more than one tensor rank."""
    tensor_overlap: bool
    """Whether its collectives overlap with products."""
    engine: Literal["native", "deepspeed"]
    zero_stage: int
    schedule: Literal["1f1b", "interleaved", "zero_bubble"]
    virtual: int
    stages: tuple[StageSpan, ...]
    """Stages in the order of the model. Stage s is on pipeline rank s % pipeline."""
    micro_batch_size: int
    """Sequences per forward pass: the config's, or fewer with `parallel.elastic` if only that
    fits."""
    micro_batches: int
    """Forward passes of each rank per optimizer step."""
    tokens_per_step: int
    steps: int
    """0 where `train.epochs` gives the length, which is known once the data is open."""
    tokens: int
    """Tokens of the whole run, or 0."""
    num_params: int
    params_per_rank: int
    """Parameters on the fullest rank."""
    num_trained: int
    """Number of trained parameters; the others are frozen."""
    memory_bytes: dict[str, int]
    """Bytes that the fullest rank holds through the whole step: weights, gradients, optimizer
    state. Activations come on top."""

    @property
    def replicas(self) -> int:
        """Return the number of ranks that hold the same part of the weights and share its gradient:
        data × context."""
        return self.data * self.context

    @property
    def folds_experts(self) -> bool:
        """Return whether experts are cut over other ranks than dense weights are."""
        return self.experts != Cut(self.tensor)

    def gathers(self, weight: Sized) -> bool:
        """Return whether replicas gather a weight behind an update, of which each updates a part."""
        return self.zero_stage > 0 and self.replicas_of(self.cut_of(weight)) > 1

    def cut_of(self, weight: Sized) -> Cut:
        """Return how a weight is cut."""
        return self.experts if weight.is_expert else Cut(self.tensor)

    def replicas_of(self, cut: Cut) -> int:
        """Return the number of ranks that hold the same part of what is cut so, and share its
        gradient."""
        return self.replicas * self.tensor // cut.holders

    def rank_at(self, pipeline: int, replica: int, holder: int, cut: Cut | None = None) -> int:
        """Return the global rank at these coordinates: `holder`, the tensor rank or of experts the
        holder under their `cut`, innermost, then `replica`, and `pipeline` outermost."""
        stage = self.replicas * self.tensor
        # The inverse of `Mesh.place_of`.
        return pipeline * stage + replica * (cut or Cut(self.tensor)).holders + holder

    def stages_of(self, pipeline_rank: int) -> tuple[StageSpan, ...]:
        """Return the stages of one pipeline rank."""
        # Every pipeline-th stage: stages go round the ranks (Megatron's virtual pipeline).
        return self.stages[pipeline_rank :: self.pipeline]

    def weights_of(self, pipeline_rank: int, weights: Sequence[W]) -> list[W]:
        """Return the rows of the table that a pipeline rank holds."""
        return [
            weight for stage in self.stages_of(pipeline_rank) for weight in stage.weights(weights)
        ]

    @property
    def _context(self) -> str:
        by_documents = self.context_balance == "documents"
        return self.context_method + (", balanced by documents" if by_documents else "")

    def describe(self) -> str:
        """Return the plan as lines of text for the console."""
        axes = {
            "pipeline": self.pipeline,
            "data": self.data,
            "context": self.context,
            "tensor": self.tensor,
        }
        product = " × ".join(
            f"{name} {size}" for name, size in axes.items() if size > 1 or name == "data"
        )
        tensor, expert = self.experts
        # Experts are spread over the same ranks once more, by other axes.
        folded = f"expert {expert} × expert tensor {tensor}, on {self.replicas_of(self.experts)} replicas"
        lines = [
            ("ranks", f"{self.world_size} = {product}"),
            *([("experts", folded)] if self.folds_experts else []),
            (
                "sequence parallel",
                f"{'on' if self.sequence else 'off'}{', overlapped' if self.tensor_overlap else ''}",
            ),
            *([("context parallel", self._context)] if self.context > 1 else []),
            ("engine", f"{self.engine}, ZeRO stage {self.zero_stage}"),
            (
                "parameters",
                f"{self.num_params:,}, of which {self.params_per_rank:,} on the fullest rank",
            ),
            *([("trained", f"{self.num_trained:,}")] if self.num_trained < self.num_params else []),
            ("micro-batches per step", f"{self.micro_batches} of {self.micro_batch_size}"),
            (
                "tokens",
                f"{self.tokens_per_step:,} a step, "
                + (
                    f"{self.tokens:,} in {self.steps:,} steps"
                    if self.steps
                    else "in train.epochs of the data"
                ),
            ),
            *(
                (f"memory: {name}", f"{size / 2**20:,.1f} MiB a rank")
                for name, size in self.memory_bytes.items()
            ),
        ]
        if self.pipeline > 1:
            counts = ", ".join(str(stage.stop - stage.start) for stage in self.stages)
            lines.insert(
                2,
                ("pipeline", f"{self.schedule}, layers of its {len(self.stages)} stages: {counts}"),
            )
        return "\n".join(f"{name:<24}{text}" for name, text in lines)


def smallest_world(config: Config) -> int:
    """Return the smallest number of ranks that the layout can run on."""
    parallel = config.parallel
    return parallel.pipeline * lcm(parallel.tensor * parallel.context, expert_cut(parallel).holders)


def context_balance(config: Config) -> Literal["sequence", "documents"]:
    """Return what each context rank takes a front and a back piece of, as
    `parallel.context_balance` describes it."""
    if (asked := config.parallel.context_balance) is not None:
        return asked
    # Ulysses' ranks have all tokens of some heads each, which is as much for all of them. Blocks of
    # fp8 tokens would be others than one process has.
    is_ring = config.parallel.context_method == "ring"
    # A bias of the scores is that of all rows of a batch, which are cut alike for it.
    is_biased = any(mixer.bias for mixer in config.model.architecture.attentions)
    fits = is_ring and config.train.fp8 is None and not is_biased
    by_documents = config.data.document_mask and fits
    return "documents" if by_documents else "sequence"


def expert_cut(parallel: ParallelConfig) -> Cut:
    """Return how experts are cut."""
    return Cut(parallel.expert_tensor or parallel.tensor, parallel.expert)
