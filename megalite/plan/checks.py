"""What a layout cannot be combined with: each refusal names the setting to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalite.config import Config, ParallelConfig
from megalite.errors import ConfigError
from megalite.plan.layout import Cut, Sized, StageSpan, expert_cut
from megalite.utils.spelling import did_you_mean

if TYPE_CHECKING:
    from megalite.models.weights import Weight


def check_layout(
    config: Config, weights: Sequence[Sized], data: int, micro_batch_size: int, sequence: bool
) -> None:
    """Raise ConfigError for settings that do not go together on `data` data ranks, each of which
    takes `micro_batch_size` sequences at a time. `weights` is the model's table; `sequence` says
    whether sequence parallelism is on."""
    parallel, train = config.parallel, config.train
    # The engine first: what it cannot do at all comes before what does not divide.
    _check_engine(config)
    for size, _ in train.batch_sizes:
        _check_schedule(parallel, size // (micro_batch_size * data))
    _check_sequence(config, sequence)
    _check_compile(config)
    _check_model(config)
    _check_head(config, weights)
    _check_experts(config, weights, sequence)
    _check_qk_clip(config)
    _check_predictors(config)
    if why := config.objective.refuses(config):
        raise ConfigError(why)
    _check_noise_scale(config, data, train.global_batch_size // (micro_batch_size * data))


def check_stages(config: Config, weights: Sequence[Sized], stages: Sequence[StageSpan]) -> None:
    """Raise ConfigError for settings that do not go with the pipeline's `stages`, or with what
    their layers compute."""
    _check_lora(config, weights, stages)
    _check_overlap(config)


def check_products(config: Config, weights: Sequence[Weight]) -> None:
    """Raise ConfigError where the layout, or the model, does not fit what `train.fp8` and
    `train.fake_quantize` round. `weights` is the whole table."""
    # Here, as models import this module, and only where they are used, as they import torch.
    if config.train.fp8 is not None:
        from megalite.models.fp8 import check_fp8

        check_fp8(config, weights)
    if config.train.fake_quantize is not None:
        from megalite.models.fake_quantize import check_fake_quantize

        check_fake_quantize(config, weights)


def check_groups(config: Config, weights: Sequence[Weight]) -> None:
    """Raise ConfigError for an entry of `optimizer.groups` that is no trained weight's group, and so
    would do nothing. `weights` is the whole table, with adapters."""
    groups = config.optimizer.groups
    trained = [weight.hf for weight in weights if not (weight.frozen or weight.by_counts)]
    # The first that takes a weight is its group.
    used = {next((n for n, group in enumerate(groups) if group.takes(hf)), None) for hf in trained}
    for number, group in enumerate(groups):
        if number in used:
            continue
        if any(group.takes(hf) for hf in trained):
            raise ConfigError(
                f"optimizer.groups: match = {group.match!r} does nothing, since earlier groups take all that it "
                "matches; put it before them"
            )
        names = [name for hf in trained for name in hf]
        raise ConfigError(
            f"optimizer.groups: match = {group.match!r} is the name of no trained weight; "
            + did_you_mean(group.match, names, f"names are such as {names[-1]!r}")
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
    # Each rank waits for as many passes as there are ranks before it.
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
    _check_balance(config)
    for length in config.data.seq_lengths:
        key = (
            "data.seq_length"
            if length == config.data.seq_length
            else "data.seq_length_warmup: seq_length"
        )
        _check_length(key, length, config, sequence)
    if config.lengths.source:
        _check_length("the decoder's length", config.lengths.target, config, sequence)


def _check_balance(config: Config) -> None:
    """Raise ConfigError where `parallel.context_balance` asks for what cannot be."""
    if config.parallel.context_balance != "documents":
        return
    if not config.data.document_mask:
        raise ConfigError(
            "parallel.context_balance: documents needs data.document_mask: true, which keeps documents apart"
        )
    if config.parallel.context_method != "ring":
        raise ConfigError(
            "parallel.context_balance: documents is for context_method: ring; ulysses' ranks have equal work already, "
            "all tokens of some heads each"
        )
    if any(mixer.bias for mixer in config.model.architecture.attentions):
        raise ConfigError(
            "parallel.context_balance: documents does not go with a bias of the scores, which model.family = "
            f"{config.model.family!r} has; use sequence"
        )
    if config.train.fp8 is not None:
        raise ConfigError(
            "parallel.context_balance: documents does not go with train.fp8, whose blocks of tokens would be others "
            "than one process has; use sequence"
        )


def _check_length(key: str, length: int, config: Config, sequence: bool) -> None:
    """Raise ConfigError where sequences of `length`, which `key` gives, do not divide."""
    tensor, context = config.parallel.tensor, config.parallel.context
    if context > 1 and length % (2 * context):
        raise ConfigError(
            f"{key} = {length} must be a multiple of 2 × parallel.context = {2 * context}: each rank takes "
            "one piece from the front and one from the back"
        )
    # A tensor rank has an equal part of what its context rank has of a sequence.
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
        # Where scores have a bias, each rank gathers all keys, and writes out whole rows of scores.
        if mixer.bias and config.parallel.context_method == "ulysses":
            raise ConfigError(
                "parallel.context_method: ulysses has no bias of the scores, which model.family = "
                f"{config.model.family!r} has; use ring"
            )
        if mixer.dropout and not mixer.bias:
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
    # A chunk's loss multiplies with the head itself, and bends no logits.
    cap, chunk = architecture.logit_softcap, config.train.loss_chunk
    if cap is not None and chunk is not None:
        raise ConfigError(
            f"model.logit_softcap = {cap} needs train.loss_chunk: null, not {chunk}; the loss in chunks takes the "
            "head's logits as they are"
        )


def _check_head(config: Config, weights: Sequence[Sized]) -> None:
    """Raise ConfigError where the loss in chunks of tokens cannot stand for the model's head."""
    chunk = config.train.loss_chunk
    if chunk is not None and any(weight.name == "head.bias" for weight in weights):
        raise ConfigError(
            f"model.family = {config.model.family!r}, whose head has a bias, needs train.loss_chunk: null, "
            f"not {chunk}; the loss in chunks adds none"
        )


def _check_stacks(config: Config) -> None:
    """Raise ConfigError for settings that a model of several stacks cannot be combined with."""
    for key, value, only in (
        ("optimizer.qk_clip", config.optimizer.qk_clip, None), ("observe.layers_every", config.observe.layers_every, 0),
        ("data.seq_length_warmup", config.data.seq_length_warmup, ()),
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
    # With sequence parallelism each rank sends the tokens that it alone has.
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
    # In stage 2 each micro-batch is reduced by itself, and so is a smaller batch.
    if every and data * (micro_batches if parallel.zero_stage == 2 else 1) == 1:
        raise ConfigError(
            f"observe.noise_scale_every = {every} needs several data ranks, or several micro-batches with "
            "parallel.zero_stage: 2: it compares the step's gradient with those of smaller batches"
        )


def _check_lora(config: Config, weights: Sequence[Sized], stages: Sequence[StageSpan]) -> None:
    """Raise ConfigError for settings that cannot be combined with lora."""
    if config.lora is None:
        return
    # Embedding and head are frozen: without a layer nothing of a stage has a gradient.
    if any(stage.start == stage.stop for stage in stages):
        raise ConfigError(
            f"parallel.stage_layers = {list(config.parallel.stage_layers or ())}: with lora every stage needs a layer, "
            "or there is nothing in it to train"
        )
    for stage in stages:
        if all(weight.frozen for weight in stage.weights(weights)):
            raise ConfigError(
                f"lora.targets = {list(config.lora.targets)} adapt no module of layers {stage.start} to "
                f"{stage.stop - 1}, a stage of parallel.pipeline = {config.parallel.pipeline}, in which there is then "
                "nothing to train; name more modules, or use fewer stages"
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
        ("train.fake_quantize", config.train.fake_quantize, "whose operands are rounded"),
    ):
        # Pieces of a product are sent as they are done: nothing may come between the two.
        if config.parallel.tensor_overlap and given is not None:
            raise ConfigError(
                f"parallel.tensor_overlap: true is for training without {name}, {what} between a product and its "
                "collective"
            )


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
