"""The training loop: one step after another, and beside each what the hooks do."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from megalite.checkpoint.save import Saver
from megalite.data.loader import Batches
from megalite.health.guard import Ending, Guard
from megalite.health.signals import StopRequests
from megalite.observe.steps import Record, StepLog
from megalite.observe.throughput import Meter, model_flops_per_token
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit
from megalite.training.hooks import Hook, Step
from megalite.training.parts import RankModel, forward_backward
from megalite.training.run import Data, Run, Start
from megalite.training.run_hooks import make_hooks
from megalite.training.schedules import learning_rate


def run_steps(
    run: Run,
    parts: RankModel,
    loader: Batches,
    data: Data,
    saver: Saver,
    start: Start,
    requests: StopRequests,
) -> Ending:
    """Train to the last step, or to one after which all ranks agree to stop, or which the run
    cannot go on from.

    `start` says where the run begins, `loader` reads its batches, and `requests` tells of signals.
    `parts` are trained, `data` is what hooks validate on, and `saver` writes checkpoints. Returns
    why the run ended."""
    # A token of a longer sequence costs more attention; runs may begin with shorter ones.
    config, mesh = run.config, run.mesh
    lengths = config.data.seq_lengths
    flops = {length: model_flops_per_token(config, length) for length in lengths}
    meter = Meter(flops[config.data.seq_length], mesh.world.size, mesh.device, parts.dtype)
    guard = Guard(config, mesh, loader)
    hooks, save = make_hooks(run, parts, loader, data, saver, guard, start, requests)
    with ExitStack() as stack, StepLog(run.recorder, meter) as log:
        for hook in hooks:
            stack.enter_context(hook)
        for hook in hooks:
            if ending := hook.before_first():
                return ending
        for number in range(start.step + 1, run.last_step + 1):
            NOW.begin("first step" if number == start.step + 1 else "training", number)
            step = Step(number)
            samples_before = loader.samples
            meter.flops_per_token = flops[config.data.length_of(number)]
            train_step(step, run, parts, loader, guard, hooks)
            num_samples = step.samples - samples_before
            log.add(step.record, num_samples * config.sample_tokens)
            # Asked once and before any of them acts: `act` of one may look at what the others are
            # to do.
            step.due = [hook for hook in hooks if hook.is_due(step)]
            step.saves = save in step.due
            if step.due:
                log.wait()
            ending = _first_ending(hooks, step)
            if ending:
                # No gather may be under way when the process groups are destroyed.
                parts.engine.wait_for_params()
                # Possibly an earlier step's: all updates since then were refused, so the engine
                # still holds its state. There is nothing new to write where the run has not got
                # beyond its start.
                if ending.saves and ending.saves[0] > start.step:
                    log.wait()
                    save.save(*ending.saves, step)
                return ending
            # What hooks did (evaluation, saving) is not counted as training.
            meter.start()
    return Ending(Exit.DONE)


def _first_ending(hooks: Sequence[Hook], step: Step) -> Ending | None:
    """Have `hooks` act after a step, up to the first that ends the run. Return how it does, or
    None."""
    for hook in hooks:
        ending = hook.act(step)
        # The others do not act: a guard that ends the run keeps a checkpoint from being written.
        if ending:
            return ending
    return None


def train_step(
    step: Step, run: Run, parts: RankModel, loader: Batches, guard: Guard, hooks: Sequence[Hook]
) -> None:
    """Hand one optimizer step on the next batch of `loader` to the device, and put its results in
    `step.record`. `guard` decides on the device whether the weights are updated; `hooks` act around
    it."""
    for hook in hooks:
        hook.begin(step)
    lr = learning_rate(step.number, run.config.train.steps, run.config.optimizer)
    # This rank's micro-batches of the global batch, on the host.
    batch, length = next(loader), run.config.data.length_of(step.number)
    if length < run.config.data.seq_length:
        batch = [micro.cut(length) for micro in batch]
    found = forward_backward(parts, batch, run.mesh, run.config.train.seed)
    for hook in hooks:
        hook.before_update(step)
    NOW.do("optimizer")
    # The gate is a tensor on the device: the host goes on to the next step without knowing whether
    # this one was refused, and learns it when the log is read.
    grad_norm = parts.engine.step(lr, guard.update_gate(found["loss"]))
    step.samples = loader.samples
    tokens = step.samples * run.config.sample_tokens
    step.record = {"step": step.number, **found, "lr": lr, "grad_norm": grad_norm, "tokens": tokens}
    step.record |= consumed_tokens(loader)
    for hook in hooks:
        hook.after_update(step)


def consumed_tokens(loader: Batches) -> Record:
    """Return the tokens of each source that were trained on so far, if there are several
    sources."""
    found = loader.consumed()
    length = loader.mixture.seq_length
    return (
        {f"tokens/{name}": count * length for name, count in found.items()}
        if len(found) > 1
        else {}
    )
