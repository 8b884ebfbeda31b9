"""Hooks: each duty of a run beside its steps is one. `run_steps` calls them; `own_hooks` lists them in their order.

A plugin adds one:

    @hooks.register("samples")
    class SamplesConfig(HookConfig):              # what `hooks: [{name: samples, every: 100}]` says
        def build(self, run, parts) -> Hook: ..."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from megalite.checkpoint.save import Saver
from megalite.data.dataset import Split
from megalite.data.loader import Loader
from megalite.data.mixture import Mixture
from megalite.health.guard import Ending, Guard
from megalite.health.signals import StopRequests
from megalite.health.stragglers import Stragglers
from megalite.observe.profiler import Profiler
from megalite.observe.steps import Record
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit
from megalite.training.parts import Parts, validate
from megalite.training.run import Data, Run, Start, make_loader


@dataclass
class Step:
    """One step, as hooks see it."""

    number: int
    record: Record = field(default_factory=dict)
    """Values to log for this step. Tensors in it are still on the device."""
    samples: int = 0
    """Samples that the run has trained on when the step is done."""
    asked: Any = None
    """Signal by which a rank was asked to stop; all ranks know it. The run leaves after this step."""
    saves: bool = False
    """Whether a checkpoint is written after it."""
    pauses: bool = False
    """Whether some hook has work after it that waits for the device."""
    valid_loss: float | None = None
    """Validation loss of the weights after the step, where it was measured and is finite; the same on all ranks."""


class Hook:
    """Do something beside the steps of a run.

    Every rank has the same hooks and calls them in one order, so that they may use collectives. A hook is open, as in
    a `with` block, while the run trains."""

    def begin(self, step: Step) -> None:
        """Act before a step."""

    def before_update(self, step: Step) -> None:
        """Act between the backward pass and the optimizer."""

    def after_update(self, step: Step) -> None:
        """Act when a step has been handed to the device. May add to `step.record`; must not wait for the device."""

    def is_due(self, step: Step) -> bool:
        """Return whether `act` has work after this step that waits for the device."""
        return False

    def act(self, step: Step) -> Ending | None:
        """Act after every step. Return why the run ends here, or None: the same on all ranks.

        Hooks behind this one, of which the last saves, are not called when the run ends. To end it with a checkpoint
        of this step, return Ending(Exit.DONE, saves=(step.number, step.samples))."""
        return None

    def __enter__(self) -> Hook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class TimeRanks(Hook):
    """Report stragglers: ranks that compute more slowly than their peers."""

    def __init__(self, run: Run):
        self._run, self._stragglers = run, Stragglers(run.config.health, run.mesh)

    def begin(self, step: Step) -> None:
        self._stragglers.begin(step.number)

    def after_update(self, step: Step) -> None:
        self._stragglers.end()
        step.record |= self._stragglers.record()

    def act(self, step: Step) -> None:
        self._run.say(*self._stragglers.news())


class Profile(Hook):
    """Write traces of the steps that `profile.steps` names."""

    def __init__(self, run: Run, parts: Parts):
        config = run.config
        self._profiler = Profiler(config.profile, config.run.folder, run.mesh.world.rank, parts.engine.settle)

    def begin(self, step: Step) -> None:
        self._profiler.begin(step.number)

    def act(self, step: Step) -> None:
        self._profiler.end(step.number)

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)


class ListenToSignals(Hook):
    """Find out whether a rank was asked to stop, and leave after that step."""

    def __init__(self, run: Run, requests: StopRequests):
        self._run, self._requests = run, requests

    def begin(self, step: Step) -> None:
        self._agreed = self._requests.compare()

    def after_update(self, step: Step) -> None:
        asked = self._agreed()
        # After the last step the run ends all the same.
        step.asked = None if step.number == self._run.last_step else asked


class GuardNumbers(Hook):
    """Check losses, gradients and replicas; end a run that should not go on."""

    def __init__(self, run: Run, parts: Parts, loader: Loader, guard: Guard):
        self._run, self._parts, self._loader, self._guard = run, parts, loader, guard

    def begin(self, step: Step) -> None:
        self._samples = self._loader.samples

    def before_update(self, step: Step) -> None:
        self._guard.compare(step.number, self._parts.engine)

    def after_update(self, step: Step) -> None:
        self._guard.note(step.number, self._samples)
        step.record |= self._guard.record()

    def act(self, step: Step) -> Ending | None:
        if step.saves:
            self._guard.compare(step.number, self._parts.engine, saves=True)
        ending = self._guard.look(step.number, step.pauses)
        self._run.say(*self._guard.news())
        return ending


class Evaluate(Hook):
    """Measure the validation loss every `observe.eval_every` steps, and the loss of the test split at the end."""

    def __init__(self, run: Run, parts: Parts, data: Data):
        self._run, self._parts, self._data = run, parts, data

    def is_due(self, step: Step) -> bool:
        return self._run.due(step.number, self._run.config.observe.eval_every) and not step.asked

    def act(self, step: Step) -> None:
        if self.is_due(step):
            NOW.begin("validating", step.number)
            step.valid_loss = self._evaluate("valid", step.number)
        if step.number == self._run.config.train.steps:
            self._evaluate("test", step.number)

    def _evaluate(self, split: Split, step: int) -> float | None:
        """Record what `validate` finds in a split, if there is one. Return its loss; None where it is not finite."""
        run, mixture = self._run, self._data[split]
        if mixture is None:
            return None
        found = self._validate(mixture, split)
        record = {f"{split}_{name}": value for name, value in found.items()}
        if run.config.optimizer.ema:
            with self._parts.engine.averaged():
                averaged = self._validate(mixture, split)
            record |= {f"{split}_{name}_ema": value for name, value in averaged.items()}
        if run.recorder:
            run.recorder.evaluation({"step": step} | record)
        return found["loss"] if math.isfinite(found["loss"]) else None

    def _validate(self, mixture: Mixture, split: Split) -> dict[str, float]:
        run = self._run
        batches = mixture.num_batches(run.config.train.global_batch_size, run.config.observe.eval_batches)
        with make_loader(mixture, run) as loader:
            return validate(self._parts, loader, batches, split, run.mesh)


class MeasureTasks(Hook):
    """Evaluate the tasks of lm-evaluation-harness every `observe.tasks.every` steps."""

    def __init__(self, run: Run, parts: Parts):
        self._run, self._parts = run, parts

    def is_due(self, step: Step) -> bool:
        return self._run.due(step.number, self._run.config.observe.tasks.every) and not step.asked

    def act(self, step: Step) -> None:
        run, parts = self._run, self._parts
        if run.tasks is None or not self.is_due(step):
            return
        NOW.begin("evaluating tasks", step.number)
        parts.train(False)
        found = run.tasks.measure(parts.stages, parts.pipeline, run.mesh)
        if run.recorder:
            run.recorder.tasks({"step": step.number} | {f"tasks/{name}": value for name, value in found.items()})


class Save(Hook):
    """Write checkpoints every `checkpoint.every` steps, and before the run leaves."""

    def __init__(self, run: Run, parts: Parts, loader: Loader, saver: Saver, guard: Guard, start: Start):
        self._run, self._parts, self._loader, self._saver = run, parts, loader, saver
        self._guard, self._base = guard, start.base

    def is_due(self, step: Step) -> bool:
        return bool(step.asked) or self._run.due(step.number, self._run.config.checkpoint.every)

    def act(self, step: Step) -> Ending | None:
        if step.saves:
            self.save(step.number, step.samples, step.valid_loss)
        self._run.say(*self._saver.news())
        if not step.asked:
            return None
        self._run.say(
            f"{step.asked.name}: leaving after step {step.number}; a second signal does not wait for the checkpoint"
        )
        return Ending(Exit.STOPPED)

    def save(self, step: int, samples: int, valid_loss: float | None = None) -> None:
        """Start writing the checkpoint of `step`, by which the run has trained on `samples` samples. `valid_loss`
        decides which checkpoints are kept as the best."""
        NOW.begin("saving", step)
        state: Mapping[str, Any] = {
            "step": step,
            "updates": self._parts.engine.num_updates,
            "data": self._loader.state(samples),
            "valid_loss": valid_loss,
            "base": self._base,
            "numbers": self._guard.state(),
            "wandb_id": self._run.recorder.wandb_id if self._run.recorder else None,
        }
        self._saver.save(step, dict(state))


def own_hooks(
    run: Run, parts: Parts, loader: Loader, data: Data, guard: Guard, save: Save, requests: StopRequests
) -> Sequence[Hook]:
    """Return the hooks of a run in the order in which each of their methods is called.

    `parts`, `loader`, `data`, `guard`, `save` and `requests` are those of `run` that hooks watch; hooks of plugins
    come before `save`."""
    return (
        TimeRanks(run),
        Profile(run, parts),
        ListenToSignals(run, requests),
        GuardNumbers(run, parts, loader, guard),
        Evaluate(run, parts, data),
        *([MeasureTasks(run, parts)] if run.tasks else []),
        *(hook.build(run, parts) for hook in run.config.hooks),
        save,
    )
