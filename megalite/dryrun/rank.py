"""One rank of a dry run: `megalite.train.train` from its start to its save, and the record of what
it did."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalite.dryrun.device import Places

STEADY = "training"
"""Phase of the steps after the first: these are what a plan is about."""
RESTART = "restart"
"""Phase of a run that resumes, from its search for a checkpoint to its first step."""


@dataclass(frozen=True)
class Job:
    """What a rank of a dry run needs to know."""

    config: str
    """Path of the config."""
    rank: int
    world_size: int
    gpus_per_node: int
    chip: str
    engine: str = "native"
    begins_at: int = 0
    """Step of the checkpoint that it resumes from; 0 for none."""
    leaves: bool = False
    """Whether its checkpoint is resumed from later."""


@dataclass
class Record:
    """What a rank did. Bytes are of the GPU unless said otherwise."""

    rank: int
    seconds: float = 0.0
    error: str = ""
    """Last line of what ended it before its time; empty where nothing did."""
    mistake: bool = False
    """Whether that was a mistake in the config."""
    trace: str = ""
    peaks: dict[str, int] = field(default_factory=dict)
    """Most bytes allocated in each phase."""
    at_peak: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes at the peak of each phase, by what they are for."""
    largest: list[tuple[str, int]] = field(default_factory=list)
    """Places with the most bytes at the highest peak of all."""
    fullest: str = ""
    """Place whose allocation made that peak."""
    waits: list[tuple[str, str, str, int]] = field(default_factory=list)
    """(phase, reason, place, how often) of the host's waits for the device."""
    gathered: int = 0
    """Bytes of a checkpoint that the rank's host holds."""
    traffic: dict[str, Any] = field(default_factory=dict)
    """What `groups.Log` wrote down."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def run_rank(job: Job, device: Any, places: Places) -> Record:
    """Run the training program as one rank. `device` is the module that counts memory, `places`
    knows the code."""
    from megalite.dryrun.groups import open_groups

    # As torchrun would have set them.
    env = {
        "RANK": job.rank,
        "WORLD_SIZE": job.world_size,
        "LOCAL_RANK": job.rank % job.gpus_per_node,
        # Memory that ranks of a host share is not there.
        "LOCAL_WORLD_SIZE": 1,
    }
    os.environ |= {name: str(value) for name, value in env.items()}
    record = Record(job.rank)
    log = open_groups(job.rank, job.world_size, places) if job.world_size > 1 else None
    phases = Phases(device, places, log, record)
    try:
        from megalite.config_file import load_config
        from megalite.dryrun.checkpoint import DryStorage
        from megalite.errors import ConfigError, DataError
        from megalite.train import train

        config = load_config(Path(job.config))
        stand_in(log, phases, places)
        storage = DryStorage(job, config, record, log, phases, places)
        try:
            status = train(config, storage)
        except (ConfigError, DataError) as error:
            record.error, record.mistake = str(error), True
        else:
            record.error = "" if status == 0 else f"the run ended with status {status}"
            if not record.error and phases.first_step != job.begins_at + 1:
                record.error = (
                    f"it began with step {phases.first_step} instead of resuming at {job.begins_at}"
                )
    except BaseException as error:
        record.error = f"{type(error).__name__}: {error}"
        record.trace = traceback.format_exc()
    phases.end()
    record.waits = [(*key, count) for key, count in places.waits.items()]
    if log:
        record.traffic = {
            "groups": log.groups, "parts": log.parts, "launches": log.launches, "phases": log.phases,
            "places": places.names,
        }  # fmt: skip
    return record


class Phases:
    """Keeps the peaks of the run's phases apart."""

    def __init__(self, device: Any, places: Places, log: Any, record: Record):
        self._device, self._places, self._log, self._record = device, places, log, record
        self._name = places.phase
        self.logits = 0
        """Elements of a micro-batch's logits."""
        self.first_step = 0
        """The first step that was made."""

    def begin(self, name: str) -> None:
        """End the phase that was, and begin another."""
        self._close()
        self._name = self._places.phase = name
        # To what is allocated now: weights and states of earlier phases count in every later one.
        self._device.reset_peak()
        if self._log:
            self._log.begin(name)

    def end(self) -> None:
        """End the last phase."""
        self._close()

    def _close(self) -> None:
        peak = self._device.peak()
        peaks = self._record.peaks
        highest = max(peaks.values(), default=0)
        # A phase comes again (training after each save): its highest peak counts.
        if peak <= peaks.get(self._name, -1):
            return
        peaks[self._name] = peak
        found = self._device.at_peak()
        uses, names = Counter[str](), Counter[str]()
        for place, size in found.items():
            uses[use_of(self._places.functions[place], self._name)] += size
            names[self._places.names[place]] += size
        self._record.at_peak[self._name] = dict(uses)
        if peak > highest:
            self._record.largest = names.most_common(8)
            self._record.fullest = self._places.names[self._device.peak_place()]


USES = {
    "engine/buckets.py:BucketWeights.__init__": "weights",
    "engine/buckets.py:BucketState.__init__": "optimizer",
    "engine/buckets.py:BucketState.whole_grads": "gradients",
    "engine/gradients.py": "gradients",
    "engine/": "update",
    "training/loop.py": "update",
    "health/": "update",
}
"""What memory is for, by the beginning of the function that allocates it. All else is
activations."""


def use_of(function: str, phase: str) -> str:
    """Return what memory is for that `function` (`file:function:caller`) allocated."""
    for beginning, use in USES.items():
        if function.startswith(beginning):
            return "save" if use == "update" and phase == "saving" else use
    return "logits" if function.endswith(":project") else "activations"


def stand_in(log: Any, phases: Phases, places: Places) -> None:
    """Put stand-ins in the place of what a rank alone, without data and without a GPU, cannot
    do."""
    from megalite.dryrun.deepspeed import spans_of
    from megalite.engine.deepspeed import DeepSpeedEngine
    from megalite.kernels import library
    from megalite.observe.plot import PlotSink
    from megalite.parallel import expert
    from megalite.runtime.activity import NOW

    def begin(phase: str, step: int) -> None:
        phases.begin(phase)
        phases.first_step = phases.first_step or step

    NOW.watcher = begin
    library.assume_built()

    def balanced_counts(leaving: Any, arriving: Any, rank: int, num_rows: int) -> Any:
        places.ask("waits: a number is read")
        ranks, experts = leaving.shape
        return _balanced_counts(ranks, experts, rank, num_rows)

    # Losses of nothing, whose picture would take as long as some steps.
    PlotSink._draw = lambda self: None  # type: ignore[method-assign]
    expert.read_counts = balanced_counts
    DeepSpeedEngine._share_spans = spans_of  # type: ignore[method-assign,assignment]
    if log:
        _static_pipelines()
        places.on_wait = log.synchronize


def _balanced_counts(
    ranks: int, experts: int, rank: int, num_rows: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the rows that leave for each of the `experts` of each rank, and those that arrive, when
    a router sends `num_rows` in balance."""
    # As many rows for each expert as come out even, the rest one each.
    even, more = divmod(num_rows, ranks * experts)
    leaves = [
        [even + (number * experts + expert < more) for expert in range(experts)]
        for number in range(ranks)
    ]
    return leaves, [leaves[rank]] * ranks


def _static_pipelines() -> None:
    """Let torch's stages vote as they do where all of them know their shapes: the votes of others
    are not there."""
    with contextlib.suppress(ImportError, AttributeError):  # before torch 2.13 there is no vote
        from torch.distributed.pipelining import schedules
        from torch.distributed.pipelining.stage import InferenceMode

        vote = schedules._PipelineSchedule._warmup_p2p

        def static(self: Any, stages: Any, *arguments: Any, **options: Any) -> None:
            vote(self, stages, *arguments, **options)
            for stage in stages:
                assert not InferenceMode.needs_dynamic(stage._user_meta, True)
                stage._inference_mode = InferenceMode.STATIC

        schedules._PipelineSchedule._warmup_p2p = static  # type: ignore[method-assign]
