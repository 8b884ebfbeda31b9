"""The training loop. Pretraining and finetuning on one process or on a thousand are this file, read from top to
bottom."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite import last_words, make_callable
from megalite.activity import NOW
from megalite.checkpoint.export import keep_source, write_extras
from megalite.checkpoint.load import for_adapters, from_checkpoint, from_hf, from_seed
from megalite.checkpoint.match import base_files, check_match
from megalite.checkpoint.resume import find_checkpoint, leave_newer, read_train_state, way_back
from megalite.checkpoint.save import Saver
from megalite.checkpoint.tensors import NotSaved
from megalite.config import Config
from megalite.data.checks import check_same_everywhere, open_data
from megalite.data.dataset import Split
from megalite.data.loader import Loader, Span
from megalite.data.mixture import Mixture
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.engine import ReadState
from megalite.engine.layout import choose_owners, elements_of
from megalite.exit_codes import Exit
from megalite.health.guard import Ending, Guard
from megalite.health.stragglers import Stragglers
from megalite.health.watchdog import Watchdog
from megalite.host_memory import keep_freed_memory
from megalite.infer.in_training import TasksInTraining
from megalite.mesh import Launch, Mesh, make_mesh
from megalite.models import weight_table
from megalite.models.peft import TENSORS
from megalite.no_effect import no_effect
from megalite.observe.profiler import Profiler
from megalite.observe.recorder import Recorder
from megalite.observe.steps import Record, StepLog
from megalite.observe.throughput import Meter, model_flops_per_token
from megalite.parallel.collectives import all_agree
from megalite.parts import Parts, build, forward, forward_backward, validate
from megalite.plan import Plan, make_plan
from megalite.reference import compute_reference, read_references, reference_parts, write_references
from megalite.run_folder import check_run_folder, held, write_config
from megalite.stopping import StopRequests
from megalite.training.objectives import DPO
from megalite.training.schedules import learning_rate

make_callable(__name__)  # as `train`, below

Data = Mapping[Split, Mixture | None]
SOURCES_SHOWN = 8


def train(config: Config) -> Exit:
    """Train as the config says, on the ranks this process was started among. Resumes by itself. Returns DONE;
    STOPPED after a signal, BAD_NUMBERS or CORRUPTED for what `health` looks after.

    Raises ConfigError, DataError or CheckpointError, before the first step where something asked for cannot be done;
    NotSaved after the last step."""
    launch = Launch.from_environment()
    meeting = launch.arrive(config.health.hang_timeout_s)
    check_run_folder(config.run.folder)
    plan = make_plan(config, weight_table(config.model, config.lora), launch.world_size)
    tokenizer, data = open_data(config)
    tasks = TasksInTraining(config, tokenizer) if config.observe.tasks.names and tokenizer else None
    launch.join(config.health.collective_timeout_s, meeting)
    mesh = make_mesh(plan, launch.device)
    keep_freed_memory()
    with held(config.run.folder) if mesh.world.rank == 0 else nullcontext():
        all_agree(True, mesh)  # before that no rank writes there
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
            run, start = open_run(config, plan, mesh, data, tokenizer, tasks, ended)
            sent_back[start.step] += ended is not None
            status = "failed"
            try:
                if sent_back[start.step] > limit:
                    ended = run.give_up(f"sent back to step {start.step} more than {limit} times")
                else:
                    ended = train_from(run, parts, data, start, requests)
                status = run.status(ended)
            finally:
                if run.recorder:
                    run.recorder.close(status)
        # A launcher that sees one rank leave unfinished ends the others: none goes before all are ready to.
        all_agree(True, mesh)
    return ended.status


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    state: dict[str, Any]
    """train_state.json of the checkpoint, or what stands for one at step 0."""
    weights: ReadState
    base: dict[str, str]
    """What `base_files` says."""

    @property
    def step(self) -> int:
        return int(self.state["step"])


def open_run(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    data: Data,
    tokenizer: Tokenizer | None,
    tasks: TasksInTraining | None,
    sent_back: Ending | None,
) -> tuple[Run, Start]:
    """Find what to begin from, and see that it fits; only then is anything written. `sent_back` says why the run was,
    if it was.

    Raises ConfigError, CheckpointError or DataError."""
    # Having been sent back, a run goes on from what it has saved itself, whatever it began with.
    resume = "auto" if sent_back and config.checkpoint.resume == "never" else config.checkpoint.resume
    root, train = config.run.folder / "checkpoints", data["train"]
    assert train is not None
    checkpoint, told = find_checkpoint(root, resume, mesh, config.health.bad_steps_limit)
    state: dict[str, Any] = {"step": 0, "data": {"samples": 0}, "wandb_id": None}
    base = base_files(config)
    if checkpoint:
        state = read_train_state(checkpoint)
    if checkpoint and not sent_back:
        told += check_match(checkpoint, state, config, tokenizer, train, base)
    if sent_back:
        state["data"]["skipped"] = sent_back.skipped
    else:
        told += no_effect(config, int(state["step"]), mesh.world.size)
    start = Start(state, initial_state(config, mesh, checkpoint), base)
    all_agree(True, mesh)  # a start that any rank refuses has written nothing
    recorder = None
    if mesh.world.rank == 0:
        told += leave_newer(root, start.step) if checkpoint else []
        kept = write_config(config.run.folder, config.to_yaml(), start.step)
        told += [f"the config before is kept as {kept}"] if kept else []
        recorder = open_recorder(config, plan, state, tokenizer)
    run = Run(config, plan, mesh, recorder, tasks)
    run.say(*told)
    return run, start


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
        if self.recorder:
            self.say(*way_back(self.config.run.folder / "checkpoints", self.config.health.bad_steps_limit))
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
    """With the tokenizer in the run folder, and what it started from."""
    folder = config.run.folder
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


def train_from(run: Run, parts: Parts, data: Data, start: Start, requests: StopRequests) -> Ending:
    config, folder, state = run.config, run.config.run.folder, start.state
    assert data["train"] is not None
    run.say(*(remark for mixture in data.values() if mixture for remark in mixture.remarks()))
    if config.data.order != "megatron":  # which has as many samples as are asked for
        epochs = data["train"].epochs(config.train.steps * config.train.global_batch_size)
        most = sorted(epochs.items(), key=lambda item: -item[1])[:SOURCES_SHOWN]
        run.say(f"epochs: {', '.join(f'{name} {count:.2f}' for name, count in most)}")
    if isinstance(parts.objective, DPO):
        prepare_references(run, parts, data)
    parts.engine.load(start.weights, state.get("updates", state["step"]))
    loader = make_loader(data["train"], run, state["data"]["samples"], state["data"].get("skipped", ()))
    tokenizer = load_tokenizer(folder / "tokenizer") if config.data.tokenizer and run.recorder else None
    table = [weight for weight in weight_table(config.model, config.lora) if not weight.frozen]
    saver = Saver(
        folder / "checkpoints",
        config.checkpoint.keep,
        table,
        run.mesh,
        parts.engine,
        choose_owners(run.plan, table, elements_of(config.parallel.bucket_mb)),
        lambda path: write_extras(path, config, tokenizer),
        stem=TENSORS if config.lora else "model",
        keep_best=config.checkpoint.keep_best,
    )
    done = False
    try:
        ended = run_steps(run, parts, loader, data, saver, start, requests)
        done = True
    finally:
        NOW.begin("ending", NOW.step)
        loader.close()
        saver.wait(abandon=not done)
        run.say(*saver.news())
    if ended.status == Exit.BAD_NUMBERS and run.recorder:
        run.say(*way_back(folder / "checkpoints", config.health.bad_steps_limit))
    # An earlier save that failed is made good by a later one, but the last one has none after it.
    if saver.error and ended.status is not None:
        raise NotSaved(saver.error)
    return ended


def initial_state(config: Config, mesh: Mesh, checkpoint: Path | None) -> ReadState:
    """Where weights and optimizer state come from: a checkpoint to go on from, a model to start from, or the seed."""
    weights = weight_table(config.model, config.lora)
    if config.lora:
        return for_adapters(config, weights, checkpoint, mesh.tensor, mesh.device)
    if checkpoint:
        return from_checkpoint(config, weights, checkpoint, mesh.tensor)
    if config.model.hf:
        return from_hf(config.model.hf, weights, config.model, mesh.tensor, config.train.seed)
    return from_seed(config.train.seed, mesh.tensor, mesh.device)


def run_steps(
    run: Run,
    parts: Parts,
    loader: Loader,
    data: Data,
    saver: Saver,
    start: Start,
    requests: StopRequests,
) -> Ending:
    """To the last step; or to the one after which all ranks agree that one of them was asked to stop, and save; or to
    one that cannot be gone on from."""
    config, mesh, recorder, state, start_step = run.config, run.mesh, run.recorder, start.state, start.step
    meter = Meter(model_flops_per_token(config), mesh.world.size, mesh.device, parts.dtype)
    profiler = Profiler(config.profile, config.run.folder, mesh.world.rank, parts.engine.settle)
    stragglers = Stragglers(config.health, mesh)
    guard = Guard(config, mesh, loader, state.get("numbers"))

    def save(step: int, samples: int, valid_loss: float | None = None) -> None:
        NOW.begin("saving", step)
        saved = {"step": step, "updates": parts.engine.num_updates, "data": loader.state(samples)}
        saved |= {"valid_loss": valid_loss, "base": start.base}
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
            found = forward_backward(parts, next(loader), mesh, config.train.seed)
            guard.compare(step, parts.engine)
            NOW.do("optimizer")
            grad_norm = parts.engine.step(lr, guard.permit(found["loss"]))
            guard.note(step, samples_before)
            stragglers.end()
            tokens = loader.samples * config.data.seq_length
            record: Record = {"step": step, **found, "lr": lr, "grad_norm": grad_norm, "tokens": tokens}
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
            valid_loss = None
            if evaluates:
                NOW.begin("validating", step)
                valid_loss = evaluate(run, parts, data, "valid", step)
            if step == config.train.steps:
                evaluate(run, parts, data, "test", step)
            if measures:
                NOW.begin("evaluating tasks", step)
                evaluate_tasks(run, parts, step)
            if saves:
                save(step, loader.samples, valid_loss)
            run.say(*saver.news(), *stragglers.news())
            if asked:
                run.say(f"{asked.name}: leaving after step {step}; a second signal does not wait for the checkpoint")
                return Ending(Exit.STOPPED)
            meter.start()
    return Ending(Exit.DONE)


def consumed_tokens(loader: Loader) -> Record:
    """Of each source so far, where there are several."""
    found = loader.consumed()
    length = loader.mixture.seq_length
    return {f"tokens/{name}": count * length for name, count in found.items()} if len(found) > 1 else {}


def evaluate(run: Run, parts: Parts, data: Data, split: Split, step: int) -> float | None:
    """Record what `validate` finds in a split, where there is one. Returns its loss; None where it is not finite."""
    mixture = data[split]
    if mixture is None:
        return None
    batches = mixture.num_batches(run.config.train.global_batch_size, run.config.observe.eval_batches)
    with make_loader(mixture, run) as loader:
        found = validate(parts, loader, batches, split, run.mesh)
    if run.recorder:
        run.recorder.evaluation({"step": step} | {f"{split}_{name}": value for name, value in found.items()})
    return found["loss"] if math.isfinite(found["loss"]) else None


def evaluate_tasks(run: Run, parts: Parts, step: int) -> None:
    assert run.tasks is not None
    parts.train(False)
    found = run.tasks.measure(parts.stages, parts.pipeline, run.mesh)
    if run.recorder:
        run.recorder.tasks({"step": step} | {f"tasks/{name}": value for name, value in found.items()})


def prepare_references(run: Run, parts: Parts, data: Data) -> None:
    """What the starting model makes of every pair: from the run's folder, or computed on this layout and kept there."""
    assert isinstance(parts.objective, DPO)
    mixtures = {split: mixture for split, mixture in data.items() if mixture}
    path = run.config.run.folder / "reference.safetensors"
    made_of = reference_parts(mixtures, run.config, base_files(run.config))
    found, changed = read_references(path, made_of, mixtures)
    if not all_agree(found is not None, run.mesh) or found is None:
        NOW.begin("reference", NOW.step)
        run.say("comparing with the starting model: its log-probabilities of all pairs are computed once")
        if changed:
            run.say(f"again, since other ones were kept: {'; '.join(map(str, changed))}")
        parts.engine.load(initial_state(run.config, run.mesh, None))
        parts.train(False)
        found = {
            split: compute_reference(
                mixture, run.mesh, lambda part: make_loader(part, run), lambda batch: forward(parts, batch, run.mesh)
            )
            for split, mixture in mixtures.items()
        }
        if run.recorder:
            write_references(path, made_of, found)
    parts.objective.references.update(found)


def make_loader(mixture: Mixture, run: Run, start_sample: int = 0, skipped: Sequence[Span] = ()) -> Loader:
    train, data = run.config.train, run.mesh.data
    return Loader(
        mixture,
        train.global_batch_size,
        run.plan.micro_batch_size,
        data.rank,
        data.size,
        start_sample,
        vocab_size=run.config.model.vocab_size,
        pin=run.mesh.device.type == "cuda",
        skipped=skipped,
    )
