"""A rank's parts of the model, and the forward and backward passes through them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megalite.checkpoint.load import OpenModel, from_hf
from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Axis, Mesh
from megalite.config import Config
from megalite.data.dataset import Split
from megalite.data.loader import Batches, MicroBatch
from megalite.engine import Engine, make_engine
from megalite.kernels import library
from megalite.kernels.attention_on_gpus import note_documents
from megalite.kernels.linear import WeightGradStore
from megalite.models import build_model, weight_table
from megalite.models.context_cut import ContextCut, take
from megalite.models.layer_loss import LayerLoss, LayerLosses
from megalite.models.layers import SequenceInfo, Source
from megalite.parallel.apply import apply_parallelism
from megalite.parallel.context import part_of_source
from megalite.parallel.outputs import LastStage
from megalite.parallel.rules import vocab_size_of
from megalite.parallel.stage import Inputs, Output, Stage, lengths_of, positions_of
from megalite.plan import Plan
from megalite.runtime.activity import NOW
from megalite.training.frozen import FrozenModel, load_frozen
from megalite.training.hidden import METRIC, HiddenMatch
from megalite.training.objectives import Objective
from megalite.utils.counter_random import random_bits
from megalite.utils.keys import key_of

if TYPE_CHECKING:
    from megalite.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class RankModel:
    """What a rank trains: its stages of the model, their engine, and the pipeline that connects
    them to other ranks'."""

    stages: tuple[Stage, ...]
    engine: Engine
    pipeline: Pipeline | None
    dtype: torch.dtype
    objective: Objective
    last_stage: LastStage
    """The last of `stages`; asked only on ranks that have the pipeline's last."""
    needs: Output
    """What the objective needs of the last stage in training."""
    frozen: FrozenModel | None
    """The frozen model that the objective compares with."""
    layer_losses: LayerLosses
    """What layers add to the objective."""
    by_documents: bool
    """Whether context ranks share each document, not the sequence."""
    matches: tuple[HiddenMatch, ...] = ()
    """Pairs of a layer with one of the frozen model, whose outputs are compared."""

    def train(self, mode: bool = True) -> None:
        """Put all stages into training mode, or into evaluation mode."""
        for stage in self.stages:
            stage.train(mode)


def build(config: Config, plan: Plan, mesh: Mesh, open_model: OpenModel = from_hf) -> RankModel:
    """Build this rank's part of the model, with its weights still zero; `open_model` opens the
    frozen model beside it, where the objective has one. Chooses the process's kernels."""
    library.use(config.kernels, config.train.deterministic)
    table = weight_table(config.model, config.lora, config.train.fp8)
    spans = plan.stages_of(mesh.pipeline.rank)
    zero_bubble = plan.pipeline > 1 and plan.schedule == "zero_bubble"
    deferred = [WeightGradStore() if zero_bubble else None for _ in spans]
    stages, num_losses = [], Counter[str]()
    for span, later in zip(spans, deferred, strict=True):
        model = build_model(config.model, config.lora)
        # Before the model is cut to its stage: how many layers of the whole model have such a loss.
        num_losses = Counter(
            module.name for module in model.modules() if isinstance(module, LayerLoss)
        )
        apply_parallelism(model, table, plan, span, mesh, config.train, later)
        stages.append(Stage(model, span))
    # The engine comes after all parallelism: it sets hooks on modules that rules may have replaced.
    rows = plan.weights_of(mesh.pipeline.rank, table)
    matches = config.objective.match_layers(stages, plan, mesh)
    if matches:
        num_losses[METRIC] = len(matches)
    engine = make_engine(stages, rows, plan, mesh, config)
    return connected(config, plan, mesh, stages, engine, deferred, num_losses, matches, open_model)


def connected(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    stages: list[Stage],
    engine: Engine,
    deferred: list[WeightGradStore | None],
    num_losses: Counter[str],
    matches: tuple[HiddenMatch, ...] = (),
    open_model: OpenModel = from_hf,
) -> RankModel:
    """Return the parts of a rank that has `stages`, with what joins them to those of other ranks.
    `deferred` are the stores of the stages' weight gradients, `num_losses` how many layers of the
    whole model have a loss of each name, `matches` the pairs of layers that are compared;
    `open_model` opens the frozen model."""
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    num_rows = vocab_size_of(weight_table(config.model, config.lora))
    pipeline = None
    if plan.pipeline > 1:
        from megalite.parallel.pipeline import Pipeline  # torch's schedules import its compiler

        # What a stage hands to the next: cut over context ranks, and under sequence parallelism
        # over tensor ranks as well.
        length = config.lengths.target // plan.context // (plan.tensor if plan.sequence else 1)
        source = config.lengths.source // plan.context
        hidden = torch.empty(
            plan.micro_batch_size, length, config.model.hidden_size, dtype=dtype, device="meta"
        )
        pipeline = Pipeline(stages, plan, mesh, hidden, deferred, source)
    last_stage = LastStage(stages[-1].model, mesh.tensor, plan.sequence, num_rows)
    objective, folder = config.objective.build(config, mesh), config.objective.frozen_model(config)
    frozen = None if folder is None else load_frozen(folder, config, mesh, dtype, open_model)
    if frozen and matches:
        frozen.tap({match.pair.teacher for match in matches})
    here = [
        module for stage in stages for module in stage.modules() if isinstance(module, LayerLoss)
    ]
    losses = LayerLosses(here, num_losses)
    return RankModel(
        tuple(stages),
        engine,
        pipeline,
        dtype,
        objective,
        last_stage,
        config.objective.NEEDS,
        frozen,
        losses,
        plan.context_balance == "documents",
        matches,
    )


def forward_backward(
    parts: RankModel, batch: list[MicroBatch], mesh: Mesh, seed: int
) -> dict[str, Tensor]:
    """Run all of this rank's micro-batches of one global batch, and leave their gradients in the
    engine.

    Every token (or pair of answers) of the global batch weighs the same, however they are spread
    over ranks and micro-batches. `seed` gives dropout its keys. Returns the mean loss of the global
    batch, the objective's metrics and the means of layers' own losses: NaN where nothing of the
    `batch` has a label, in which case the gradient is exactly 0."""
    objective, layers = parts.objective, parts.layer_losses
    inputs = []
    for micro in batch:
        given = make_inputs(micro, mesh, seed, parts.needs, parts.by_documents)
        inputs.append(objective.complete(given, micro, "train"))
    inputs = parts.frozen.beside(inputs) if parts.frozen else inputs
    parts.train()
    inputs = objective.look_ahead(_outputs(parts, inputs, parts.needs), inputs)
    # Known before the first backward pass: each micro-batch's loss is divided by the count of the
    # whole global batch.
    counts = torch.stack([micro.count_B.sum() for micro in inputs])
    num_labels = all_reduce(counts.sum(), mesh.replicas)
    count = num_labels.clamp(min=1)
    found = torch.zeros(1 + len(objective.metrics), device=mesh.device)

    def loss_of(out: Tensor, micro: Inputs) -> Tensor:
        output = parts.last_stage.read(out, parts.needs)
        loss_B, metrics_BM = objective.measure(output, micro)
        # A sum over this micro-batch, divided by the labels of the whole global batch:
        # micro-batches and replicas then add up to the mean. Means of micro-batches would weigh
        # rare labels more.
        loss = loss_B.sum() / count
        metrics_M = metrics_BM.sum(0) / count
        found.add_(torch.cat((loss.detach()[None], metrics_M)))
        return loss

    # Context, tensor and pipeline ranks share rows; only data ranks have others.
    num_rows = sum(len(micro.tokens) for micro in batch) * mesh.data.size
    num_tokens = num_rows * batch[0].tokens.shape[1]
    # 0 where nothing has a label: layers' own losses have no gradient then, either.
    scale = parts.engine.loss_scale * (num_labels > 0).float()
    for each in layers.here:
        each.begin(num_tokens, num_rows, scale)
    for match in parts.matches:
        match.count = count
    if parts.pipeline:
        parts.pipeline.forward_backward(inputs, loss_of, parts.engine)
    else:
        _one_after_another(parts, inputs, loss_of)
    # Tensor ranks have computed the same: one of them counts. All ranks act on the result, and so
    # need the same bits. Losses are on last stages only, a part on each replica: the sum over the
    # world is the mean.
    found = found if mesh.tensor.rank == 0 else torch.zeros_like(found)
    found = all_reduce(
        torch.cat((found, layers.means(mesh.device))) if layers.names else found, mesh.world
    )
    # A mean of nothing is not 0, the best loss there is.
    found = torch.where(num_labels > 0, found, torch.nan)
    return dict(zip(("loss", *objective.metrics, *layers.names), found.unbind(), strict=True))


def _one_after_another(
    parts: RankModel, inputs: list[Inputs], loss_of: Callable[[Tensor, Inputs], Tensor]
) -> None:
    """Run both passes of each micro-batch on a rank that has all layers."""
    (stage,) = parts.stages
    parts.engine.begin(len(inputs))
    for number, micro in enumerate(inputs):
        NOW.do("forward", number)
        for match in parts.matches:
            match.micro = micro
        loss = loss_of(stage(None, micro), micro)
        NOW.do("backward", number)
        parts.engine.backward(loss)
    NOW.do("summing gradients")
    parts.engine.finish()


@torch.no_grad()
def forward(
    parts: RankModel,
    batch: list[MicroBatch],
    mesh: Mesh,
    output: Output = "losses",
    split: Split | None = None,
) -> Iterator[tuple[Any, Inputs, MicroBatch]]:
    """Yield for each micro-batch its losses [B,T], or another `output` of the last stage, with its
    inputs and the micro-batch itself; nothing before the last stage. With `split`, inputs are
    completed for the objective."""
    inputs = [
        make_inputs(micro, mesh, output=output, by_documents=parts.by_documents) for micro in batch
    ]
    if split:
        pairs = zip(inputs, batch, strict=True)
        inputs = [parts.objective.complete(some, micro, split) for some, micro in pairs]
    inputs = parts.frozen.beside(inputs) if parts.frozen else inputs
    if split:
        inputs = parts.objective.look_ahead(_outputs(parts, inputs, output), inputs)
    yield from zip(_outputs(parts, inputs, output), inputs, batch, strict=False)


@torch.no_grad()
def _outputs(parts: RankModel, inputs: list[Inputs], output: Output) -> Iterator[Any]:
    """Yield what the last stage returns of each micro-batch, without a gradient; nothing before the
    last stage."""
    if parts.pipeline:
        found: Iterable[Any] = parts.pipeline.forward(inputs)
    else:
        NOW.do("forward")
        found = (parts.stages[0](None, micro) for micro in inputs)
    for out in found:
        yield parts.last_stage.read(out, output)


def make_inputs(
    micro: MicroBatch,
    mesh: Mesh,
    seed: int | None = None,
    output: Output = "losses",
    by_documents: bool = False,
) -> Inputs:
    """Return a micro-batch on the device, cut to this rank's part of the sequence. `seed` gives
    dropout its keys, None: no dropout; `output` is what is asked of the last stage; `by_documents`
    cuts each document over context ranks, not the sequence."""
    context, on_host = mesh.context, micro.documents
    length = micro.tokens.shape[1]
    # Which tokens of the whole sequence this rank has, [B or 1,T]. Everything below is cut by it.
    if context.size > 1:
        cut = ContextCut.of(length, context.size, on_host, by_documents, mesh.device)
        index = cut.device_RBT[context.rank]
    else:
        cut = None
        index = torch.arange(length, device=mesh.device)[None]
    micro = micro.to(mesh.device)
    position, document, whole_document = index, None, None
    whole: int | Tensor = length
    if micro.documents is not None:
        # From the whole documents, and cut afterwards: a part does not know where its documents
        # began.
        position = take(positions_of(micro.documents), index)
        document = take(micro.documents, index)
        # A document gives the same beside others as alone, even with RoPE that is scaled by the
        # length.
        lengths_BT = lengths_of(micro.documents)[..., 0]
        whole = take(lengths_BT, index)[..., None]
        whole_document = micro.documents if context.size > 1 else None
        if on_host is not None:
            note_documents(document if context.size == 1 else micro.documents, on_host)
    keys = None
    if seed is not None:
        keys = random_bits(key_of(seed, "dropout"), micro.samples)
    types = None if micro.types is None else take(micro.types, index)
    source = None if micro.source is None else _source_of(micro, micro.source, keys, context)
    places = SequenceInfo(
        index, position, document, keys, whole, whole_document, types, cut, source
    )
    return Inputs(take(micro.tokens, index), places, take(micro.labels, index), output)


def _source_of(micro: MicroBatch, tokens_BS: Tensor, keys: Tensor | None, context: Axis) -> Source:
    """Return what an encoder reads of a micro-batch on the device, with the dropout `keys` of its
    samples: this rank's part of it on the axis `context`."""
    document = micro.source_documents
    index = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
    position = index if document is None else positions_of(document)
    return part_of_source(Source(tokens_BS, SequenceInfo(index, position, document, keys)), context)


@torch.no_grad()
def validate(
    parts: RankModel, loader: Batches, batches: int, split: Split, mesh: Mesh
) -> dict[str, float]:
    """Return the mean loss over the loader's next `batches` global batches; with several sources
    also that of each, and what else the objective reports. All of it is NaN where nothing of these
    batches has a label. `split` is the one that `loader` reads."""
    mixture, objective = loader.mixture, parts.objective
    # For each source: the sum of the losses, what it is divided by, and what else is judged.
    sums = torch.zeros(
        len(mixture.names), 2 + objective.num_judged, dtype=torch.float64, device=mesh.device
    )
    parts.train(False)
    for _ in range(batches):
        for out, micro, read in forward(parts, next(loader), mesh, objective.judges, split):
            # Which source each row comes from follows from its number in the run: nothing is sent
            # along.
            source, _ = mixture.order.locate(read.samples.numpy())
            source_B = torch.from_numpy(source).to(mesh.device)
            loss_B, judged = objective.judge(out, micro)
            found = torch.cat((loss_B[:, None], micro.count_B[:, None], judged), 1)
            # fp64: over millions of tokens fp32 sums would depend on how rows are spread.
            sums.index_add_(0, source_B, found.double())
    # Only last stages have losses; the others' sums are 0, so that a sum over the pipeline gives
    # every rank the result.
    of_source = all_reduce(all_reduce(sums, mesh.replicas), mesh.pipeline)
    losses, counts, judged = of_source[:, 0], of_source[:, 1], of_source[:, 2:]
    total, count = of_source[:, :2].sum(0).tolist()
    loss = total / count if count else math.nan
    record = {"loss": loss, **objective.summary(loss, count, judged.sum(0))}
    if not count:
        record = dict.fromkeys(record, math.nan)
    if len(mixture.names) > 1:
        means = (losses / counts).tolist()  # NaN where the batches have none of a source
        for name, mean in zip(mixture.names, means, strict=True):
            if math.isfinite(mean):
                record[f"loss/{name}"] = mean
    return record
