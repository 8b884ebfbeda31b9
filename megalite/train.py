"""The training loop. Pretraining and finetuning on one process or on a thousand are this file, read from top to
bottom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite import last_words
from megalite.activity import NOW
from megalite.checkpoint.export import keep_source, write_extras
from megalite.checkpoint.load import from_checkpoint, from_hf, from_seed
from megalite.checkpoint.resume import find_checkpoint, read_train_state
from megalite.checkpoint.save import Saver
from megalite.checkpoint.tensors import NotSaved
from megalite.config import Config
from megalite.counter_random import random_bits
from megalite.data.checks import check_same_everywhere, check_vocabulary
from megalite.data.dataset import Split
from megalite.data.loader import Loader, MicroBatch, Span
from megalite.data.mixture import Mixture, build_mixtures
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.engine import Engine, ReadState, make_engine
from megalite.engine.layout import choose_owners, elements_of
from megalite.exit_codes import Exit
from megalite.health.guard import Ending, Guard
from megalite.health.stragglers import Stragglers
from megalite.health.watchdog import Watchdog
from megalite.host_memory import keep_freed_memory
from megalite.infer.in_training import TasksInTraining
from megalite.kernels import library
from megalite.keys import key_of
from megalite.mesh import Launch, Mesh, make_mesh
from megalite.models import build_model, weight_table
from megalite.models.layers import IGNORE, Places
from megalite.observe.profiler import Profiler
from megalite.observe.recorder import Recorder
from megalite.observe.steps import Record, StepLog
from megalite.observe.throughput import Meter, model_flops_per_token
from megalite.optim.schedule import learning_rate
from megalite.parallel.apply import apply_parallelism
from megalite.parallel.collectives import all_agree, all_reduce
from megalite.parallel.context import zigzag
from megalite.parallel.pipeline import Pipeline
from megalite.parallel.stage import Inputs, Stage, positions_of
from megalite.parallel.tensor import PutOff
from megalite.plan import Plan, make_plan
from megalite.stopping import StopRequests

Data = Mapping[Split, Mixture | None]


def train(config: Config) -> Exit:
    """Train as the config says, on the ranks this process was started among. Resumes by itself. Returns DONE;
    STOPPED after a signal, BAD_NUMBERS or CORRUPTED for what `health` looks after.

    Raises ConfigError, DataError or CheckpointError, before the first step where something asked for cannot be done;
    NotSaved after the last step."""
    launch = Launch.from_environment()
    plan = make_plan(config, weight_table(config.model), launch.world_size)
    tokenizer = load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None
    data = build_mixtures(config, tokenizer)
    check_vocabulary(config, tokenizer)
    tasks = TasksInTraining(config, tokenizer) if config.observe.tasks.names and tokenizer else None
    launch.join(config.health.collective_timeout_s)
    mesh = make_mesh(plan, launch.device)
    keep_freed_memory()
    with Watchdog(config, mesh):
        return train_on(mesh, config, plan, data, tokenizer, tasks)


def train_on(
    mesh: Mesh,
    config: Config,
    plan: Plan,
    data: Data,
    tokenizer: Tokenizer | None,
    tasks: TasksInTraining | None,
) -> Exit:
    check_same_everywhere(config, data, mesh)
    limit, sent_back = config.health.bad_steps_limit, Counter[int]()  # how often to each step
    ended: Ending | None = None
    with StopRequests(mesh) as requests:
        parts = build(config, plan, mesh)
        while ended is None or ended.status is None:
            run, checkpoint, state = open_run(config, plan, mesh, tokenizer, tasks, ended)
            sent_back[state["step"]] += ended is not None
            status = "failed"
            try:
                if sent_back[state["step"]] > limit:
                    ended = run.give_up(f"sent back to step {state['step']} more than {limit} times")
                else:
                    ended = train_from(run, parts, data, checkpoint, state, requests)
                status = run.status(ended)
            finally:
                if run.recorder:
                    run.recorder.close(status)
        # A launcher that sees one rank leave unfinished ends the others: none goes before all are ready to.
        all_agree(True, mesh)
    return ended.status


def open_run(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    tasks: TasksInTraining | None,
    sent_back: Ending | None,
) -> tuple[Run, Path | None, dict[str, Any]]:
    """With the checkpoint to begin from, and its state; `sent_back` says why the run was, if it was."""
    # Having been sent back, a run goes on from what it has saved itself, whatever it began with.
    resume = "auto" if sent_back and config.checkpoint.resume == "never" else config.checkpoint.resume
    checkpoint, warnings = find_checkpoint(config.run.folder / "checkpoints", resume, mesh)
    state: dict[str, Any] = {"step": 0, "data": {"samples": 0}, "wandb_id": None}
    if checkpoint:
        state = read_train_state(checkpoint)
    if sent_back:
        state["data"]["skipped"] = sent_back.skipped
    recorder = open_recorder(config, plan, state, tokenizer) if mesh.world.rank == 0 else None
    run = Run(config, plan, mesh, recorder, tasks)
    run.say(*warnings)
    return run, checkpoint, state


@dataclass(frozen=True)
class Run:
    """What every part of a run needs to know."""

    config: Config
    plan: Plan
    mesh: Mesh
    recorder: Recorder | None
    """On rank 0."""
    tasks: TasksInTraining | None = None

    def say(self, *lines: str) -> None:
        for line in lines if self.recorder else ():
            self.recorder.message(line)  # type: ignore[union-attr]

    @property
    def last_step(self) -> int:
        return min(self.config.train.stop_at or self.config.train.steps, self.config.train.steps)

    def give_up(self, why: str) -> Ending:
        self.say(f"error: {why} (health.bad_steps_limit)")
        last_words.leave(why)
        return Ending(Exit.BAD_NUMBERS)

    def status(self, ended: Ending) -> str:
        """For the recorder."""
        if ended.status is None:
            return "sent back"
        if ended.status == Exit.DONE and self.last_step == self.config.train.steps:
            return "finished"
        return "failed" if ended.status == Exit.CORRUPTED else "stopped"

    def due(self, step: int, every: int) -> bool:
        return step == self.last_step or (every > 0 and step % every == 0)


def open_recorder(config: Config, plan: Plan, state: dict[str, Any], tokenizer: Tokenizer | None) -> Recorder:
    """Makes the run folder, with the exact config and the tokenizer in it."""
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    if tokenizer:
        tokenizer.save(folder / "tokenizer")
    keep_source(config)
    axes = {"data": plan.data, "pipeline": plan.pipeline, "context": plan.context, "tensor": plan.tensor}
    layout: dict[str, object] = {name: size for name, size in axes.items() if size > 1 or name == "data"}
    layout |= {"sequence": plan.sequence} if plan.tensor > 1 else {}
    layout |= {"schedule": plan.schedule, "virtual": plan.virtual} if plan.pipeline > 1 else {}
    layout |= {"engine": plan.engine, "zero": plan.zero_stage}
    return Recorder(
        config,
        folder,
        num_params=plan.num_params,
        start_step=state["step"],
        wandb_id=state["wandb_id"],
        layout=layout,
    )


def train_from(
    run: Run, parts: Parts, data: Data, checkpoint: Path | None, state: dict[str, Any], requests: StopRequests
) -> Ending:
    config, folder = run.config, run.config.run.folder
    parts.engine.load(initial_state(config, run.mesh, checkpoint), state.get("updates", state["step"]))
    assert data["train"] is not None
    loader = make_loader(data["train"], run, state["data"]["samples"], state["data"].get("skipped", ()))
    if checkpoint:
        loader.check_state(state["data"])
    tokenizer = load_tokenizer(folder / "tokenizer") if config.data.tokenizer and run.recorder else None
    table = weight_table(config.model)
    saver = Saver(
        folder / "checkpoints",
        config.checkpoint.keep,
        table,
        run.mesh,
        parts.engine,
        choose_owners(run.plan, table, elements_of(config.parallel.bucket_mb)),
        lambda path: write_extras(path, config, tokenizer),
    )
    done = False
    try:
        ended = run_steps(run, parts, loader, data, saver, state, requests)
        done = True
    finally:
        NOW.begin("ending", NOW.step)
        loader.close()
        saver.wait(abandon=not done)
        run.say(*saver.news())
    # An earlier save that failed is made good by a later one, but the last one has none after it.
    if saver.error and ended.status is not None:
        raise NotSaved(saver.error)
    return ended


def initial_state(config: Config, mesh: Mesh, checkpoint: Path | None) -> ReadState:
    """Where weights and optimizer state come from: a checkpoint to go on from, a model to start from, or the seed."""
    weights = weight_table(config.model)
    if checkpoint:
        return from_checkpoint(checkpoint, weights, config.model, mesh.tensor)
    if config.model.hf:
        return from_hf(config.model.hf, weights, config.model, mesh.tensor)
    return from_seed(config.train.seed, mesh.tensor, mesh.device)


def run_steps(
    run: Run,
    parts: Parts,
    loader: Loader,
    data: Data,
    saver: Saver,
    state: dict[str, Any],
    requests: StopRequests,
) -> Ending:
    """To the last step; or to the one after which all ranks agree that one of them was asked to stop, and save; or to
    one that cannot be gone on from."""
    config, mesh, recorder, start_step = run.config, run.mesh, run.recorder, state["step"]
    meter = Meter(model_flops_per_token(config), mesh.world.size, mesh.device, parts.dtype)
    profiler = Profiler(config.profile, config.run.folder, mesh.world.rank, parts.engine.settle)
    stragglers = Stragglers(config.health, mesh)
    guard = Guard(config, mesh, loader, state.get("numbers"))

    def save(step: int, samples: int) -> None:
        NOW.begin("saving", step)
        saved = {"step": step, "updates": parts.engine.num_updates, "data": loader.state(samples)}
        wandb_id = recorder.wandb_id if recorder else None
        saver.save(step, saved | {"numbers": guard.state(), "wandb_id": wandb_id})

    with profiler, StepLog(recorder, meter) as log:
        for step in range(start_step + 1, run.last_step + 1):
            NOW.begin("first step" if step == start_step + 1 else "training", step)
            profiler.begin(step)
            stragglers.begin(step)
            agreed = requests.compare()
            lr = learning_rate(step, config.train.steps, config.optimizer)
            samples_before = loader.samples
            loss = forward_backward(parts, next(loader), mesh, config.train.seed)
            guard.compare(step, parts.engine)
            NOW.do("optimizer")
            grad_norm = parts.engine.step(lr, guard.permit(loss))
            guard.note(step, samples_before)
            stragglers.end()
            tokens = loader.samples * config.data.seq_length
            record: Record = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": tokens}
            record |= consumed_tokens(loader) | stragglers.record() | guard.record()
            log.add(record, run.plan.tokens_per_step)
            profiler.end(step)
            asked = agreed()
            if step == run.last_step:
                asked = None  # it ends here all the same
            evaluates = run.due(step, config.observe.eval_every) and not asked
            measures = run.tasks is not None and run.due(step, config.observe.tasks.every) and not asked
            saves = run.due(step, config.checkpoint.every) or asked
            if evaluates or measures or saves:
                log.wait()
            if saves:
                guard.compare(step, parts.engine, saves=True)
            ending = guard.look(step, bool(evaluates or measures or saves))
            run.say(*guard.news())
            if ending:
                parts.engine.settle()
                if ending.saves and ending.saves[0] > start_step:
                    log.wait()
                    save(*ending.saves)
                return ending
            if evaluates:
                NOW.begin("validating", step)
                evaluate(run, parts, data, "valid", step)
            if step == config.train.steps:
                evaluate(run, parts, data, "test", step)
            if measures:
                NOW.begin("evaluating tasks", step)
                evaluate_tasks(run, parts, step)
            if saves:
                save(step, loader.samples)
            run.say(*saver.news(), *stragglers.news())
            if asked:
                run.say(f"{asked.name}: leaving after step {step}; a second signal does not wait for the checkpoint")
                return Ending(Exit.STOPPED)
            meter.start()
    return Ending(Exit.DONE)


@dataclass(frozen=True)
class Parts:
    """What a rank trains: its stages of the model, their engine, and the pipeline that joins them to other ranks'."""

    stages: tuple[Stage, ...]
    engine: Engine
    pipeline: Pipeline | None
    dtype: torch.dtype

    def train(self, mode: bool = True) -> None:
        for stage in self.stages:
            stage.train(mode)


def build(config: Config, plan: Plan, mesh: Mesh) -> Parts:
    """This rank's part of the model, with its weights still zero. Chooses the process's kernels."""
    library.use(config.kernels)
    table = weight_table(config.model)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    spans = plan.stages_of(mesh.pipeline.rank)
    zero_bubble = plan.pipeline > 1 and plan.schedule == "zero_bubble"
    deferred = [PutOff() if zero_bubble else None for _ in spans]
    stages = []
    for span, later in zip(spans, deferred, strict=True):
        model = build_model(config.model)
        apply_parallelism(model, table, plan, span, mesh, config.train, later)
        stages.append(Stage(model, span))
    rows = plan.weights_of(mesh.pipeline.rank, table)
    engine = make_engine(stages, rows, plan, mesh, config)
    pipeline = None
    if plan.pipeline > 1:
        length = config.data.seq_length // plan.context // (plan.tensor if plan.sequence else 1)
        shape = (config.train.micro_batch_size, length, config.model.hidden_size)
        pipeline = Pipeline(stages, plan, mesh, torch.empty(shape, dtype=dtype, device="meta"), deferred)
    return Parts(tuple(stages), engine, pipeline, dtype)


def forward_backward(parts: Parts, batch: list[MicroBatch], mesh: Mesh, seed: int) -> Tensor:
    """All of this rank's micro-batches of one global batch. Returns the mean loss of the global batch's tokens.

    Every token of the global batch weighs the same, however the valid ones are spread over ranks and micro-batches."""
    inputs = [make_inputs(micro, mesh, seed) for micro in batch]
    num_tokens = all_reduce(count_labels(inputs), mesh.replicas).clamp(min=1)
    parts.train()
    if parts.pipeline:
        total = parts.pipeline.forward_backward(inputs, num_tokens, parts.engine)
    else:
        (stage,), total = parts.stages, torch.zeros((), device=mesh.device)
        parts.engine.begin(len(inputs))
        for number, micro in enumerate(inputs):
            NOW.do("forward", number)
            loss = stage(None, micro).sum() / num_tokens
            NOW.do("backward", number)
            parts.engine.backward(loss)
            total += loss.detach()
        NOW.do("summing gradients")
        parts.engine.finish()
    # Tensor ranks have computed the same. All ranks are to know the same bits of it, as all act on it.
    return all_reduce(total if mesh.tensor.rank == 0 else torch.zeros_like(total), mesh.world)


def make_inputs(micro: MicroBatch, mesh: Mesh, seed: int | None = None) -> Inputs:
    """A micro-batch on the device, cut to this rank's part of the sequence. A seed gives dropout its keys."""
    micro = micro.to(mesh.device)
    length = micro.tokens.shape[1]
    with mesh.device:  # made where it is used: a copy would wait for the device
        index = zigzag(length, mesh.context) if mesh.context.size > 1 else torch.arange(length)
    position = index[None] if micro.documents is None else positions_of(micro.documents)[:, index]
    document = None if micro.documents is None else micro.documents[:, index]
    keys = None if seed is None else random_bits(key_of(seed, "dropout"), micro.samples)
    return Inputs(micro.tokens[:, index], Places(index, position, document, keys, length), micro.labels[:, index])


def count_labels(inputs: list[Inputs]) -> Tensor:
    return torch.stack([(x.labels_BT != IGNORE).sum() for x in inputs if x.labels_BT is not None]).sum()


def consumed_tokens(loader: Loader) -> Record:
    """Of each source so far, where there are several."""
    found = loader.consumed()
    length = loader.mixture.seq_length
    return {f"tokens/{name}": count * length for name, count in found.items()} if len(found) > 1 else {}


@torch.no_grad()
def evaluate(run: Run, parts: Parts, data: Data, split: Split, step: int) -> None:
    """Record the mean loss over the first global batches of a split, the same ones every time, where there is one; of
    several sources also that of each."""
    mixture, mesh = data[split], run.mesh
    if mixture is None:
        return
    # Sums of the losses and numbers of labels, of each source.
    sums = torch.zeros(2, len(mixture.names), dtype=torch.float64, device=mesh.device)
    parts.train(False)
    # A split smaller than a batch is gone through more than once rather than refused.
    available = sum(source.num_samples for source in mixture.sources) // run.config.train.global_batch_size
    with make_loader(mixture, run) as loader:
        for _ in range(max(1, min(run.config.observe.eval_batches, available))):
            batch = next(loader)
            inputs = [make_inputs(micro, mesh) for micro in batch]
            if parts.pipeline:
                losses = parts.pipeline.forward(inputs)
            else:
                NOW.do("forward")
                losses = [parts.stages[0](None, micro) for micro in inputs]
            # There are none before the last stage.
            for loss_BT, micro, read in zip(losses, inputs, batch, strict=False):
                source = torch.from_numpy(mixture.order.locate(read.samples.numpy())[0]).to(mesh.device)
                assert micro.labels_BT is not None
                counts = (micro.labels_BT != IGNORE).sum(1)
                sums.index_add_(1, source, torch.stack([loss_BT.sum(1).double(), counts.double()]))
    of_source = all_reduce(all_reduce(sums, mesh.replicas), mesh.pipeline)
    total, count = of_source.sum(1).tolist()
    loss = total / max(count, 1.0)
    record = {"step": step, f"{split}_loss": loss, f"{split}_perplexity": math.exp(min(loss, 700.0))}  # exp overflows
    if len(mixture.names) > 1:
        each = (of_source[0] / of_source[1]).tolist()  # NaN where the batches have none of it
        record |= {f"{split}_loss/{name}": x for name, x in zip(mixture.names, each, strict=True) if math.isfinite(x)}
    if run.recorder:
        run.recorder.evaluation(record)


def evaluate_tasks(run: Run, parts: Parts, step: int) -> None:
    assert run.tasks is not None
    parts.train(False)
    found = run.tasks.measure(parts.stages, parts.pipeline, run.mesh)
    if run.recorder:
        run.recorder.tasks({"step": step} | {f"tasks/{name}": value for name, value in found.items()})


def make_loader(mixture: Mixture, run: Run, start_sample: int = 0, skipped: Sequence[Span] = ()) -> Loader:
    train, data = run.config.train, run.mesh.data
    return Loader(
        mixture,
        train.global_batch_size,
        train.micro_batch_size,
        data.rank,
        data.size,
        start_sample,
        vocab_size=run.config.model.vocab_size,
        pin=run.mesh.device.type == "cuda",
        skipped=skipped,
    )
