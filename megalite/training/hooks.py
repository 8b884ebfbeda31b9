"""Hooks: each duty of a run beside its steps is one. `run_steps` calls them; `make_hooks`
(run_hooks.py) lists them in their order.

A plugin adds one:

    @hooks.register("samples")
    class SamplesConfig(HookConfig):              # what `hooks: [{name: samples, every: 100}]` says
        def build(self, run, parts) -> Hook: ..."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from megalite.errors import CheckpointError
from megalite.health.guard import Ending
from megalite.observe.steps import Record
from megalite.training.run import Run, Start
from megalite.utils.outside import shown


@dataclass
class Step:
    """One step, as hooks see it."""

    number: int
    record: Record = field(default_factory=dict)
    """Values to log for this step. Tensors in it are still on the device."""
    samples: int = 0
    """Samples that the run has trained on when the step is done."""
    asked: Any = None
    """Signal by which a rank was asked to stop; all ranks know it. The run leaves after this
    step."""
    saves: bool = False
    """Whether a checkpoint is written after it."""
    due: Sequence[Hook] = ()
    """Hooks that have work after it that waits for the device."""
    refused: int = 0
    """Steps in a row, up to this one, whose update was refused, as far as the host knows."""
    valid_loss: float | None = None
    """Validation loss of the weights after the step, where it was measured and is finite; the same
    on all ranks."""


class Hook:
    """Do something beside the steps of a run.

    Every rank has the same hooks and calls them in one order, so that they may use collectives. A
    hook is open, as in a `with` block, while the run trains."""

    def before_first(self) -> Ending | None:
        """Return why there is nothing to train from here, or None: the same on all ranks. Asked
        before the first step."""
        return None

    def begin(self, step: Step) -> None:
        """Act before a step."""

    def before_update(self, step: Step) -> None:
        """Act between the backward pass and the optimizer."""

    def after_update(self, step: Step) -> None:
        """Act when a step has been handed to the device. May add to `step.record`; must not wait
        for the device."""

    def is_due(self, step: Step) -> bool:
        """Return whether `act` has work after this step that waits for the device. Asked once;
        `step.due` has the answers."""
        return False

    def act(self, step: Step) -> Ending | None:
        """Act after every step. Return why the run ends here, or None: the same on all ranks.

        Hooks behind this one, of which the last saves, are not called when the run ends. To end it
        with a checkpoint of this step, return Ending(Exit.DONE, saves=(step.number,
        step.samples))."""
        return None

    def state(self) -> dict[str, Any]:
        """Return what the hook must know after a resume, as JSON can hold it; empty for nothing.
        All ranks are asked when a checkpoint is saved, and it keeps that of rank 0."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned when the checkpoint was saved. Called on every rank
        before the first step, where the checkpoint has a state of this hook."""

    def __enter__(self) -> Hook:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def states_of(hooks: Mapping[str, Hook]) -> dict[str, Any]:
    """Return the states of those hooks that have one, by their names. Raises TypeError for one that
    is not JSON."""
    states = {name: hook.state() for name, hook in hooks.items()}
    # A copy: a hook may change what it gave while the checkpoint is still being written.
    return {name: json.loads(json.dumps(state)) for name, state in states.items() if state}


def load_states(hooks: Mapping[str, Hook], run: Run, start: Start) -> None:
    """Give hooks their states at `start`, and say which of them begin afresh and which states
    nobody takes."""
    kept = start.state.get("hooks", {})
    for name, hook in hooks.items():
        if name in kept:
            try:
                hook.load_state(kept[name])
            except Exception as error:  # code of others can raise anything
                raise CheckpointError(
                    f"the checkpoint of step {start.step}: train_state.json: hooks.{name} = {shown(kept[name])} is no "
                    f"state that the hook goes on from: {type(error).__name__}: {error}"
                ) from error
        elif start.step and hook.state():
            run.say(
                f"the checkpoint of step {start.step} has no state of the hook {name}, which begins afresh"
            )
    for name in sorted(kept.keys() - hooks.keys()):
        run.say(
            f"warning: the run has no hook {name} any more; its state at step {start.step} is dropped"
        )
