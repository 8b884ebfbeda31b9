"""What every part of a run must know, and how it opens what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.checkpoint.load import OpenModel, for_adapters, from_checkpoint, from_hf, from_seed
from megalite.checkpoint.match import base_files
from megalite.checkpoint.resume import find_checkpoint, way_back
from megalite.checkpoint.save import Saver
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.data.dataset import Split
from megalite.data.loader import Loader, Span
from megalite.data.mixture import Mixture
from megalite.engine import ReadState
from megalite.health.guard import Ending
from megalite.infer.in_training import SamplesInTraining, TargetsInTraining, TasksInTraining
from megalite.models import weight_table
from megalite.observe.recorder import Recorder
from megalite.plan import Plan
from megalite.runtime import error_file
from megalite.runtime.exit_codes import Exit

Data = Mapping[Split, Mixture | None]
"""The mixture of each split; None where there is none."""


@dataclass(frozen=True)
class Start:
    """State that a run begins with."""

    state: dict[str, Any]
    """train_state.json of the checkpoint, or what stands for one at step 0."""
    weights: ReadState
    base: dict[str, str]
    """Contents of the frozen model's files, from `base_files`."""
    begun: Mapping[str, int] = field(default_factory=dict)
    """After how many updates optimizer states began, where the optimizer changed: see
    `Engine.load`."""

    @property
    def step(self) -> int:
        """Return the number of steps that are done already."""
        return int(self.state["step"])


class Storage:
    """Finds, reads and saves a run's checkpoints, and reads the models that it begins from: what a
    disk holds. A dry run, whose files have no numbers, hands another to `train`."""

    find = staticmethod(find_checkpoint)
    base_files = staticmethod(base_files)
    open_model: OpenModel = staticmethod(from_hf)
    make_saver: Callable[..., Saver] = Saver

    def initial_state(self, config: Config, mesh: Mesh, checkpoint: Path | None) -> ReadState:
        """Return where weights and optimizer state come from: a `checkpoint` to resume, a model to
        start from, or the seed.

        Raises CheckpointError or ConfigError where these do not go with `config`."""
        weights = weight_table(config.model, config.lora)
        if config.lora:
            return for_adapters(config, weights, checkpoint, mesh, mesh.device, self.open_model)
        if checkpoint:
            return from_checkpoint(config, weights, checkpoint, mesh)
        if config.model.hf:
            return self.open_model(config.model.hf, weights, config.model, mesh, config.train.seed)
        return from_seed(config.train.seed, mesh, mesh.device)


DISK = Storage()
"""Where all runs keep what they save, but for dry ones."""


@dataclass(frozen=True)
class Run:
    """A run on one rank: what was asked for, and where to print what happens."""

    config: Config
    plan: Plan
    mesh: Mesh
    recorder: Recorder | None
    """Set on rank 0 only."""
    tasks: TasksInTraining | None = None
    samples: SamplesInTraining | None = None
    targets: TargetsInTraining | None = None
    storage: Storage = DISK

    def say(self, *lines: str) -> None:
        """Print lines to the console of rank 0."""
        for line in lines if self.recorder else ():
            self.recorder.message(line)  # type: ignore[union-attr]

    @property
    def last_step(self) -> int:
        """Return the step after which this start ends."""
        # `stop_at` ends this start only; the schedule still goes by `steps`.
        return min(self.config.train.stop_at or self.config.train.steps, self.config.train.steps)

    def due(self, step: int, every: int) -> bool:
        """Return whether something done every `every` steps, and after the last one, is due after
        `step`. With `every` 0 it is due after the last one only."""
        return step == self.last_step or (every > 0 and step % every == 0)

    def give_up(self, why: str) -> Ending:
        """Print why the run cannot go on, and how it can again; return its ending."""
        self.say(f"error: {why} (health.bad_steps_limit)")
        if self.recorder:
            self.say(
                *way_back(
                    self.config.run.folder / "checkpoints", self.config.health.bad_steps_limit
                )
            )
        error_file.leave(why)
        return Ending(Exit.BAD_NUMBERS)

    def status(self, ended: Ending) -> str:
        """Return how the run ended, in the recorder's words."""
        if ended.status is None:
            return "sent back"
        if ended.status == Exit.DONE and self.last_step == self.config.train.steps:
            return "finished"
        # "stopped" tells people that it goes on when started again: after bad numbers it would not.
        return "stopped" if ended.status in (Exit.DONE, Exit.STOPPED) else "failed"


def make_loader(
    mixture: Mixture,
    run: Run,
    start_sample: int = 0,
    skipped: Sequence[Span] = (),
    ramps: bool = False,
) -> Loader:
    """Open a loader of this rank's micro-batches of `mixture`, from sample `start_sample` of the
    run on, without those `skipped`. Where it `ramps`, the batches grow as `train.batch_ramp`
    says."""
    train, data = run.config.train, run.mesh.data
    return Loader(
        mixture,
        train.global_batch_size,
        run.plan.micro_batch_size,
        # Context, tensor and pipeline ranks of one data rank read the same samples.
        data.rank,
        data.size,
        start_sample,
        vocab_size=run.config.model.vocab_size,
        pin=run.mesh.device.type == "cuda",
        skipped=skipped,
        batch_size=train.batch_size if ramps else None,
    )
