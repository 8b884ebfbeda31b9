"""The plan of a run: mesh, stages, batch arithmetic and sizes that follow from a config and a
number of ranks.

It is pure arithmetic, and so runs on a laptop for any cluster. Step time and activation memory are
in `planner/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

from megalite import make_callable
from megalite.config import Config, OptimizerConfig, ParallelConfig
from megalite.errors import ConfigError

make_callable(__name__)  # as `plan`, below

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
        folded = f"expert {expert} × expert tensor {tensor}, on {self.replicas_of(self.experts)} replicas"
        lines = [
            ("ranks", f"{self.world_size} = {product}"),
            *([("experts", folded)] if self.folds_experts else []),
            (
                "sequence parallel",
                f"{'on' if self.sequence else 'off'}{', overlapped' if self.tensor_overlap else ''}",
            ),
            *([("context parallel", self.context_method)] if self.context > 1 else []),
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


def expert_cut(parallel: ParallelConfig) -> Cut:
    """Return how experts are cut."""
    return Cut(parallel.expert_tensor or parallel.tensor, parallel.expert)


def plan(config: Config, ranks: int) -> Plan:
    """Return the plan of `config` on `ranks` ranks: mesh, stages, batch arithmetic and memory.

    Raise ConfigError with the setting to change if the layout does not fit the ranks, the model or
    the batch."""
    # Imports torch, which the arithmetic of a plan does without.
    from megalite.models import weight_table

    return make_plan(config, weight_table(config.model, config.lora), ranks)


def make_plan(config: Config, weights: Sequence[Sized], world_size: int) -> Plan:
    """Return the plan of `config` for a table of `weights` on `world_size` ranks. Raise ConfigError
    with the setting to change if the layout does not fit the ranks, the model or the batch."""
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
    _check_engine(config)
    for size, _ in train.batch_sizes:
        _check_schedule(parallel, size // (micro_batch_size * data))
    _check_sequence(config, sequence)
    _check_compile(config)
    _check_model(config)
    _check_experts(config, weights, sequence)
    _check_qk_clip(config)
    _check_predictors(config)
    _check_noise_scale(config, data, micro_batches)
    # After all checks that need no stages, so that the first mistake reported is the simplest.
    stages = _stages(config, weights)
    _check_lora(config, stages)
    _check_fp8(config, weights)
    _check_overlap(config)
    fullest = _fullest_rank(config, weights, stages, world_size // pipeline)
    return Plan(
        world_size=world_size,
        pipeline=pipeline,
        data=data,
        context=context,
        context_method=parallel.context_method,
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


class Held(NamedTuple):
    """Numbers of elements that a rank holds of weights with the same number of replicas."""

    params: int
    trained: int
    """Of these, not frozen."""
    states: float
    """Of the optimizer's states beside the trained ones, by what they would be in fp32."""
    replicas: int
    """Ranks that share what the ZeRO stage shards."""
    quantised: int = 0
    """Of the elements of weights, those that are held in few bits."""
    quantised_bytes: int = 0


def _fullest_rank(
    config: Config, weights: Sequence[Sized], stages: Sequence[StageSpan], ranks: int
) -> tuple[Held, ...]:
    """Return what the rank holds that holds most, which decides whether a layout fits: of dense
    weights, and of experts. A pipeline stage has so many `ranks`. Raise ConfigError where a weight
    cannot be cut."""
    pipeline, experts = config.parallel.pipeline, expert_cut(config.parallel)
    dense = Cut(config.parallel.tensor)
    local: dict[str, int] = {}
    quantised: dict[str, int] = {}
    for weight in weights:
        cut = experts if weight.is_expert else dense
        try:
            local[weight.name] = prod(weight.local_shape(*cut))
            quantised[weight.name] = weight.quantised_bytes(*cut)
        except ValueError as error:
            names = (
                {"expert": "expert", "tensor": "expert_tensor"}
                if cut != dense
                else {"tensor": "tensor"}
            )
            asked = ", ".join(
                f"parallel.{name} = {getattr(cut, axis)}" for axis, name in names.items()
            )
            raise ConfigError(f"{asked}: {error}") from None
    kept = {
        weight.name: local[weight.name] * weight.num_states(config.optimizer) for weight in weights
    }
    per_rank = []
    for rank in range(pipeline):
        rows = [weight for stage in stages[rank::pipeline] for weight in stage.weights(weights)]
        # Apart for dense weights and experts: a ZeRO stage shards each over other numbers of ranks.
        held = []
        for cut in dict.fromkeys((dense, experts)):
            own = [weight for weight in rows if (experts if weight.is_expert else dense) == cut]
            trained = [weight.name for weight in own if not weight.frozen]
            held.append(
                Held(
                    sum(local[weight.name] for weight in own),
                    sum(local[name] for name in trained),
                    sum(kept[name] for name in trained),
                    ranks // cut.holders,
                    sum(local[weight.name] for weight in own if quantised[weight.name]),
                    sum(quantised[weight.name] for weight in own),
                )
            )
        per_rank.append(tuple(held))
    # By parameters first; a list compares trained ones and states only between equals.
    return max(per_rank, key=lambda held: [sum(numbers) for numbers in zip(*held, strict=True)])


def nodes_that_fit(
    config: Config, weights: Sequence[Sized], nodes: int, ranks_per_node: int
) -> int:
    """Return how many of `nodes` nodes with `ranks_per_node` ranks each the layout can use: all, or
    with `parallel.elastic` as many as possible.

    Tensor, pipeline and context parallelism and the global batch stay as in `config`; `weights` is
    the model's table. Raise ConfigError if no number fits."""
    refused: dict[int, ConfigError] = {}
    for count in range(nodes, 0 if config.parallel.elastic else nodes - 1, -1):
        try:
            make_plan(config, weights, count * ranks_per_node)
        except ConfigError as error:
            refused[count] = error
        else:
            return count
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
    fitting = [
        fewer for fewer in range(1, size + 1) if all(whole % (fewer * data) == 0 for whole in sizes)
    ]
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


def _check_engine(config: Config) -> None:
    """Raise ConfigError for what an engine cannot do: `native` lacks stage 3 and offload,
    `deepspeed` lacks pipelines."""
    parallel = config.parallel
    offload = {name: where for name, where in parallel.offload if where in ("cpu", "nvme")}
    if parallel.engine == "native":
        if parallel.zero_stage == 3:
            raise ConfigError(
                "parallel.zero_stage = 3 needs parallel.engine: deepspeed; the native engine has stages 0, 1 and 2"
            )
        if offload:
            name = next(iter(offload))
            raise ConfigError(
                f"parallel.offload.{name} = {offload[name]!r} needs parallel.engine: deepspeed"
            )
        return
    for key, value in (
        ("optimizer.ema", config.optimizer.ema), ("optimizer.groups", config.optimizer.groups),
        ("optimizer.qk_clip", config.optimizer.qk_clip), ("model.mup", config.model.mup),
        ("optimizer.state_dtype", config.optimizer.state_dtype != "fp32"),
        ("train.batch_ramp", config.train.batch_ramp), ("observe.layers_every", config.observe.layers_every),
        ("observe.noise_scale_every", config.observe.noise_scale_every),
        ("the selection bias of routers", config.model.bias_rate if config.lora is None else None),
    ):  # fmt: skip
        if value:
            raise ConfigError(
                f"{key} needs parallel.engine: native; deepspeed has no such thing here"
            )
    if config.optimizer.name != "adamw":
        raise ConfigError(
            f"optimizer.name = {config.optimizer.name!r} needs parallel.engine: native; deepspeed has adamw here"
        )
    if parallel.pipeline > 1:
        raise ConfigError(
            f"parallel.engine: deepspeed cannot run a pipeline (parallel.pipeline = {parallel.pipeline}): it reduces "
            "gradients by its own schedule of passes; use engine: native with zero_stage 0, 1 or 2, or pipeline: 1 "
            "with zero_stage: 3, which also spreads the weights"
        )
    if parallel.zero_stage == 0:
        raise ConfigError(
            "parallel.zero_stage = 0 needs parallel.engine: native; deepspeed has stages 1, 2 and 3 here"
        )
    if "parameters" in offload and parallel.zero_stage != 3:
        raise ConfigError(
            f"parallel.offload.parameters = {offload['parameters']!r} needs parallel.zero_stage: 3, "
            f"not {parallel.zero_stage}"
        )
    if offload.get("optimizer") == "nvme" and parallel.zero_stage != 3:
        raise ConfigError(
            f"parallel.offload.optimizer = 'nvme' needs parallel.zero_stage: 3, not {parallel.zero_stage}; "
            "'cpu' works with every stage"
        )


def _check_schedule(parallel: ParallelConfig, micro_batches: int) -> None:
    """Raise ConfigError for a pipeline schedule that does not fit `virtual` or the number of
    micro-batches."""
    pipeline, virtual, schedule = parallel.pipeline, parallel.virtual, parallel.schedule
    if pipeline == 1:
        if virtual > 1:
            raise ConfigError(f"parallel.virtual = {virtual} needs parallel.pipeline above 1")
        return
    if schedule == "1f1b" and virtual > 1:
        raise ConfigError(
            f"parallel.virtual = {virtual} needs parallel.schedule: interleaved or zero_bubble; "
            "1f1b has one stage a rank"
        )
    if schedule == "interleaved" and virtual == 1:
        raise ConfigError("parallel.schedule: interleaved needs parallel.virtual of at least 2")
    if schedule == "1f1b" and micro_batches < pipeline:
        raise ConfigError(
            f"a step has {micro_batches} micro-batch(es) a rank, fewer than parallel.pipeline = {pipeline}: most of "
            "the pipeline would idle; raise train.global_batch_size or lower train.micro_batch_size"
        )
    # As torch's interleaved schedules compute it; they refuse what does not divide.
    rounds = max(1, micro_batches // pipeline)
    if schedule != "1f1b" and micro_batches % rounds:
        raise ConfigError(
            f"parallel.schedule: {schedule} takes the {micro_batches} micro-batches of a step in {rounds} equal "
            f"rounds; make them a multiple of parallel.pipeline = {pipeline} by train.global_batch_size or "
            "train.micro_batch_size"
        )


def _check_sequence(config: Config, sequence: bool) -> None:
    """Raise ConfigError for a length of sequences that does not divide."""
    for length in config.data.seq_lengths:
        key = (
            "data.seq_length"
            if length == config.data.seq_length
            else "data.seq_length_warmup: seq_length"
        )
        _check_length(key, length, config, sequence)
    if config.lengths.source:
        _check_length("the decoder's length", config.lengths.target, config, sequence)


def _check_length(key: str, length: int, config: Config, sequence: bool) -> None:
    """Raise ConfigError where sequences of `length`, which `key` gives, do not divide."""
    tensor, context = config.parallel.tensor, config.parallel.context
    if context > 1 and length % (2 * context):
        raise ConfigError(
            f"{key} = {length} must be a multiple of 2 × parallel.context = {2 * context}: each rank takes "
            "one piece from the front and one from the back"
        )
    if sequence and (length // context) % tensor:
        by = (
            f"parallel.tensor = {tensor}"
            if context == 1
            else f"parallel.context × tensor = {context} × {tensor}"
        )
        raise ConfigError(
            f"{key} = {length} must be a multiple of {by} for parallel.sequence: true"
        )


def _check_model(config: Config) -> None:
    """Raise ConfigError for properties of a model that a setting cannot be combined with."""
    architecture, context = config.model.architecture, config.parallel.context
    if architecture.num_streams > 1:
        _check_stacks(config)
    for mixer in architecture.attentions if context > 1 else ():
        if mixer.dropout:
            raise ConfigError(
                f"model.attention_dropout = {mixer.dropout} needs parallel.context: 1; "
                "attention over several ranks knows no dropout"
            )
        if mixer.softcap is not None and config.parallel.context_method == "ring":
            raise ConfigError(
                f"model.attention_softcap = {mixer.softcap} needs parallel.context: 1, not {context}, or "
                "context_method: ulysses; the attention that travels a ring cannot bend its scores"
            )
        ranks = config.parallel.tensor * context
        if config.parallel.context_method == "ulysses" and (
            mixer.num_heads % ranks or mixer.num_kv_heads % ranks
        ):
            raise ConfigError(
                f"parallel.context_method: ulysses gives each of tensor × context = {config.parallel.tensor} × "
                f"{context} ranks whole heads, but the model has {mixer.num_heads} of them and {mixer.num_kv_heads} "
                "key/value heads, which do not divide; use ring"
            )
    if context > 1 and len(architecture.attentions) < len(architecture.layers):
        raise ConfigError(
            f"model.family = {config.model.family!r} needs parallel.context: 1, not {context}: not all of its layers "
            "are attention, which alone travels a ring"
        )
    cap, chunk = architecture.logit_softcap, config.train.loss_chunk
    if cap is not None and chunk is not None:
        raise ConfigError(
            f"model.logit_softcap = {cap} needs train.loss_chunk: null, not {chunk}; the loss in chunks takes the "
            "head's logits as they are"
        )


def _check_stacks(config: Config) -> None:
    """Raise ConfigError for settings that a model of several stacks cannot be combined with."""
    parallel = config.parallel
    for key, value, only in (
        ("parallel.context", parallel.context, 1), ("parallel.engine", parallel.engine, "native"),
        ("optimizer.qk_clip", config.optimizer.qk_clip, None), ("observe.layers_every", config.observe.layers_every, 0),
        ("lora", config.lora, None), ("data.seq_length_warmup", config.data.seq_length_warmup, ()),
    ):  # fmt: skip
        if value != only:
            needs = f"{key}: {'null' if only is None else only}" if only != () else f"no {key}"
            raise ConfigError(
                f"model.family = {config.model.family!r}, of two stacks, needs {needs}"
            )


def _check_experts(config: Config, weights: Sequence[Sized], sequence: bool) -> None:
    """Raise ConfigError for settings that cannot be combined with ranks of their own for
    experts."""
    parallel, cut = config.parallel, expert_cut(config.parallel)
    if cut == Cut(parallel.tensor):
        return
    key = (
        f"parallel.expert = {cut.expert}"
        if cut.expert > 1
        else f"parallel.expert_tensor = {cut.tensor}"
    )
    if not any(weight.is_expert for weight in weights):
        raise ConfigError(
            f"{key} needs a model with experts; model.family = {config.model.family!r} has none"
        )
    if parallel.engine != "native":
        raise ConfigError(f"{key} needs parallel.engine: native, not {parallel.engine}")
    if cut.tensor != parallel.tensor and parallel.tensor > 1 and not sequence:
        raise ConfigError(
            f"{key} with parallel.expert_tensor = {cut.tensor} beside parallel.tensor = {parallel.tensor} needs "
            "parallel.sequence: true: without it tensor ranks hold the same tokens, and would send each twice"
        )


def _check_qk_clip(config: Config) -> None:
    """Raise ConfigError where scaling the projections of queries and keys cannot bound the
    attention logits."""
    if config.optimizer.qk_clip is None:
        return
    from megalite.models.architecture import LatentSpec  # here: models import this module

    architecture = config.model.architecture
    if any(isinstance(mixer, LatentSpec) for mixer in architecture.attentions):
        raise ConfigError(
            f"optimizer.qk_clip must be null for model.family = {config.model.family!r}: queries and keys come from "
            "latents, whose projections it does not know"
        )
    if any(mixer.head_norms for mixer in architecture.attentions):
        raise ConfigError(
            f"optimizer.qk_clip must be null for model.family = {config.model.family!r}: it normalizes queries and "
            "keys, so that scaling their projections changes no attention logit"
        )
    if config.lora is not None:
        raise ConfigError(
            "optimizer.qk_clip must be null with lora, which keeps the projections as they are"
        )


def _check_predictors(config: Config) -> None:
    """Raise ConfigError where a model's predictors of further tokens could not be trained."""
    if not config.model.architecture.predictors:
        return
    count, unless = len(config.model.architecture.predictors), "; 0 leaves the predictors out"
    key = f"model.num_nextn_predict_layers = {count}"
    if config.objective.name != "next_token":
        raise ConfigError(
            f"{key} needs objective.name: next_token, not {config.objective.name}{unless}"
        )
    if config.lora is not None:
        raise ConfigError(f"{key} needs lora: null, which leaves them as they are{unless}")


def _check_noise_scale(config: Config, data: int, micro_batches: int) -> None:
    """Raise ConfigError where a step has no gradients of smaller batches, on `data` data ranks."""
    every, parallel = config.observe.noise_scale_every, config.parallel
    if every and parallel.context > 1:
        raise ConfigError(
            f"observe.noise_scale_every = {every} needs parallel.context: 1, not {parallel.context}: it compares "
            "gradients of whole sequences"
        )
    if every and data * (micro_batches if parallel.zero_stage == 2 else 1) == 1:
        raise ConfigError(
            f"observe.noise_scale_every = {every} needs several data ranks, or several micro-batches with "
            "parallel.zero_stage: 2: it compares the step's gradient with those of smaller batches"
        )


def _check_lora(config: Config, stages: Sequence[StageSpan]) -> None:
    """Raise ConfigError for settings that cannot be combined with lora."""
    if config.lora is None:
        return
    if any(stage.start == stage.stop for stage in stages):
        raise ConfigError(
            f"parallel.stage_layers = {list(config.parallel.stage_layers or ())}: with lora every stage needs a layer, "
            "or there is nothing in it to train"
        )
    if config.lora.dropout and (config.train.recompute == "selective" or config.train.compile):
        raise ConfigError(
            f"lora.dropout = {config.lora.dropout} needs train.recompute: none or full, and train.compile: false: what "
            "is computed again, or compiled, must be a whole layer that knows whose tokens it is about"
        )
    kind = config.lora.quantize_base
    for name, value, only in (
        ("parallel.engine", config.parallel.engine, "native"), ("train.compile", config.train.compile, False),
    ):  # fmt: skip
        if kind and value != only:
            raise ConfigError(
                f"lora.quantize_base = {kind!r} needs {name}: {str(only).lower()}, not {str(value).lower()}"
            )
    if config.parallel.offload.parameters == "nvme":
        raise ConfigError(
            "parallel.offload.parameters = 'nvme' cannot hold the frozen weights of lora; use 'cpu', or 'none'"
        )


def _check_overlap(config: Config) -> None:
    """Raise ConfigError for what stands between a product and its collective, so that they cannot
    overlap."""
    for name, given, what in (
        ("lora", config.lora, "whose adapters are computed"),
        ("train.fp8", config.train.fp8, "whose operands are rounded"),
    ):
        if config.parallel.tensor_overlap and given is not None:
            raise ConfigError(
                f"parallel.tensor_overlap: true is for training without {name}, {what} between a product and its "
                "collective"
            )


def _check_fp8(config: Config, weights: Sequence[Sized]) -> None:
    """Raise ConfigError where the layout does not fit `train.fp8`."""
    if config.train.fp8 is None:
        return
    from megalite.models.fp8 import check_fp8  # here: models import this module

    check_fp8(config, cast(Sequence[Any], weights))


def _check_compile(config: Config) -> None:
    """Raise ConfigError for settings that cannot be combined with train.compile."""
    parallel = config.parallel
    for name, value, only in (
        ("tensor", parallel.tensor, 1), ("context", parallel.context, 1), ("expert", parallel.expert, 1),
        ("expert_tensor", parallel.expert_tensor or 1, 1), ("engine", parallel.engine, "native"),
    ):  # fmt: skip
        if config.train.compile and value != only:
            raise ConfigError(
                f"train.compile needs parallel.{name}: {only}, not {value}: a compiled layer cannot communicate"
            )
    if config.train.compile and parallel.pipeline > 1 and parallel.schedule == "zero_bubble":
        raise ConfigError(
            "train.compile cannot put weight gradients off, as parallel.schedule: zero_bubble does; use 1f1b or "
            "interleaved"
        )


def _stages(config: Config, weights: Sequence[Sized]) -> tuple[StageSpan, ...]:
    """Return the stages of the pipeline, balanced unless `parallel.stage_layers` gives their
    layers. Raise ConfigError."""
    parallel, num_layers = config.parallel, config.model.num_layers
    num_stages = parallel.pipeline * parallel.virtual
    if parallel.stage_layers is not None:
        counts = list(parallel.stage_layers)
        if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 0:
            raise ConfigError(
                f"parallel.stage_layers = {counts} must be {num_stages} counts (pipeline × virtual) that add up to the "
                f"model's {num_layers} layers"
            )
    elif num_layers < num_stages:
        raise ConfigError(
            f"parallel.pipeline × virtual = {num_stages} stages are more than the model's {num_layers} layers"
        )
    else:
        counts = balance(num_layers, num_stages, _head_cost(config, weights))
    starts = [sum(counts[:index]) for index in range(num_stages)]
    predictors, end = len(config.model.architecture.predictors), num_stages - 1
    return tuple(
        StageSpan(
            index, start, start + count, index == 0, index == end, predictors * (index == end)
        )
        for index, (start, count) in enumerate(zip(starts, counts, strict=True))
    )


def balance(num_layers: int, num_stages: int, head_cost: float) -> list[int]:
    """Return the number of layers of each of `num_stages` stages, at least one each, such that the
    slowest stage is as fast as possible.

    `head_cost` is the output head's time in units of a layer; the embedding, a look-up, counts as
    none. Of equally good stages the later one gets a layer, since a 1F1B schedule holds fewer
    activations there."""
    # Each has one layer; the others go one by one to the stage that is quickest so far.
    cost = [1.0] * (num_stages - 1) + [1.0 + head_cost]
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        stage = min(reversed(range(num_stages)), key=cost.__getitem__)
        counts[stage] += 1
        cost[stage] += 1.0
    return counts


def _head_cost(config: Config, weights: Sequence[Sized]) -> float:
    """Return the multiplications of the output head in units of an average layer's, with attention
    over half the sequence included. Predictors of further tokens are a layer and a head each."""
    model, predictors = config.model, len(config.model.architecture.predictors)
    # A matrix multiplies as often per token as it has parameters, so that sizes stand for time.
    layers = sum(
        weight.multiplied
        for weight in weights
        if isinstance(weight.place, int) and weight.place < model.num_layers
    )
    attention = (
        sum(layer.mixer.products(config.data.seq_length) for layer in model.architecture.layers) / 2
    )
    head = model.vocab_size * model.hidden_size / ((layers + attention) / model.num_layers)
    return (1 + predictors) * head + predictors


def resident_bytes(config: Config, held: Sequence[Held], zero_stage: int) -> dict[str, int]:
    """Return the bytes that a rank holds through the whole step: weights, fp32 gradients and
    optimizer state, of all that is `held`."""
    is_bf16 = config.train.precision == "bf16"
    weights = gradients = in_few_bits = 0
    optimizer = 0.0
    for params, trained, states, replicas, quantised, quantised_bytes in held:
        whole = params - quantised
        weights += -(-whole // replicas) if zero_stage == 3 else whole
        in_few_bits += quantised_bytes
        gradients += -(-trained // replicas) if zero_stage >= 2 else trained
        # The optimizer's fp32 states, and an fp32 master copy; in fp32 the weights are their own.
        kept = states + trained * is_bf16
        optimizer += -(-kept // replicas) if zero_stage >= 1 else kept
    return {
        "weights": weights * (2 if is_bf16 else 4) + in_few_bits,
        "gradients": gradients * 4,
        "optimizer": round(optimizer * 4),
    }
