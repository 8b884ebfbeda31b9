"""Run training from its start to its end: pretraining and finetuning, on one process or on a
thousand. The steps themselves are in training/loop.py, and what is done beside them in
training/run_hooks.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from megalite import make_callable
from megalite.checkpoint.export import keep_source, write_extras
from megalite.checkpoint.load import states_begun
from megalite.checkpoint.match import check_match
from megalite.checkpoint.resume import leave_newer, way_back
from megalite.checkpoint.train_state import read_train_state
from megalite.checkpoint.unneeded import left_behind
from megalite.comm.collectives import all_agree
from megalite.comm.mesh import Launch, Mesh, make_mesh
from megalite.config import Config
from megalite.config.no_effect import no_effect
from megalite.data.checks import check_same_everywhere, open_data
from megalite.data.dataset import RowSource
from megalite.data.mixture import Mixture
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.engine.layout import bucket_elements, choose_owners
from megalite.errors import NotSaved
from megalite.health.guard import Ending
from megalite.health.signals import StopRequests
from megalite.health.watchdog import Watchdog
from megalite.infer.in_training import SamplesInTraining, TargetsInTraining, TasksInTraining
from megalite.models import weight_table
from megalite.models.peft import TENSORS
from megalite.observe.band import Band
from megalite.observe.environment import hardware_of, unused_gpus
from megalite.observe.recorder import Recorder
from megalite.plan import Plan
from megalite.plan import plan as plan_of
from megalite.runtime.activity import NOW
from megalite.runtime.environment import set_defaults
from megalite.runtime.exit_codes import Exit
from megalite.runtime.host_memory import keep_freed_memory
from megalite.runtime.run_folder import check_run_folder, held, write_config
from megalite.training.loop import run_steps
from megalite.training.objectives import DPO
from megalite.training.parts import RankModel, build
from megalite.training.reference import prepare_references
from megalite.training.run import DISK, Data, Run, Start, Storage, make_loader

make_callable(__name__)  # as `train`, below

SOURCES_SHOWN = 8
MOST_EPOCHS = 10
"""Times through labelled rows above which a run warns."""


def train(config: Config, storage: Storage = DISK) -> Exit:
    """Train as `config` says, on the ranks this process was started among; resumes by itself.
    `storage` holds its checkpoints and models. Returns DONE; STOPPED after a signal, BAD_NUMBERS or
    CORRUPTED for what `health` checks.

    Raises ConfigError, DataError or CheckpointError, before the first step, where something asked
    for cannot be done; NotSaved after the last step."""
    set_defaults(config.train.deterministic)
    launch = Launch.from_environment()
    # Before the data is opened, which may take minutes: a rank that dies meanwhile is noticed.
    meeting = launch.arrive(config.health.hang_timeout_s)
    check_run_folder(config.run.folder)
    plan = plan_of(config, launch.world_size)
    config, tokenizer, data = open_data(config)
    config.objective.check_data(config, data)
    plan = replace(plan, steps=config.train.steps, tokens=config.num_tokens)
    tasks = TasksInTraining(config, tokenizer) if config.observe.tasks.names and tokenizer else None
    launch.join(config.health.collective_timeout_s, meeting)
    mesh = make_mesh(plan, launch.device)
    keep_freed_memory()
    with held(config.run.folder) if mesh.world.rank == 0 else nullcontext():
        all_agree(True, mesh)  # no rank writes to the folder before rank 0 holds it
        with Watchdog(config, mesh):
            return train_on(mesh, config, plan, data, tokenizer, tasks, storage)


def train_on(
    mesh: Mesh,
    config: Config,
    plan: Plan,
    data: Data,
    tokenizer: Tokenizer | None,
    tasks: TasksInTraining | None,
    storage: Storage = DISK,
) -> Exit:
    """Train on a `mesh` of ranks that have met; a run that is sent back begins again here.

    `config`, `plan` and `data` are alike on all ranks; `tokenizer` and `tasks` are None where the
    run needs none; `storage` holds checkpoints and models."""
    check_same_everywhere(config, data, mesh)
    # How often the run was sent back, by step.
    limit, sent_back = (
        config.health.bad_steps_limit,
        Counter[int](),
    )
    ended: Ending | None = None
    with StopRequests(mesh) as requests:
        parts = build(config, plan, mesh, storage.open_model)
        while ended is None or ended.status is None:
            run, start = open_run(config, plan, mesh, data, tokenizer, tasks, ended, storage)
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
        # A launcher that sees one rank leave unfinished ends the others: no rank goes before all
        # are ready to.
        all_agree(True, mesh)
    return ended.status


def open_run(
    config: Config,
    plan: Plan,
    mesh: Mesh,
    data: Data,
    tokenizer: Tokenizer | None,
    tasks: TasksInTraining | None,
    sent_back: Ending | None,
    storage: Storage,
) -> tuple[Run, Start]:
    """Find the checkpoint or model to begin from, and check that it fits `config`, `plan` and
    `data`; only then is anything written. `sent_back` is the ending that sent the run back to a
    checkpoint, or None; `tokenizer`, `tasks` and `storage` are those of `train_on`.

    Raises ConfigError, CheckpointError or DataError."""
    # A run that was sent back goes on from what it saved itself, whatever it began with.
    resume = (
        "auto" if sent_back and config.checkpoint.resume == "never" else config.checkpoint.resume
    )
    root, train = config.run.folder / "checkpoints", data["train"]
    assert train is not None
    checkpoint, told = storage.find(root, resume, mesh, config.health.bad_steps_limit)
    state: dict[str, Any] = {"step": 0, "data": {"samples": 0}, "wandb_id": None}
    base = storage.base_files(config)
    if checkpoint:
        state = read_train_state(checkpoint)
    if checkpoint and not sent_back:
        told += check_match(checkpoint, state, config, tokenizer, train, base)
    if sent_back:
        state["data"]["skipped"] = sent_back.skipped
    else:
        told += no_effect(config, int(state["step"]), mesh.world.size)
    if checkpoint is None:
        told += left_behind(config)
    samples = (
        SamplesInTraining(config, tokenizer)
        if config.observe.samples.prompts and tokenizer
        else None
    )
    valid = data["valid"]
    targets = (
        TargetsInTraining(config, tokenizer, valid)
        if config.observe.target_rows and tokenizer and valid
        else None
    )
    band = _expected_losses(config)
    trained = [weight for weight in weight_table(config.model, config.lora) if not weight.frozen]
    begun = states_begun(checkpoint, state, config, trained) if checkpoint else {}
    start = Start(state, storage.initial_state(config, mesh, checkpoint), base, begun)
    all_agree(True, mesh)  # a start that any rank refuses has written nothing
    recorder = None
    if mesh.world.rank == 0:
        told += leave_newer(root, start.step) if checkpoint else []
        kept = write_config(config.run.folder, config.to_yaml(), start.step)
        told += [f"the config before is kept as {kept}"] if kept else []
        recorder = open_recorder(config, plan, state, tokenizer, mesh, band)
        told += filter(None, [unused_gpus(mesh.device.type)])
    run = Run(config, plan, mesh, recorder, tasks, samples, targets, storage)
    run.say(*told)
    return run, start


def _expected_losses(config: Config) -> Band | None:
    """Return what `observe.ladder` predicts of the run, or None. Raises ConfigError."""
    if config.observe.ladder is None:
        return None
    from megalite.ladder.curve import read_band

    return read_band(config.observe.ladder, config)


def open_recorder(
    config: Config,
    plan: Plan,
    state: dict[str, Any],
    tokenizer: Tokenizer | None,
    mesh: Mesh,
    band: Band | None,
) -> Recorder:
    """Open the recorder of a run after `state`, and put the `tokenizer` and the run's starting
    point into its folder. `plan` gives the layout that is recorded, `mesh` the ranks, `band` the
    losses that are expected."""
    folder = config.run.folder
    if tokenizer:
        tokenizer.save(folder / "tokenizer")
    keep_source(config)
    axes = {
        "data": plan.data,
        "pipeline": plan.pipeline,
        "context": plan.context,
        "tensor": plan.tensor,
    }
    layout: dict[str, object] = {
        name: size for name, size in axes.items() if size > 1 or name == "data"
    }
    layout |= {"sequence": plan.sequence} if plan.tensor > 1 else {}
    layout |= (
        {"expert": plan.experts.expert, "expert_tensor": plan.experts.tensor}
        if plan.folds_experts
        else {}
    )
    layout |= {"schedule": plan.schedule, "virtual": plan.virtual} if plan.pipeline > 1 else {}
    layout |= {"engine": plan.engine, "zero": plan.zero_stage}
    return Recorder(
        config,
        folder,
        num_params=plan.num_params,
        start_step=state["step"],
        wandb_id=state["wandb_id"],
        layout=layout,
        hardware=hardware_of(mesh.device.type, mesh.world.size),
        band=band,
    )


def _epochs(config: Config, train: Mixture) -> Iterator[str]:
    """Yield lines for the console: how often the run goes through its sources, and what a step is
    of that."""
    num_samples = config.train.samples_after(config.train.steps)
    epochs = train.epochs(num_samples)
    most = sorted(epochs.items(), key=lambda item: -item[1])[:SOURCES_SHOWN]
    share = config.train.global_batch_size / train.num_samples
    labelled = [source for source in train.sources if isinstance(source, RowSource)]
    a_step = ""
    if len(labelled) == len(train.sources):
        rows = sum(source.num_rows for source in labelled)
        a_step = f"{rows * share:,.1f} of {rows:,} rows, "
    shown = ", ".join(f"{name} {count:.2f}" for name, count in most)
    yield f"epochs: {shown}; a step is {a_step}{share:.3g} of an epoch"
    for name, source in zip(train.names, train.sources, strict=True):
        if isinstance(source, RowSource) and epochs[name] > MOST_EPOCHS:
            yield (
                f"warning: the run goes {epochs[name]:.1f} times through the labelled rows of {name}; models learn "
                f"them by heart long before: {MOST_EPOCHS} times are many"
            )


def train_from(
    run: Run, parts: RankModel, data: Data, start: Start, requests: StopRequests
) -> Ending:
    """Train from `start` to the end of this run; return why it ended. `requests` tells of signals
    to stop.

    Raises NotSaved where the last checkpoint could not be written."""
    config, folder, state = run.config, run.config.run.folder, start.state
    assert data["train"] is not None
    run.say(*(remark for mixture in data.values() if mixture for remark in mixture.remarks()))
    if config.data.order != "megatron":  # that order has as many samples as are asked for
        run.say(*_epochs(config, data["train"]))
    if isinstance(parts.objective, DPO):
        prepare_references(run, parts, data)
    parts.engine.load(start.weights, state.get("updates", state["step"]), start.begun)
    read = make_loader(
        data["train"], run, state["data"]["samples"], state["data"].get("skipped", ()), ramps=True
    )
    loader = config.objective.batches(read, run, parts)
    tokenizer = (
        load_tokenizer(folder / "tokenizer") if config.data.tokenizer and run.recorder else None
    )
    weights = weight_table(config.model, config.lora, config.train.fp8)
    table = [weight for weight in weights if not weight.frozen]
    saver = run.storage.make_saver(
        folder / "checkpoints",
        config.checkpoint.keep,
        table,
        run.mesh,
        parts.engine,
        choose_owners(
            run.plan,
            table,
            config.optimizer,
            bucket_elements(config, run.plan),
        ),
        lambda path: write_extras(path, config, tokenizer),
        stem=TENSORS if config.lora else "model",
        keep_best=config.checkpoint.keep_best,
        state_row=config.optimizer.state_row,
    )
    done = False
    try:
        ended = run_steps(run, parts, loader, data, saver, start, requests)
        done = True
    finally:
        NOW.begin("ending", NOW.step)
        loader.close()
        saver.wait(abandon=not done, in_a_hurry=requests.came_too_late)
        run.say(*saver.news())
    if ended.status == Exit.BAD_NUMBERS and run.recorder:
        run.say(*way_back(folder / "checkpoints", config.health.bad_steps_limit))
    # An earlier save that failed is made up for by a later one, but none comes after the last.
    if saver.error and ended.status is not None:
        raise NotSaved(saver.error)
    return ended
