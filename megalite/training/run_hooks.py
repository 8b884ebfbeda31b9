"""Hooks that decide how a run goes on: they guard, evaluate, save and stop. `make_hooks` lists all
hooks of a run in their order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megalite.checkpoint.save import Saver
from megalite.data.dataset import Split
from megalite.data.loader import Batches
from megalite.data.mixture import Mixture
from megalite.health.guard import Ending, Guard
from megalite.health.signals import StopRequests
from megalite.kernels.fake_quantize import FakeQuantised
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit
from megalite.training.hooks import Hook, Step, load_states, states_of
from megalite.training.measuring import (
    AnswerPrompts,
    MeasureLayers,
    MeasureNoise,
    MeasureTasks,
    Profile,
    RecordLogits,
    RecordTensors,
    TimeRanks,
)
from megalite.training.parts import RankModel, validate
from megalite.training.run import Data, Run, Start, make_loader
from megalite.utils.notebook import in_notebook


class ListenToSignals(Hook):
    """Find out whether a rank was asked to stop, and leave after that step."""

    def __init__(self, run: Run, requests: StopRequests):
        self._run, self._requests = run, requests

    def begin(self, step: Step) -> None:
        self._agreed = self._requests.compare()

    def after_update(self, step: Step) -> None:
        # Compared in `begin`, beside the forward and backward passes: the answer is here by now.
        asked = self._agreed()
        # After the last step the run ends all the same.
        step.asked = None if step.number == self._run.last_step else asked


class GuardNumbers(Hook):
    """Check losses, gradients and replicas; end a run that should not go on."""

    def __init__(self, run: Run, parts: RankModel, loader: Batches, guard: Guard):
        self._run, self._parts, self._loader, self._guard = run, parts, loader, guard

    def begin(self, step: Step) -> None:
        # Where this step's batch begins, so that a bad one can be named and skipped.
        self._samples = self._loader.samples

    def before_update(self, step: Step) -> None:
        self._guard.compare(step.number, self._parts.engine)

    def after_update(self, step: Step) -> None:
        self._guard.note(step.number, self._samples)
        step.record |= self._guard.record()

    def act(self, step: Step) -> Ending | None:
        if step.saves:
            # Before a checkpoint is written: replicas that have drifted apart must not be made
            # permanent.
            self._guard.compare(step.number, self._parts.engine, saves=True)
        ending = self._guard.look(step.number, bool(step.due))
        step.refused = self._guard.refused
        self._run.say(*self._guard.news())
        return ending

    def state(self) -> dict[str, Any]:
        return self._guard.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._guard.load_state(state)


class Evaluate(Hook):
    """Measure the validation loss every `observe.eval_every` steps, and the loss of the test split
    at the end. End the run where `train.patience` says that the former has not come down for long
    enough."""

    def __init__(self, run: Run, parts: RankModel, data: Data):
        self._run, self._parts, self._data = run, parts, data
        self._patience = run.config.train.patience
        self._lowest: tuple[float, int] = (math.inf, 0)
        """Lowest validation loss so far, and its step."""
        self._since = 0
        """Validations since then."""

    def before_first(self) -> Ending | None:
        if not self._is_out_of_patience:
            return None
        self._run.say(
            f"the run has ended early: {self._why}; a higher train.patience goes on with it"
        )
        return Ending(Exit.DONE)

    def is_due(self, step: Step) -> bool:
        return self._run.due(step.number, self._run.config.observe.eval_every) and not step.asked

    def act(self, step: Step) -> Ending | None:
        ends = False
        if self in step.due:
            NOW.begin("validating", step.number)
            step.valid_loss = self._evaluate("valid", step.number)
            loss = math.inf if step.valid_loss is None else step.valid_loss
            self._since += 1
            if loss < self._lowest[0]:
                self._lowest, self._since = (loss, step.number), 0
            ends = self._is_out_of_patience and step.number < self._run.last_step
        if ends or step.number == self._run.config.train.steps:
            self._evaluate("test", step.number)
        if not ends:
            return None
        self._run.say(f"the run ends early, after step {step.number}: {self._why}")
        return Ending(Exit.DONE, saves=(step.number, step.samples))

    @property
    def _is_out_of_patience(self) -> bool:
        return self._patience is not None and self._since >= self._patience

    @property
    def _why(self) -> str:
        loss, step = self._lowest
        those = "a validation has" if self._since == 1 else f"{self._since} validations have"
        return f"{those} not been below the {loss:.4f} of step {step} (train.patience)"

    def state(self) -> dict[str, Any]:
        if self._patience is None:
            return {}
        loss, step = self._lowest
        return {"lowest": None if math.isinf(loss) else loss, "step": step, "since": self._since}

    def load_state(self, state: dict[str, Any]) -> None:
        lowest = state["lowest"]
        self._lowest = (math.inf if lowest is None else float(lowest), int(state["step"]))
        self._since = int(state["since"])

    def _evaluate(self, split: Split, step: int) -> float | None:
        """Record what `validate` finds in a split, if there is one. Return its loss; None where it
        is not finite."""
        run, mixture = self._run, self._data[split]
        if mixture is None:
            return None
        found = self._validate(mixture, split)
        if split == "valid" and run.targets:
            found |= run.targets.measure(self._parts.stages, self._parts.pipeline, run.mesh)
        record = {f"{split}_{name}": value for name, value in found.items()}
        if run.config.optimizer.ema:
            with self._parts.engine.averaged():
                # The same batches once more, with the weights' average.
                averaged = self._validate(mixture, split)
            record |= {f"{split}_{name}_ema": value for name, value in averaged.items()}
        if run.recorder:
            run.recorder.evaluation({"step": step} | record)
        return found["loss"] if math.isfinite(found["loss"]) else None

    def _validate(self, mixture: Mixture, split: Split) -> dict[str, float]:
        run = self._run
        batches = mixture.num_batches(
            run.config.train.global_batch_size, run.config.observe.eval_batches
        )
        with make_loader(mixture, run) as loader:
            return validate(self._parts, loader, batches, split, run.mesh)


class BeginRounding(Hook):
    """Begin to round weights and inputs after `train.fake_quantize.start_step` steps."""

    def __init__(self, run: Run, parts: RankModel):
        given = run.config.train.fake_quantize
        assert given is not None
        self._start = given.start_step
        recipes = (
            getattr(each, "recipe", None) for stage in parts.stages for each in stage.modules()
        )
        self._switches = [each.switch for each in recipes if isinstance(each, FakeQuantised)]

    def begin(self, step: Step) -> None:
        for switch in self._switches:
            switch.on = step.number > self._start


class Save(Hook):
    """Write checkpoints every `checkpoint.every` steps, and before the run leaves."""

    def __init__(
        self,
        run: Run,
        parts: RankModel,
        loader: Batches,
        saver: Saver,
        start: Start,
        others: Mapping[str, Hook],
    ):
        """Save with the states of `others`, the hooks by their names; `start` is what the run began
        with."""
        self._run, self._parts, self._loader, self._saver = run, parts, loader, saver
        self._base, self._others = start.base, others
        self._begun = [
            {
                "updates": number,
                "weights": [w for w, begun in start.begun.items() if begun == number],
            }
            for number in sorted(set(start.begun.values()))
        ]

    def is_due(self, step: Step) -> bool:
        return bool(step.asked) or self._run.due(step.number, self._run.config.checkpoint.every)

    def act(self, step: Step) -> Ending | None:
        if step.saves:
            self.save(step.number, step.samples, step)
        self._run.say(*self._saver.news())
        if not step.asked:
            return None
        # `StopRequests` lets a notebook's kernel live on.
        second = "" if in_notebook() else "; a second signal does not wait for the checkpoint"
        self._run.say(f"{step.asked.name}: leaving after step {step.number}{second}")
        return Ending(Exit.STOPPED)

    def save(self, number: int, samples: int, step: Step) -> None:
        """Start writing the checkpoint of step `number`, by which the run has trained on `samples`
        samples. `step` is the one that the run is at, which may be a later one: what it knows
        decides which checkpoints are kept."""
        NOW.begin("saving", number)
        state: Mapping[str, Any] = {
            "step": number,
            # Refused steps do not count: Adam's bias correction goes by updates, the schedule by
            # steps.
            "updates": self._parts.engine.num_updates,
            "states_begun": self._begun,
            "data": self._loader.state(samples),
            "valid_loss": step.valid_loss,
            "refused": step.refused,
            # Saved for the sake of a later step that ended the run: what made that bad may be in
            # these weights.
            "doubted": number < step.number,
            "base": self._base,
            "hooks": states_of(self._others),
            "wandb_id": self._run.recorder.wandb_id if self._run.recorder else None,
        }
        self._saver.save(number, dict(state))


def make_hooks(
    run: Run,
    parts: RankModel,
    loader: Batches,
    data: Data,
    saver: Saver,
    guard: Guard,
    start: Start,
    requests: StopRequests,
) -> tuple[Sequence[Hook], Save]:
    """Return the hooks of a run, in the order in which each of their methods is called, and the
    last of them, which saves. They go on from their states at `start`.

    The other arguments are those of `run` that hooks watch. Raises CheckpointError for a state that
    its hook does not take."""
    # The order matters: "signals" and "guard" come before whatever acts on what they found;
    # evaluation sets `valid_loss`, which saving reads; plugins' follow, and saving is last.
    hooks: dict[str, Hook] = {
        "stragglers": TimeRanks(run),
        "profile": Profile(run, parts),
        **(
            {"tensors": RecordTensors(run, parts, saver.target.owners)}
            if run.config.profile.tensors
            else {}
        ),
        **({"rounding": BeginRounding(run, parts)} if run.config.train.fake_quantize else {}),
        "signals": ListenToSignals(run, requests),
        "guard": GuardNumbers(run, parts, loader, guard),
        **({"logits": RecordLogits(run, parts)} if run.config.optimizer.qk_clip else {}),
        **({"layers": MeasureLayers(run, parts)} if run.config.observe.layers_every else {}),
        **(
            {"noise_scale": MeasureNoise(run, parts, loader)}
            if run.config.observe.noise_scale_every
            else {}
        ),
        "evaluation": Evaluate(run, parts, data),
        **({"tasks": MeasureTasks(run, parts)} if run.tasks else {}),
        **({"prompts": AnswerPrompts(run, parts)} if run.samples else {}),
    }
    for config in run.config.hooks:
        same = sum(name.partition("#")[0] == config.name for name in hooks)
        # A hook may be there twice; states in a checkpoint are found by these names.
        hooks[f"{config.name}#{same + 1}" if same else config.name] = config.build(run, parts)
    load_states(hooks, run, start)
    save = Save(run, parts, loader, saver, start, hooks)
    return (*hooks.values(), save), save
