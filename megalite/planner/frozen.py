"""Counts the bytes of the frozen model that an objective may hold beside the trained one
(`training/frozen.py`)."""

from __future__ import annotations

from dataclasses import dataclass

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.kernels.divergence import ROWS
from megalite.plan import Plan, make_plan
from megalite.planner.activations import layer_bytes, rope_bytes
from megalite.planner.shapes import FP32, ModelTable, shapes_of

WIDENED = 5
"""Tensors in fp32 of the rows of logits that an objective compares at a time."""


@dataclass(frozen=True)
class FrozenBytes:
    """Holds the bytes that a frozen model adds."""

    weights: tuple[int, ...]
    """Of each pipeline rank."""
    states: int = 0
    """Hidden states of all micro-batches, which the last pipeline rank computes before the step's
    own passes."""
    kept: int = 0
    """Kept by the head's forward pass for its backward pass."""
    running: int = 0
    """Held while the frozen model runs beside what the trained one keeps; with a pipeline it runs
    before that."""
    comparing: int = 0
    """Held while both models' logits are compared, beside those of the trained one."""
    compares_again: bool = False
    """Whether the backward pass does so again."""


def frozen_bytes(
    plan: Plan, config: Config, table: ModelTable, vocab: int, on_gloo: bool
) -> FrozenBytes:
    """Return what the frozen model beside that of `table` needs under `plan`, nothing where there
    is none. `config` is that of the trained model, of whose vocabulary a rank holds `vocab`
    columns.

    Raises ConfigError where it does not fit the layout."""
    none = (0,) * plan.pipeline
    if table.frozen is None and config.objective.made_of_tokens():
        # Rows are compared with what is on the disk, of which a token has little.
        shapes, _ = shapes_of(config, plan, table)
        rows = min(shapes.loss_chunk or ROWS, shapes.tokens)
        again = shapes.loss_chunk is not None
        return FrozenBytes(none, comparing=WIDENED * rows * vocab * FP32, compares_again=again)
    if table.frozen is None:
        return FrozenBytes(none)
    # No layer keeps anything.
    table, train = (
        table.frozen,
        config.train.model_copy(update={"recompute": "full"}),
    )
    own = table.config.model_copy(update={"parallel": config.parallel, "train": train})
    try:
        plan = make_plan(own, table.weights, plan.world_size)
    except ConfigError as error:
        raise ConfigError(
            f"the model in {config.objective.frozen_model(config)}: {error}"
        ) from None
    shapes, layers = shapes_of(own, plan, table)
    element, sizes = shapes.element, table.sizes(plan)
    weights = tuple(
        sum(sizes.of(span).total for span in plan.stages_of(rank)) * element
        for rank in range(plan.pipeline)
    )
    whole = shapes.tokens * shapes.hidden * element
    rows = min(shapes.loss_chunk or ROWS, shapes.tokens)
    widened = WIDENED * rows * max(vocab, shapes.vocab) * FP32
    logits = (shapes.loss_chunk or shapes.tokens) * shapes.vocab * element
    comparing = logits + widened + (0 if shapes.loss_chunk else whole)
    running = 0
    if plan.pipeline == 1:
        running = rope_bytes(shapes) + max(
            layer_bytes(layer, "full", on_gloo).forward for layer in layers
        )
    return FrozenBytes(
        weights,
        states=plan.micro_batches * shapes.hidden_bytes if plan.pipeline > 1 else 0,
        kept=whole if shapes.loss_chunk else 0,
        running=running,
        comparing=comparing,
        compares_again=shapes.loss_chunk is not None,
    )
