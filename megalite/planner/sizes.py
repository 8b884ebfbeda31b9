"""Add up what one tensor rank holds of a pipeline stage's weights, from the rows of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megalite.config import OptimizerConfig
from megalite.models.weights import Weight
from megalite.plan import Cut, Held, Place, Plan, StageSpan


@dataclass(frozen=True)
class Experts:
    """Holds the numbers of elements that a rank has of a stage's experts."""

    layers: tuple[int, ...]
    states: float
    solved: int
    largest: int
    """The largest single weight of experts, all that the rank has of it."""
    coded: tuple[int, ...] = ()
    """Of each layer, what is gathered as codes of fp8."""


@dataclass(frozen=True)
class StageSizes:
    """Holds the numbers of elements that one tensor rank has of a stage's weights."""

    before: int
    """Embeddings, before the layers."""
    layers: tuple[int, ...]
    after: int
    """Last norm and head, after the layers. An embedding at both ends of a pipeline counts on
    each."""
    largest: int
    """The largest single weight."""
    largest_looked_up: int
    """The largest embedding, or 0 if the stage has none."""

    states: float
    """Elements of optimizer states beside the trained ones of these, as many as in fp32 would take
    their memory."""
    solved: int
    """Elements of weights that the optimizer looks at as whole matrices."""
    largest_solved: int
    """The largest of these, in the whole model."""
    experts: Experts
    """What of all this is of experts that have other replicas than dense weights."""

    quantised: int = 0
    """Elements of these that are held in few bits."""
    quantised_bytes: int = 0

    coded: tuple[int, ...] = ()
    """Of each layer, elements that are gathered as codes of fp8 where they are gathered; those of
    experts as well."""

    tied: int = 0
    """Elements of an embedding whose gradient is added to that of a pipeline's other end."""

    written: int = 0
    """Elements of the weights that the stage writes into checkpoints, without those `experts`: a tied
    one is the first's."""
    largest_written: int = 0
    """The largest of these weights."""

    unfrozen: StageSizes | None = None
    """The same for the trained weights only, if some are frozen."""

    @property
    def total(self) -> int:
        return self.before + sum(self.layers) + self.after

    @property
    def trained(self) -> StageSizes:
        """Sizes of the weights that are trained."""
        return self.unfrozen or self

    def held(self, plan: Plan) -> tuple[Held, Held]:
        """Return what a rank holds of dense weights, and of experts."""
        trained, experts = self.trained, self.experts
        of_experts = Held(
            sum(experts.layers),
            sum(trained.experts.layers),
            experts.states,
            plan.replicas_of(plan.experts),
            coded=sum(experts.coded),
        )
        dense = Held(
            self.total - of_experts.params, trained.total - of_experts.trained, self.states - experts.states,
            plan.replicas, self.quantised, self.quantised_bytes, sum(self.coded) - of_experts.coded,
        )  # fmt: skip
        return dense, of_experts


class LocalSizes:
    """Adds up the elements of all weights on one tensor rank, by the place of the weight in the
    model."""

    def __init__(
        self,
        weights: Sequence[Weight],
        plan: Plan,
        optimizer: OptimizerConfig,
    ):
        """Add up `weights` as `plan` cuts them, with the states that `optimizer` keeps.

        Raises ValueError where a weight cannot be split."""
        folded = [weight for weight in weights if weight.is_expert and plan.folds_experts]
        # The second condition ends the recursion: among experts alone there is nothing to tell
        # apart.
        self.experts = (
            LocalSizes(folded, plan, optimizer) if folded and len(folded) < len(weights) else None
        )
        self.states: dict[Place, float] = {}
        self.solved: dict[Place, int] = {}
        self.largest_solved = 0
        self.total: dict[Place, int] = {}
        self.largest: dict[Place, int] = {}
        self.written: dict[Place, int] = {}
        self.largest_written: dict[Place, int] = {}
        self.largest_looked_up = 0
        self.quantised: dict[Place, int] = {}
        self.quantised_bytes: dict[Place, int] = {}
        self.coded: dict[Place, int] = {}
        for weight in weights:
            size = prod(weight.local_shape(*plan.cut_of(weight)))
            if weight.coded:
                self.coded[weight.place] = self.coded.get(weight.place, 0) + size
            if in_few_bits := weight.quantised_bytes(*plan.cut_of(weight)):
                self.quantised[weight.place] = self.quantised.get(weight.place, 0) + size
                before = self.quantised_bytes.get(weight.place, 0)
                self.quantised_bytes[weight.place] = before + in_few_bits
            if weight.is_looked_up:
                self.largest_looked_up = max(self.largest_looked_up, size)
            self.total[weight.place] = self.total.get(weight.place, 0) + size
            self.largest[weight.place] = max(self.largest.get(weight.place, 0), size)
            if not (weight.is_expert and plan.folds_experts):
                self.written[weight.place] = self.written.get(weight.place, 0) + size
                most = max(self.largest_written.get(weight.place, 0), size)
                self.largest_written[weight.place] = most
            kept = 0.0 if weight.frozen else size * weight.num_states(optimizer)
            self.states[weight.place] = self.states.get(weight.place, 0) + kept
            solved = size if optimizer.products(weight) and not weight.frozen else 0
            self.solved[weight.place] = self.solved.get(weight.place, 0) + solved
            self.largest_solved = max(self.largest_solved, solved)
        unfrozen = [weight for weight in weights if not weight.frozen]
        self.unfrozen: LocalSizes | None = None
        if len(unfrozen) < len(weights):
            self.unfrozen = LocalSizes(unfrozen, plan, optimizer)

    def of(self, stage: StageSpan) -> StageSizes:
        """Return the sizes of a pipeline stage."""
        first, last, both = (self.total.get(place, 0) for place in ENDS)
        ends = [place for place in ENDS if stage.holds(place)]
        layers = stage.layers
        places = [*layers, *ends]
        own = [place for place in places if stage.first or place != "both"]
        return StageSizes(
            before=first + both if stage.first else 0,
            layers=tuple(self.total.get(number, 0) for number in layers),
            # A weight at both ends exists once if the stage is the first and the last.
            after=last + (0 if stage.first else both) if stage.last else 0,
            largest=max((self.largest.get(place, 0) for place in places), default=0),
            largest_looked_up=self.largest_looked_up if stage.first or stage.predictors else 0,
            states=sum(self.states.get(place, 0) for place in places),
            solved=sum(self.solved.get(place, 0) for place in places),
            largest_solved=self.largest_solved,
            experts=self._experts(layers),
            quantised=sum(self.quantised.get(place, 0) for place in places),
            quantised_bytes=sum(self.quantised_bytes.get(place, 0) for place in places),
            coded=tuple(self.coded.get(number, 0) for number in layers),
            tied=both if stage.first != stage.last else 0,
            written=sum(self.written.get(place, 0) for place in own),
            largest_written=max((self.largest_written.get(place, 0) for place in own), default=0),
            unfrozen=self.unfrozen.of(stage) if self.unfrozen else None,
        )

    def _experts(self, layers: Sequence[int]) -> Experts:
        if self.experts is None:
            return Experts((0,) * len(layers), 0, 0, 0, (0,) * len(layers))
        found = self.experts
        of_layers, solved, largest, coded = (
            [of.get(number, 0) for number in layers]
            for of in (found.total, found.solved, found.largest, found.coded)
        )
        states = sum(found.states.get(number, 0) for number in layers)
        most = max(largest, default=0)
        return Experts(tuple(of_layers), states, sum(solved), most, tuple(coded))


ENDS: tuple[Place, ...] = ("first", "last", "both")
"""Places outside the layers; "both" is an embedding at both ends."""


class Together:
    """Stands for all weights of one place as a single row of the table.

    A search makes thousands of plans, and a plan asks only for sums of weights."""

    def __init__(
        self,
        place: Place,
        frozen: bool,
        is_expert: bool,
        num_states: float,
        quantised: str | None,
        coded: bool,
        weights: Sequence[Weight],
    ):
        """Sum up `weights`, all of this `place`, all `frozen` or not, of experts or not, `quantised`
        and `coded` alike, with so many states of the optimizer."""
        self._num_states = num_states
        self.place = place
        self.frozen = frozen
        self.is_expert = is_expert
        self.coded = coded
        self.name = f"{place} {frozen} {is_expert} {num_states} {quantised} {coded}"
        self.numel = sum(weight.numel for weight in weights)
        self.multiplied = sum(weight.multiplied for weight in weights)
        self._weights = weights
        self._local: dict[Cut, tuple[int]] = {}

    def num_states(self, optimizer: OptimizerConfig) -> float:
        """Return how many states the optimizer keeps for each element, whatever `optimizer` is:
        known already."""
        return self._num_states

    def local_shape(self, tensor: int, expert: int = 1) -> tuple[int, ...]:
        """Return the number of elements on one of `expert` × `tensor` ranks, as a shape of one
        dimension.

        Raises ValueError where a weight cannot be split."""
        cut = Cut(tensor, expert)
        if cut not in self._local:
            elements = sum(prod(weight.local_shape(*cut)) for weight in self._weights)
            self._local[cut] = (elements,)
        return self._local[cut]

    def quantised_bytes(self, tensor: int, expert: int = 1) -> int:
        """Return the bytes on one of these ranks, where the weights are quantised; 0 where they are
        not."""
        return sum(weight.quantised_bytes(tensor, expert) for weight in self._weights)


def together(weights: Sequence[Weight], optimizer: OptimizerConfig) -> list[Together]:
    """Group weights by place, by whether they are frozen, of experts, quantised and coded, and by
    how many states `optimizer` keeps for them."""
    places: dict[tuple[Place, bool, bool, float, str | None, bool], list[Weight]] = {}
    for weight in weights:
        states = weight.num_states(optimizer)
        kind = (
            weight.place, weight.frozen, weight.is_expert, states, weight.quantised, weight.coded,
        )  # fmt: skip
        places.setdefault(kind, []).append(weight)
    return [Together(*kind, rows) for kind, rows in places.items()]
