"""Hooks: each duty of a run beside its steps is one. `run_steps` calls them; `make_hooks` lists
them in their order.

A plugin adds one:

    @hooks.register("samples")
    class SamplesConfig(HookConfig):              # what `hooks: [{name: samples, every: 100}]` says
        def build(self, run, parts) -> Hook: ..."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from megalite.checkpoint.save import Saver
from megalite.data.dataset import Split
from megalite.data.loader import Batches
from megalite.data.mixture import Mixture
from megalite.engine.native import NativeEngine
from megalite.errors import CheckpointError
from megalite.health.guard import Ending, Guard
from megalite.health.signals import StopRequests
from megalite.health.stragglers import Stragglers
from megalite.kernels.fake_quantize import FakeQuantised
from megalite.models import weight_table
from megalite.observe.experts import ExpertLoads, plot_loads
from megalite.observe.layers import LayerMeasures, largest_logit
from megalite.observe.noise import NoiseScale
from megalite.observe.profiler import Profiler
from megalite.observe.steps import Record
from megalite.observe.tensors import KINDS, folder_of, write_numbers, write_tensors
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit
from megalite.training.parts import RankModel, validate
from megalite.training.run import Data, Run, Start, make_loader
from megalite.utils.notebook import in_notebook
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

    def __init__(self, run: Run, parts: RankModel):
        config = run.config
        self._profiler = Profiler(
            config.profile, config.run.folder, run.mesh.world.rank, parts.engine.wait_for_params
        )

    def begin(self, step: Step) -> None:
        self._profiler.begin(step.number)

    def act(self, step: Step) -> None:
        self._profiler.end(step.number)

    def __exit__(self, *error: Any) -> None:
        self._profiler.__exit__(*error)


class RecordTensors(Hook):
    """Write the weights and gradients of the steps that `profile.tensors` names."""

    def __init__(self, run: Run, parts: RankModel, owners: Mapping[str, int]):
        """`owners` says which rank writes each weight."""
        self._run, self._parts, self._owners = run, parts, owners
        self._table = {
            weight.name: weight for weight in weight_table(run.config.model, run.config.lora)
        }

    def before_update(self, step: Step) -> None:
        if not self.is_due(step):
            return
        # Before the update, which forgets the gradients. "weight" is what this step's loss was
        # computed with.
        found = {}
        for kind in KINDS:
            owned = self._parts.engine.gather(kind, self._owners)
            found[kind] = {
                hf: x for name in owned for hf, x in self._table[name].to_hf(owned[name]).items()
            }
        write_tensors(
            folder_of(self._run.config.run.folder, step.number), self._run.mesh.world.rank, found
        )

    def is_due(self, step: Step) -> bool:
        return step.number in self._run.config.profile.tensors

    def act(self, step: Step) -> None:
        if self in step.due and self._run.recorder:
            names = [
                name for weight in self._table.values() if not weight.frozen for name in weight.hf
            ]
            folder = folder_of(self._run.config.run.folder, step.number)
            write_numbers(
                folder, float(step.record["loss"]), float(step.record["grad_norm"]), names
            )


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


class MeasureTasks(Hook):
    """Evaluate the tasks of lm-evaluation-harness every `observe.tasks.every` steps."""

    def __init__(self, run: Run, parts: RankModel):
        self._run, self._parts = run, parts

    def is_due(self, step: Step) -> bool:
        return self._run.due(step.number, self._run.config.observe.tasks.every) and not step.asked

    def act(self, step: Step) -> None:
        run, parts = self._run, self._parts
        if run.tasks is None or self not in step.due:
            return
        NOW.begin("evaluating tasks", step.number)
        parts.train(False)
        found = run.tasks.measure(parts.stages, parts.pipeline, run.mesh)
        if run.recorder:
            run.recorder.tasks(
                {"step": step.number} | {f"tasks/{name}": value for name, value in found.items()}
            )


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


class MeasureLayers(Hook):
    """Record measures of each layer every `observe.layers_every` steps."""

    def __init__(self, run: Run, parts: RankModel):
        assert isinstance(parts.engine, NativeEngine)
        self._run = run
        self._measures = LayerMeasures(
            parts.stages, parts.engine, run.mesh, run.config, run.plan.sequence
        )
        self._loads = ExpertLoads(
            parts.stages, run.mesh, run.config.model.architecture, run.plan.sequence
        )
        self._found: Record = {}

    def begin(self, step: Step) -> None:
        if self._is_measured(step):
            self._measures.begin()
            self._loads.begin()

    def before_update(self, step: Step) -> None:
        if self._is_measured(step):
            self._found = self._measures.end() | self._loads.end()

    def after_update(self, step: Step) -> None:
        step.record |= self._found
        self._found = {}

    def is_due(self, step: Step) -> bool:
        return bool(self._loads.num_experts) and self._is_measured(step)

    def act(self, step: Step) -> None:
        if self in step.due and self._run.recorder:
            folder, layers = self._run.config.run.folder, [*self._loads.num_experts]
            plot_loads(
                self._loads.loads,
                layers,
                step.number,
                folder / "metrics.jsonl",
                folder / "experts.png",
            )

    def _is_measured(self, step: Step) -> bool:
        return self._run.due(step.number, self._run.config.observe.layers_every)


class RecordLogits(Hook):
    """Record the largest attention logit of every step, which QK-clip finds in any case."""

    def __init__(self, run: Run, parts: RankModel):
        self._run, self._parts = run, parts

    def after_update(self, step: Step) -> None:
        step.record["attention_logit"] = largest_logit(self._parts.stages, self._run.mesh)


class MeasureNoise(Hook):
    """Record the gradient noise scale every `observe.noise_scale_every` steps."""

    def __init__(self, run: Run, parts: RankModel, loader: Batches):
        assert isinstance(parts.engine, NativeEngine)
        self._run, self._loader = run, loader
        self._noise = NoiseScale(parts.engine, run.mesh)
        self._found: Record = {}

    def begin(self, step: Step) -> None:
        self._samples = self._loader.samples
        if self._run.due(step.number, self._run.config.observe.noise_scale_every):
            self._noise.begin()

    def before_update(self, step: Step) -> None:
        if not self._run.due(step.number, self._run.config.observe.noise_scale_every):
            return
        batch_size, plan = self._loader.samples - self._samples, self._run.plan
        # The estimate compares a small batch's gradient norm with the whole batch's. A replica's
        # gradient before the reduction is of one micro-batch at stage 2, else of all of its
        # micro-batches.
        num_small = batch_size // plan.micro_batch_size if plan.zero_stage == 2 else plan.data
        self._found = {"noise_scale": self._noise.end(batch_size, num_small)}

    def after_update(self, step: Step) -> None:
        step.record |= self._found
        self._found = {}

    def state(self) -> dict[str, Any]:
        return self._noise.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._noise.load_state(state)


class AnswerPrompts(Hook):
    """Answer the prompts of `observe.samples` every `observe.samples.every` steps."""

    def __init__(self, run: Run, parts: RankModel):
        self._run, self._parts = run, parts

    def is_due(self, step: Step) -> bool:
        return self._run.due(step.number, self._run.config.observe.samples.every) and not step.asked

    def act(self, step: Step) -> None:
        run, parts = self._run, self._parts
        if run.samples is None or self not in step.due:
            return
        NOW.begin("answering prompts", step.number)
        parts.train(False)
        answers = run.samples.answer(parts.stages, parts.pipeline, run.mesh)
        if run.recorder:
            run.recorder.samples(step.number, run.samples.prompts, answers)


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
