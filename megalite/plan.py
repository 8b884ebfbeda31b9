"""What follows from a config on a number of ranks: mesh, batch arithmetic, sizes, memory. Pure arithmetic, so it runs
on a laptop for any cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from megalite.config import Config, ConfigError


class Sized(Protocol):
    """The part of a weight's row that the plan needs."""

    @property
    def name(self) -> str: ...
    @property
    def numel(self) -> int: ...
    def local_shape(self, tensor: int) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Plan:
    world_size: int
    tensor: int
    data: int
    sequence: bool
    """Sequence parallelism is on: asked for and more than one tensor rank."""
    zero_stage: int
    micro_batches: int
    """Forward passes of each rank per optimizer step."""
    tokens_per_step: int
    steps: int
    num_params: int
    params_per_rank: int
    memory_bytes: dict[str, int]
    """Bytes a rank holds through the whole step: weights, gradients, optimizer state. Activations come on top."""

    def describe(self) -> str:
        lines = [
            ("ranks", f"{self.world_size} = data {self.data} × tensor {self.tensor}"),
            ("sequence parallel", "on" if self.sequence else "off"),
            ("ZeRO stage", str(self.zero_stage)),
            ("parameters", f"{self.num_params:,}, of which {self.params_per_rank:,} on a rank"),
            ("micro-batches per step", str(self.micro_batches)),
            (
                "tokens",
                f"{self.tokens_per_step:,} a step, {self.tokens_per_step * self.steps:,} in {self.steps:,} steps",
            ),
            *((f"memory: {name}", f"{size / 2**20:,.1f} MiB a rank") for name, size in self.memory_bytes.items()),
        ]
        return "\n".join(f"{name:<24}{text}" for name, text in lines)


def smallest_world(config: Config) -> int:
    """Ranks that the layout needs at least."""
    return config.parallel.tensor


def make_plan(config: Config, weights: Sequence[Sized], world_size: int) -> Plan:
    """Raises ConfigError with the setting to change when the layout does not fit the ranks, the model or the batch."""
    parallel, train = config.parallel, config.train
    tensor = parallel.tensor
    if world_size % tensor:
        raise ConfigError(
            f"parallel.tensor = {tensor} does not divide the {world_size} rank(s); start a multiple of {tensor} ranks"
        )
    data = world_size // tensor
    micro_batches = _micro_batches(train.global_batch_size, train.micro_batch_size, data)
    sequence = parallel.sequence and tensor > 1
    if sequence and config.data.seq_length % tensor:
        raise ConfigError(
            f"data.seq_length = {config.data.seq_length} must be a multiple of parallel.tensor = {tensor} "
            "for parallel.sequence: true"
        )
    try:
        params_per_rank = sum(prod(weight.local_shape(tensor)) for weight in weights)
    except ValueError as error:
        raise ConfigError(f"parallel.tensor = {tensor}: {error}") from None
    return Plan(
        world_size=world_size,
        tensor=tensor,
        data=data,
        sequence=sequence,
        zero_stage=parallel.zero_stage,
        micro_batches=micro_batches,
        tokens_per_step=train.global_batch_size * config.data.seq_length,
        steps=train.steps,
        num_params=sum(weight.numel for weight in weights),
        params_per_rank=params_per_rank,
        memory_bytes=_memory(params_per_rank, data, parallel.zero_stage, train.precision),
    )


def _micro_batches(global_batch_size: int, micro_batch_size: int, data: int) -> int:
    per_pass = micro_batch_size * data
    if global_batch_size % per_pass:
        fitting = [size for size in range(1, micro_batch_size + 1) if global_batch_size % (size * data) == 0]
        advice = f"micro_batch_size = {fitting[-1]} would fit" if fitting else "choose another global_batch_size"
        raise ConfigError(
            f"train.global_batch_size = {global_batch_size} must be a multiple of micro_batch_size × data ranks = "
            f"{micro_batch_size} × {data} = {per_pass}; {advice}"
        )
    return global_batch_size // per_pass


def _memory(params: int, data: int, zero_stage: int, precision: str) -> dict[str, int]:
    shard = params // data
    weight_bytes = 2 if precision == "bf16" else 4
    master = 4 if precision == "bf16" else 0  # in fp32 the weights are their own master copy
    return {
        "weights": params * weight_bytes,
        "gradients": (shard if zero_stage == 2 else params) * 4,
        "optimizer": (shard if zero_stage >= 1 else params) * (8 + master),
    }
