"""ZeRO stages 1 to 3 (Rajbhandari et al. 2020) with offload to the host (Ren et al. 2021) and to
NVMe (Rajbhandari et al. 2021), by DeepSpeed. This is the only file that imports it.

DeepSpeed owns the weights and replaces the stage's `forward`, so that its hooks can fetch weights
before they are used. A step:

    forward        stage 3: each module's weights are gathered when its turn comes, and released after it
    backward       gradients of norms are summed over the tensor ranks, which see different parts of the sequence; those
                   of all weights are reduced over the replicas (data × context) in fp32 buckets
    norm           one number over all ranks; a norm that is not finite skips the update, and is given as inf
    AdamW          on this rank's shard of the fp32 master weights, on the host where they are offloaded
    all-gather     stages 1 and 2: every rank gets all of the new weights

                   gradients kept      reduced after              weights
    stage 1        whole, fp32         the last micro-batch       whole
    stage 2        shard, fp32         every micro-batch          whole
    stage 3        shard, fp32         every micro-batch          shard, or on the host, or on NVMe

DeepSpeed averages gradients over the replicas; losses here are scaled to be summed, so they are
multiplied by the number of replicas first. Its state is read and written in place, in the flat
partitions of its optimizers (whose attributes are those of version 0.19.8): files that it would
write itself are bound to one layout. It keeps its groups in a global and, at stage 3, replaces
`torch.nn.functional.linear` by one that does not keep gathered weights: one engine a process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megalite.comm.collectives import all_gather, all_reduce
from megalite.comm.mesh import Axis, Mesh
from megalite.config import Config
from megalite.engine import ReadState, Sharing, UpdateGate
from megalite.engine.gather import HostBuffers, assemble_on
from megalite.engine.layout import bucket_elements
from megalite.engine.optimizers.adamw import AdamWConfig
from megalite.errors import ConfigError
from megalite.models import set_parameters, weight_table
from megalite.models.weights import Weight
from megalite.parallel.stage import Stage
from megalite.plan import Plan

MOMENTS = AdamWConfig.STATES
OLDEST = "0.19.8"
"""Older versions reduce wrongly on a CPU, and accumulate or send gradients in bf16 where fp32 was
asked for."""


def deepspeed_config(config: Config, plan: Plan) -> dict[str, Any]:
    """Return the config that DeepSpeed is given for `config` and `plan`. DeepSpeed ignores keys
    that it does not know, so nothing but this function writes them."""
    bucket = bucket_elements(config, plan) // 2 * 2  # it must be even
    zero: dict[str, Any] = {
        "stage": plan.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if plan.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            # Norm weights and biases stay whole on every rank: gathering them would cost more than
            # it saves.
            "stage3_param_persistence_threshold": 10 * config.model.hidden_size,
        }
    offload = config.parallel.offload
    if offload.optimizer != "none":
        zero["offload_optimizer"] = _offload_to(offload.optimizer, offload.nvme_path)
    if offload.parameters != "none":
        zero["offload_param"] = _offload_to(offload.parameters, offload.nvme_path)
    if offload.parameters == "nvme":
        largest = max(
            prod(weight.local_shape(plan.tensor)) for weight in weight_table(config.model)
        )
        # A buffer holds a replica's share of one weight; max_in_cpu 0 leaves no room on the host
        # for others.
        zero["offload_param"] |= {"buffer_size": -(-largest // plan.replicas), "max_in_cpu": 0}
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.micro_batches,
        "gradient_clipping": config.optimizer.clip,
        # Without the check, stage 2 takes the norm of gradients that are not finite for 1.
        "bf16": {"enabled": config.train.precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
        # On the host, torch's fused AdamW takes as long as DeepSpeed's own, which a compiler must
        # build first.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def _offload_to(device: str, nvme_path: Any) -> dict[str, Any]:
    """Return DeepSpeed's section for offloading to `device`, with the folder where that is NVMe."""
    return (
        {"device": device, "nvme_path": str(nvme_path)} if device == "nvme" else {"device": device}
    )


@dataclass(frozen=True)
class Fragment:
    """Elements [low, high) of a weight's flattened local tensor: this replica's share of it."""

    weight: Weight
    parameter: nn.Parameter
    group: int
    """Number of the flat partition it lies in."""
    offset: int
    """Where it begins in that partition."""
    low: int
    high: int

    def of(self, flat: Tensor) -> Tensor:
        """Return its elements of a flat partition."""
        return flat[self.offset : self.offset + self.high - self.low]


class DeepSpeedEngine:
    """Give a stage on the meta device its weights, and train it. See `Engine`."""

    def __init__(
        self, stage: Stage, weights: Sequence[Weight], plan: Plan, mesh: Mesh, config: Config
    ):
        """Take over `stage.forward`. Raises ConfigError when DeepSpeed, or what its NVMe offload
        needs, is missing."""
        deepspeed = _import_deepspeed(mesh)
        # The loss scale undoes DeepSpeed's mean over the replicas: ours is a sum.
        self.mesh, self.zero_stage, self.loss_scale = (
            mesh,
            plan.zero_stage,
            float(mesh.replicas.size),
        )
        self.weights = [weight for weight in weights if not weight.frozen]
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        if "nvme" in (config.parallel.offload.optimizer, config.parallel.offload.parameters):
            _check_nvme()
        ds_config = deepspeed_config(config, plan)
        groups = Groups(_with_group(mesh.replicas), _with_group(mesh.tensor))
        every = self._make_parameters(stage.model, weights, groups, ds_config)
        self.frozen = [(weight, every[weight.name]) for weight in weights if weight.frozen]
        parameters = {weight.name: every[weight.name] for weight in self.weights}
        assert isinstance(config.optimizer, AdamWConfig), "the plan has refused others"
        self.optimizer = _make_optimizer(config.optimizer, self.weights, parameters)
        # DeepSpeed wraps a module of its own: were it `stage` itself, the replaced `forward` would
        # call the engine, which calls `forward`, without end.
        inner = Stage(stage.model, stage.span)
        # Memory reports that its log level does not stop; warnings pass.
        with redirect_stdout(StringIO()):
            self.engine, *_ = deepspeed.initialize(
                model=inner, optimizer=self.optimizer, config=ds_config, mpu=groups
            )
        stage.forward = self.engine.forward  # type: ignore[method-assign]
        # The gate asks for the norm, which exists only inside `engine.step`, right before the
        # optimizer.
        self._update, self._permitted = self.optimizer.step, _always
        # DeepSpeed calls it for every flat partition, once it knows the norm. It would warn about a
        # subclass.
        self.optimizer.step = lambda: self._update() if self._permitted() else None  # type: ignore
        for weight in self.weights:
            if plan.tensor > 1 and weight.sums_over_tensor_ranks(plan.sequence):
                parameters[weight.name].register_hook(self._sum_over_tensor_ranks)
        self.zero = self.engine.optimizer
        self.fragments = self._find_fragments(parameters)
        self._spans = self._share_spans()
        self._expected = self._arrived = 0

    @property
    def states(self) -> tuple[str, ...]:
        return MOMENTS if self.dtype == torch.float32 else ("master", *MOMENTS)

    def _make_parameters(
        self, model: nn.Module, weights: Sequence[Weight], groups: Groups, ds_config: dict[str, Any]
    ) -> dict[str, nn.Parameter]:
        """Give the model parameters of zeros. At stage 3 no more than one whole weight exists at a
        time."""
        from deepspeed import zero

        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        made: dict[str, nn.Parameter] = {}
        first: Any = None
        for weight in weights:
            zeros = torch.zeros(shapes[weight.name], dtype=self.dtype, device=self.mesh.device)
            parameter: Any = nn.Parameter(zeros, requires_grad=not weight.frozen)
            # DeepSpeed takes the others for copies of each other, and counts them once in the norm.
            parameter.tensor_model_parallel = weight.shard is not None and self.mesh.tensor.size > 1
            # The first weight brings the machinery, through a module that holds it; all others are
            # handed to it one by one and are cut at once, so that no two whole weights exist.
            if self.zero_stage == 3 and first is None:
                first = parameter
                group = groups.get_data_parallel_group()
                zero.Init(
                    nn.ParameterList([first]), group, config_dict_or_path=ds_config, mpu=groups
                )
            elif self.zero_stage == 3:
                first.convert_to_zero_parameters(param_list=[parameter])
            made[weight.name] = parameter
        set_parameters(model, made)
        return made

    def _find_fragments(self, parameters: dict[str, nn.Parameter]) -> list[Fragment]:
        """Return this replica's share of every weight, in the order of the table; an empty one
        where it has none."""
        numbers = {parameter: number for number, parameter in enumerate(parameters.values())}
        found = [
            Fragment(w, p, 0, 0, 0, 0)
            for w, p in zip(self.weights, parameters.values(), strict=True)
        ]
        for group, members in enumerate(self._members()):
            offset = 0
            for parameter in members:
                number = numbers[parameter]
                # Stage 3 cuts every weight into equal shares, a share per replica, the last of
                # which may be short or empty; a partition is these shares one after another.
                if self.zero_stage == 3:
                    size, whole = parameter.partition_numel(), parameter.ds_numel
                    low = min(self.mesh.replicas.rank * size, whole)
                    place = (offset, low, min(low + size, whole))
                    offset += size
                # Stages 1 and 2 cut the flat buffer of all weights ("lp": low precision, the
                # model's; "hp": high precision, the master's). Where a weight has nothing on this
                # replica there is no mapping.
                elif (mapping := parameter._hp_mapping) is not None:
                    low, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
                    place = (mapping.hp_fragment_address.start, low, low + size)
                else:
                    continue
                found[number] = replace(
                    found[number], group=group, offset=place[0], low=place[1], high=place[2]
                )
        return found

    def _members(self) -> list[list[Any]]:
        """Return the parameters of each flat partition."""
        if self.zero_stage == 3:
            return self.zero.fp16_groups
        # Stage 1 in bf16 is an optimizer of its own.
        return (
            self.zero.bit16_groups if hasattr(self.zero, "bit16_groups") else self.zero.bf16_groups
        )

    def _share_spans(self) -> list[list[tuple[int, int]]]:
        """Return [low, high) of every weight on every replica: [weight][replica]."""
        # The cut follows from DeepSpeed's internals, so ranks tell each other rather than compute
        # it.
        mine = torch.tensor([[(f.low, f.high) for f in self.fragments]], device=self.mesh.device)
        return all_gather(mine, self.mesh.replicas, 0).transpose(0, 1).tolist()

    def _sum_over_tensor_ranks(self, grad: Tensor) -> Tensor:
        """Sum a gradient over the tensor ranks, in fp32."""
        total = torch.empty_like(
            grad, dtype=torch.float32, memory_format=torch.contiguous_format
        ).copy_(grad)
        return all_reduce(total, self.mesh.tensor).to(grad.dtype)

    # --- a step -----------------------------------------------------------------------------------

    def begin(self, num_micro_batches: int) -> None:
        self._expected, self._arrived = num_micro_batches, 0

    def backward(self, loss: Tensor) -> None:
        self._arrived += 1
        self.engine.set_gradient_accumulation_boundary(self._arrived == self._expected)
        self.engine.backward(loss * self.loss_scale, scale_wrt_gas=False)

    def finish(self) -> None:
        """Check that every micro-batch came; the last backward pass has waited for the
        reduction."""
        assert self._arrived == self._expected, f"{self._arrived} of {self._expected} micro-batches"

    def wait_for_params(self) -> None:
        """Do nothing: DeepSpeed's steps wait for all of their communication themselves."""

    def step(self, lr: float, update_gate: UpdateGate | None = None) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Asking the gate waits for the device.
        # Cached, as it is asked for every flat partition and once below, but the guard counts one
        # step.
        self._permitted = (
            _always if update_gate is None else cache(lambda: bool(update_gate(self._norm())))
        )
        self.engine.step()
        self._permitted()  # where the norm is not finite, DeepSpeed has not called the optimizer
        return self._norm()

    def _norm(self) -> Tensor:
        return torch.as_tensor(
            self.zero._global_grad_norm, dtype=torch.float32, device=self.mesh.device
        )

    @property
    def num_updates(self) -> int:
        # All partitions count alike. torch's AdamW counts only steps that were made, as we do.
        with self._resident(0) as (_, state):
            return int(state["step"]) + self._begun

    # --- state, in logical terms ------------------------------------------------------------------

    @torch.no_grad()
    def load(
        self, read: ReadState, num_updates: int = 0, begun: Mapping[str, int] | None = None
    ) -> None:
        # DeepSpeed counts for a flat partition, in which all states began together: `states_that_begin`
        # sees to that.
        self._begun = max((begun or {}).values(), default=0)
        if self.zero_stage == 3:
            # whole weights that are still cached would be used with their old values
            self.engine.empty_partition_cache()
        for weight, parameter in self.frozen:
            self._fill_frozen(weight, parameter, read)
        for number in range(len(self._members())):
            with self._resident(number, write=True) as (flat, state):
                for kind in MOMENTS:
                    state.setdefault(kind, torch.zeros_like(flat))
                since = float(num_updates - self._begun)
                state["step"] = torch.tensor(since, device=flat.device)
                for fragment in self.fragments:
                    if fragment.group == number and fragment.low < fragment.high:
                        for kind, whole in (("master", flat), *((s, state[s]) for s in MOMENTS)):
                            fragment.of(whole).copy_(
                                read(fragment.weight, kind, fragment.low, fragment.high)
                            )
                if self.zero_stage == 3:
                    self.zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.zero_stage < 3:
            self.zero.update_lp_params()

    def _fill_frozen(self, weight: Weight, parameter: Any, read: ReadState) -> None:
        """Read a frozen weight; at stage 3, this replica's share of it."""
        if self.zero_stage < 3:
            parameter.copy_(read(weight, "weight", 0, parameter.numel()).view_as(parameter))
            return
        size = parameter.partition_numel()
        low = min(self.mesh.replicas.rank * size, parameter.ds_numel)
        high = min(low + size, parameter.ds_numel)
        if low < high:
            parameter.ds_tensor[: high - low].copy_(read(weight, "weight", low, high))

    def _on_disk(self, number: int) -> bool:
        """Return whether a flat partition of the optimizer is on NVMe now."""
        return self.zero_stage == 3 and self.zero._swappable_optimizer_subgroup(number)

    @contextmanager
    def _resident(
        self, number: int, write: bool = False
    ) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Yield a flat partition of the fp32 master weights and its optimizer state, in memory for
        that long. `write` writes changes back to NVMe."""
        if self.zero_stage < 3:
            flat = self.optimizer.param_groups[number]["params"][0]
            yield flat.data, self.optimizer.state[flat]
            return
        flat = self.zero.fp32_partitioned_groups_flat[number]
        swapped = self._on_disk(number)
        if swapped:
            self.zero._optimizer_states_and_gradient_swap_in(number)
        yield flat.data, self.optimizer.state[flat]
        # Swapping out writes the state back and frees it; releasing only frees it.
        if swapped and write:
            self.zero._optimizer_states_and_gradient_swap_out(number)
        elif swapped:
            self.zero._release_swap_buffers(number)

    def averaged(self) -> AbstractContextManager[None]:
        raise NotImplementedError("the plan has refused optimizer.ema")

    def copies(self) -> Iterator[tuple[Sharing, Tensor]]:
        # At stage 3, every replica holds its own share of all weights.
        for fragment in self.fragments if self.zero_stage < 3 else ():
            yield Sharing(True, fragment.weight.shard is None, False), fragment.parameter.detach()
        for weight, parameter in self.frozen if self.zero_stage < 3 else ():
            yield Sharing(True, weight.shard is None, False), parameter.detach()

    @torch.no_grad()
    def gather(
        self, kind: str, owners: Mapping[str, int], buffers: HostBuffers | None = None
    ) -> dict[str, Tensor]:
        """Gather the logical tensors this rank owns: fragments go from every replica to the
        owner's, then local tensors over the tensor axis to the owner. `kind`, `owners` and
        `buffers` are as in `Engine.gather`."""
        owned: dict[str, Tensor] = {}
        shares = self._shares(kind)
        # In the order of the table on every rank. First this weight's fragments to the owner's
        # replica (on each tensor rank), then the tensor ranks' parts to the owner.
        for number, weight in enumerate(self.weights):
            _, replica, tensor_rank = self.mesh.place_of(owners[weight.name])
            # popped, so that what a rank holds shrinks while the owners' tensors grow.
            share = shares.pop(number).to(self.mesh.device)
            local = _collect(share, self._spans[number], self.mesh.replicas, replica)
            if local is not None:
                whole = assemble_on(tensor_rank, weight, local, self.mesh.dense, buffers)
                if whole is not None:
                    owned[weight.name] = whole
        return owned

    def gather_later(
        self, kinds: Sequence[str], owners: Mapping[str, int], buffers: HostBuffers
    ) -> Callable[[], dict[str, dict[str, Tensor]]]:
        gathered = {kind: self.gather(kind, owners, buffers) for kind in kinds}
        return lambda: gathered

    def _shares(self, kind: str) -> dict[int, Tensor]:
        """Return the elements of every weight, by its number, that this replica is responsible
        for."""
        if kind == "grad":
            return {
                number: self._gradient_of(fragment)
                for number, fragment in enumerate(self.fragments)
            }
        found: dict[int, Tensor] = {}
        for group in range(len(self._members())):
            with self._resident(group) as (flat, state):
                whole = flat if kind in ("weight", "master") else state[kind]
                # The buffer it was read into is used again for the next partition.
                if self._on_disk(group):
                    whole = whole.clone()
            # Weights are always the master weights, rounded.
            whole = whole.to(self.dtype) if kind == "weight" else whole
            found |= {n: f.of(whole) for n, f in enumerate(self.fragments) if f.group == group}
        return found

    def _gradient_of(self, fragment: Fragment) -> Tensor:
        """Return the reduced gradient of a fragment, flat."""
        parameter: Any = fragment.parameter
        size = fragment.high - fragment.low
        if self.zero_stage == 3:
            return self.zero.get_local_fp32_grad_for_param(parameter)[:size].clone()
        if size == 0:
            return torch.empty(0)
        grad = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        # Stage 1 in bf16 holds the whole gradient.
        return grad[fragment.low : fragment.high] if grad.numel() == parameter.numel() else grad


def _always() -> bool:
    return True


def _collect(
    share: Tensor, spans: Sequence[tuple[int, int]], axis: Axis, owner: int
) -> Tensor | None:
    """Return on rank `owner` the flat tensor of which every rank holds a `share`, the elements that
    `spans` says; None on the others."""
    if axis.rank != owner:
        # Shares differ in length and may be empty: messages instead of a gather, which wants equal
        # ones.
        messages = (
            [dist.P2POp(dist.isend, share, group=axis.group, group_peer=owner)]
            if share.numel()
            else []
        )
        local = None
    else:
        local = share.new_empty(max(high for _, high in spans))
        messages = []
        for rank, (low, high) in enumerate(spans):
            if rank == owner:
                local[low:high] = share
            elif low < high:
                messages.append(
                    dist.P2POp(dist.irecv, local[low:high], group=axis.group, group_peer=rank)
                )
    for work in dist.batch_isend_irecv(messages) if messages else ():
        work.wait()
    return local


class Groups:
    """Tell DeepSpeed who shares what with whom, under the names of Megatron's `mpu` that it asks
    by."""

    def __init__(self, replicas: Axis, tensor: Axis):
        self.replicas, self.tensor = replicas, tensor

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.replicas.group

    def get_data_parallel_world_size(self) -> int:
        return self.replicas.size

    def get_data_parallel_rank(self) -> int:
        return self.replicas.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.tensor.group

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1


def _with_group(axis: Axis) -> Axis:
    """Return the axis with a process group, made for a single rank too: to DeepSpeed, no group
    means all ranks."""
    if axis.size > 1:
        return axis
    return replace(axis, group=dist.new_group([dist.get_rank()], use_local_synchronization=True))


def _make_optimizer(
    config: AdamWConfig, weights: Sequence[Weight], parameters: Mapping[str, nn.Parameter]
) -> torch.optim.Optimizer:
    """Return torch's AdamW with a group of weights that decay, and one of those that do not."""
    groups = [
        {
            "params": [parameters[w.name] for w in weights if w.decay],
            "weight_decay": config.weight_decay,
        },
        {"params": [parameters[w.name] for w in weights if not w.decay], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _import_deepspeed(mesh: Mesh) -> Any:
    """Import the package, told by its environment variables where it runs, and quiet except for
    warnings. Raises ConfigError where it is missing or too old."""
    kind = mesh.device.type
    os.environ.setdefault("DS_ACCELERATOR", kind)  # else it would say that it found no GPU
    if mesh.device.index is not None:
        # DeepSpeed takes it for the number of the GPU.
        os.environ["LOCAL_RANK"] = str(mesh.device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    if kind == "cpu":
        # Else it would run a program to count NUMA nodes, for every bucket.
        os.environ.setdefault("LOCAL_SIZE", "1")
    try:
        import deepspeed
        from packaging.version import Version
    except ImportError as error:
        raise ConfigError(
            f"parallel.engine: deepspeed cannot be used: {error}; install it with `pip install 'megalite[deepspeed]'`, "
            "or use engine: native"
        ) from None
    if Version(deepspeed.__version__) < Version(OLDEST):
        raise ConfigError(
            f"parallel.engine: deepspeed needs DeepSpeed {OLDEST} or newer, not {deepspeed.__version__}: "
            "older ones reduce gradients wrongly"
        )
    if mesh.world.rank > 0:  # it would repeat the warnings of rank 0
        deepspeed.logger.setLevel("ERROR")
    # It calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Saves half a minute of compiling for an all-reduce that only inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():  # a lone process
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return deepspeed


def _check_nvme() -> None:
    """Build DeepSpeed's operator for the disk: minutes, once on each machine. Raises ConfigError
    where that fails."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "parallel.offload to nvme needs libaio with its headers, which were not found; install them on every node "
            "(`apt install libaio-dev`, `dnf install libaio-devel`), or use cpu"
        )
    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:
        raise ConfigError(
            f"parallel.offload to nvme: DeepSpeed could not build its async_io operator, which needs a C++ compiler "
            f"and ninja on every node: {error}"
        ) from error
