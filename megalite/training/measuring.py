"""Hooks that measure: what they find goes into a step's record, or to the console and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalite.data.loader import Batches
from megalite.engine.native import NativeEngine
from megalite.health.stragglers import Stragglers
from megalite.models import weight_table
from megalite.observe.experts import ExpertLoads, plot_loads
from megalite.observe.layers import LayerMeasures, largest_logit
from megalite.observe.noise import NoiseScale
from megalite.observe.profiler import Profiler
from megalite.observe.steps import Record
from megalite.observe.tensors import KINDS, folder_of, write_numbers, write_tensors
from megalite.runtime.activity import NOW
from megalite.training.hooks import Hook, Step
from megalite.training.parts import RankModel
from megalite.training.run import Run


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
