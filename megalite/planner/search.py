"""Searches all layouts of a model on given GPUs for those with the shortest step.

A layout is not simulated if its work alone, without any waiting, takes longer than the best steps
found so far. Candidates are taken in the order of that lower bound, so the search ends at the first
one beyond them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd
from typing import Any, Literal

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.models.architecture import ExpertsSpec
from megalite.plan import Plan, plan_of_sizes, resident_bytes
from megalite.plan.checks import check_products
from megalite.planner.estimate import Estimate, Outlook, usable_bytes
from megalite.planner.hardware import Hardware
from megalite.planner.shapes import ModelTable
from megalite.planner.sizes import Together, together
from megalite.utils.counts import divisors

MOST_STAGES_A_RANK = 16
"""Largest number of virtual stages to try."""
MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Micro-batch sizes to try."""
SHORTEST_CUT = 2048
"""Lower bound of a context rank's tokens. With less work a ring cannot hide its messages."""

RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
"""Each is slower and smaller than the one before: the first that fits is the best."""


@dataclass(frozen=True)
class Found:
    """Holds the result of a search."""

    best: tuple[Estimate, ...]
    """The quickest layouts, the best first."""
    num_layouts: int
    """Layouts that the plan allows."""
    num_refused: int
    """Layouts that the plan refuses: heads that do not divide, batches that do not come out even,
    …"""
    num_simulated: int
    num_too_large: int
    """Layouts looked at closely that do not fit, whatever is recomputed and sharded."""


def search(config: Config, world_size: int, hardware: Hardware, keep: int = 10) -> Found:
    """Return the `keep` quickest layouts of `config` on `world_size` GPUs of this `hardware`.

    Raises ConfigError when no layout fits."""
    table = ModelTable(config)
    rows = together(table.weights, config.optimizer)
    candidates: list[tuple[float, int, Outlook]] = []
    refused = 0
    for number, parallel in enumerate(_layouts(config, world_size, hardware.gpus_per_node)):
        try:
            outlook = _outlook(config, parallel, world_size, hardware, table, rows)
        except ConfigError:
            refused += 1
            continue
        # `number` breaks ties, so that a search gives the same result every time.
        candidates.append((outlook.shortest_step_s, number, outlook))
    # Memory decides only now: it is not needed for the bound, and costs more.
    best: list[Estimate] = []
    simulated = too_large = 0
    for bound, _, outlook in sorted(candidates, key=lambda candidate: candidate[:2]):
        # Sorted by the bound: from here on no candidate can be quicker than those found.
        if len(best) == keep and bound > best[-1].step_time_s:
            break
        fitting = list(_fitting(outlook, table))
        too_large += not fitting
        for one in fitting:
            simulated += 1
            best.append(one.estimate())
        best = sorted(best, key=lambda estimate: estimate.step_time_s)[:keep]
    if not best:
        raise ConfigError(
            _nothing_fits([outlook for _, _, outlook in candidates], world_size, hardware)
        )
    return Found(tuple(best), len(candidates), refused, simulated, too_large)


def _layouts(config: Config, world_size: int, gpus_per_node: int) -> Iterator[dict[str, Any]]:
    """Yield the settings of `parallel` and `train` of every layout to try. The plan refuses some of
    them."""
    num_layers = config.model.num_layers
    for tensor in divisors(gpus_per_node):  # tensor parallelism stays within a node
        if world_size % tensor:
            continue
        for pipeline in divisors(world_size // tensor):
            if pipeline > num_layers:
                break
            for context in _powers_of_two(config.data.seq_length // SHORTEST_CUT):
                if world_size % (tensor * pipeline * context):
                    continue
                data = world_size // (tensor * pipeline * context)
                for micro_batch_size in MICRO_BATCHES:
                    if any(
                        size % (micro_batch_size * data) for size, _ in config.train.batch_sizes
                    ):
                        continue
                    for (virtual, schedule), (expert, expert_tensor) in product(
                        _schedules(pipeline, num_layers),
                        _expert_cuts(config, tensor, world_size // pipeline),
                    ):
                        yield {
                            "tensor": tensor,
                            "sequence": True,
                            "pipeline": pipeline,
                            "virtual": virtual,
                            "schedule": schedule,
                            "context": context,
                            "expert": expert,
                            "expert_tensor": expert_tensor,
                            "micro_batch_size": micro_batch_size,
                        }


def _expert_cuts(config: Config, tensor: int, ranks: int) -> Iterator[tuple[int, int]]:
    """Yield the (expert, expert-tensor) ranks to try in a pipeline stage of so many `ranks`:
    experts cut as dense weights are, or whole, on any number of them."""
    feed_forwards = (layer.feed_forward for layer in config.model.architecture.layers)
    counts = [each.num_experts for each in feed_forwards if isinstance(each, ExpertsSpec)]
    for expert in divisors(gcd(*counts)) if counts else (1,):
        # A dict for a set in order: with tensor = 1 both are the same.
        for expert_tensor in dict.fromkeys((tensor, 1)) if counts else (tensor,):
            if ranks % (expert * expert_tensor) == 0:
                yield expert, expert_tensor


def _schedules(pipeline: int, num_layers: int) -> Iterator[tuple[int, str]]:
    """Yield the (virtual stages, schedule) to try for a number of pipeline ranks."""
    yield 1, "1f1b"
    if pipeline > 1:
        yield 1, "zero_bubble"
        for virtual in range(2, min(MOST_STAGES_A_RANK, num_layers // pipeline) + 1):
            # Layers that do not come out even make some stages longer, and all ranks wait for
            # those.
            if num_layers % (pipeline * virtual) == 0 or virtual == 2:
                yield virtual, "interleaved"
                yield virtual, "zero_bubble"


def _outlook(
    config: Config,
    settings: dict[str, Any],
    world_size: int,
    hardware: Hardware,
    table: ModelTable,
    rows: list[Together],
) -> Outlook:
    """Make the outlook of a layout in its quickest form: no recomputation, and ZeRO stage 1.

    Raises ConfigError where the plan refuses it."""
    parallel = dict(settings)
    train = {
        "micro_batch_size": parallel.pop("micro_batch_size"),
        "recompute": "none",
        "recompute_layers": None,
    }
    # `stage_layers` is of the config's own pipeline, and fits no other.
    parallel |= {"zero_stage": 1, "engine": "native", "stage_layers": None}
    config = _updated(config, parallel, train)
    plan = plan_of_sizes(config, rows, world_size)
    check_products(config, table.weights)
    return Outlook(config, plan, hardware, table)


def _fitting(outlook: Outlook, table: ModelTable) -> Iterator[Outlook]:
    """Yield the quickest form of a layout that fits, at each ZeRO stage that may be the best."""
    limit = usable_bytes(outlook.hardware)
    stages = (1, 2) if outlook.plan.replicas > 1 else (1,)
    for zero_stage in stages:
        plan = replace(outlook.plan, zero_stage=zero_stage)
        if _resident(plan, outlook) > limit:  # no recomputation helps: activations are not in it
            continue
        for recompute in RECOMPUTE:
            config = _updated(outlook.config, {"zero_stage": zero_stage}, {"recompute": recompute})
            one = Outlook(config, plan, outlook.hardware, table)
            if max(memory.total for memory in one.memory) <= limit:
                yield one
                if recompute == "none":
                    return  # more sharding only adds traffic
                break


def _resident(plan: Plan, outlook: Outlook) -> int:
    """Return the bytes that the fullest rank holds through the whole step."""
    return sum(resident_bytes(outlook.config, outlook.held, plan.zero_stage).values())


def _updated(config: Config, parallel: dict[str, Any], train: dict[str, Any]) -> Config:
    """Return the config with some settings of `parallel` and `train` replaced, without validating
    it again."""
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "train": config.train.model_copy(update=train),
        }
    )


def _nothing_fits(candidates: list[Outlook], world_size: int, hardware: Hardware) -> str:
    """Say why no layout fits, and by how much."""
    if not candidates:
        return (
            f"no layout of this config comes out even on {world_size} GPUs; try another train.global_batch_size or "
            "number of GPUs"
        )
    # ZeRO 2 is what the native engine shards most.
    resident = [_resident(replace(one.plan, zero_stage=2), one) for one in candidates]
    limit_gib = usable_bytes(hardware) / 2**30
    least_gib = min(resident) / 2**30
    return (
        f"none of {len(candidates)} layouts fits into the {limit_gib:.0f} GiB that tensors may take on "
        f"{world_size} × {hardware.chip.chip}: weights, gradients and optimizer state alone are at least "
        f"{least_gib:.0f} GiB; take more GPUs"
    )


def _powers_of_two(most: int) -> list[int]:
    return [1 << bits for bits in range(max(1, most).bit_length())]
