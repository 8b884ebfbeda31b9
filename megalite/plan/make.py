"""Make the plan of a config on a number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.plan.checks import check_groups, check_layout, check_products, check_stages
from megalite.plan.layout import Plan, Sized, context_balance, expert_cut, smallest_world
from megalite.plan.memory import fullest_rank, resident_bytes
from megalite.plan.stages import make_stages
from megalite.utils.counts import divisors

if TYPE_CHECKING:
    from megalite.models.weights import Weight


def plan(config: Config, ranks: int) -> Plan:
    """Return the plan of `config` on `ranks` ranks: mesh, stages, batch arithmetic and memory.

    Raise ConfigError with the setting to change if the layout does not fit the ranks, the model or
    the batch."""
    # Imports torch, which the arithmetic of a plan does without.
    from megalite.models import weight_table

    weights = weight_table(config.model, config.lora, config.train.fp8)
    check_groups(config, weights)
    return make_plan(config, weights, ranks)


def make_plan(config: Config, weights: Sequence[Weight], world_size: int) -> Plan:
    """Return the plan of `config` for a table of `weights` on `world_size` ranks. Raise ConfigError
    with the setting to change if the layout does not fit the ranks, the model or the batch."""
    made = plan_of_sizes(config, weights, world_size)
    check_products(config, weights)
    return made


def plan_of_sizes(config: Config, weights: Sequence[Sized], world_size: int) -> Plan:
    """Return the plan as `make_plan` does, but of `weights` that may each be the sum of many: what
    `check_products` asks of single ones is left to the caller."""
    parallel, train = config.parallel, config.train
    tensor, pipeline, context = parallel.tensor, parallel.pipeline, parallel.context
    unit = smallest_world(config)
    if world_size % unit:
        experts = {"expert": parallel.expert, "expert_tensor": parallel.expert_tensor or 1}
        asked = {"tensor": tensor, "pipeline": pipeline, "context": context} | experts
        name = " × ".join(f"parallel.{name} = {size}" for name, size in asked.items() if size > 1)
        raise ConfigError(
            f"{name} does not divide the {world_size} rank(s); start a multiple of {unit} ranks"
            + (f", as `RANKS={unit} bash slurm/pretrain.sh CONFIG` does" if world_size == 1 else "")
        )
    # What is left of the world: data parallelism is never asked for, but follows from the ranks.
    data = world_size // (tensor * pipeline * context)
    micro_batch_size = _micro_batch_size(config, data)
    micro_batches = train.global_batch_size // (micro_batch_size * data)
    sequence = parallel.sequence and tensor > 1
    check_layout(config, weights, data, micro_batch_size, sequence)
    # After all checks that need no stages, so that the first mistake reported is the simplest.
    stages = make_stages(config, weights)
    check_stages(config, weights, stages)
    fullest = fullest_rank(config, weights, stages, world_size // pipeline)
    return Plan(
        world_size=world_size,
        pipeline=pipeline,
        data=data,
        context=context,
        context_method=parallel.context_method,
        context_balance=context_balance(config),
        tensor=tensor,
        experts=expert_cut(parallel),
        sequence=sequence,
        tensor_overlap=parallel.tensor_overlap and sequence,
        engine=parallel.engine,
        zero_stage=parallel.zero_stage,
        schedule=parallel.schedule,
        virtual=parallel.virtual,
        stages=stages,
        micro_batch_size=micro_batch_size,
        micro_batches=micro_batches,
        tokens_per_step=train.global_batch_size * config.sample_tokens,
        steps=train.steps,
        tokens=config.num_tokens,
        num_params=sum(weight.numel for weight in weights),
        params_per_rank=sum(held.params for held in fullest),
        num_trained=sum(weight.numel for weight in weights if not weight.frozen),
        memory_bytes=resident_bytes(config, fullest, parallel.zero_stage),
    )


def nodes_that_fit(
    config: Config, weights: Sequence[Weight], nodes: int, ranks_per_node: int
) -> int:
    """Return how many of `nodes` nodes with `ranks_per_node` ranks each the layout can use: all, or
    with `parallel.elastic` as many as possible.

    Tensor, pipeline and context parallelism and the global batch stay as in `config`; `weights` is
    the model's table. Raise ConfigError if no number fits."""
    refused: dict[int, ConfigError] = {}
    # From the most down: the first that fits leaves fewest nodes idle.
    for count in range(nodes, 0 if config.parallel.elastic else nodes - 1, -1):
        try:
            make_plan(config, weights, count * ranks_per_node)
        except ConfigError as error:
            refused[count] = error
        else:
            return count
    # Its own message is better than one about numbers of nodes.
    if len(refused) == 1:
        raise refused[nodes]
    raise ConfigError(
        f"no number of nodes up to {nodes} fits; of {nodes}: {refused[nodes]}; of 1: {refused[1]}"
    )


def _micro_batch_size(config: Config, data: int) -> int:
    """Return the micro-batch size: the config's, or with `parallel.elastic` the largest smaller one
    that divides the global batch. Raise ConfigError."""
    size, sizes = config.train.micro_batch_size, [size for size, _ in config.train.batch_sizes]
    # Every batch size of a ramp must come out even.
    shares, rest = divmod(gcd(*sizes), data)
    fitting = [] if rest else [fewer for fewer in divisors(shares) if fewer <= size]
    # With lost nodes there are fewer data ranks, over which the same batch must come out even.
    if size in fitting or (fitting and config.parallel.elastic):
        return fitting[-1]
    advice = (
        f"micro_batch_size = {fitting[-1]} would fit"
        if fitting
        else "choose another global_batch_size"
    )
    whole = next(whole for whole in reversed(sizes) if whole % (size * data))
    key = "global_batch_size" if whole == sizes[-1] else "batch_ramp: a batch"
    raise ConfigError(
        f"train.{key} = {whole} must be a multiple of micro_batch_size × data ranks = {size} × {data} = {size * data}; "
        f"{advice}"
    )
