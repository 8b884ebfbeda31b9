"""Warn about settings that a config gives and that change nothing in this run: whoever wrote them
should know.

A start prints one line for each. It does not refuse: a run made shorter for a try keeps the rest of
its config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce

from pydantic import BaseModel

from megalite.config import Config

IDLE: tuple[tuple[str, tuple[str, ...], str, Callable[[Config], bool]], ...] = (
    (
        "observe.wandb", ("project", "entity", "group", "tags"), "observe.wandb.mode: online or offline",
        lambda c: c.observe.wandb.mode != "disabled",
    ),
    (
        "observe.mlflow", ("experiment",), "observe.mlflow.tracking_uri",
        lambda c: bool(c.observe.mlflow.tracking_uri),
    ),
    (
        "observe.tasks", ("every", "include_path", "limit"), "observe.tasks.names",
        lambda c: bool(c.observe.tasks.names),
    ),
    (
        "observe.samples", ("every", "max_tokens"), "observe.samples.prompts",
        lambda c: bool(c.observe.samples.prompts),
    ),
    ("observe", ("eval_every", "eval_batches"), "data.valid or data.split", lambda c: has_valid(c)),
    ("profile", ("ranks", "memory"), "profile.steps", lambda c: bool(c.profile.steps)),
    (
        "optimizer.schedule", ("min_lr",), "an optimizer.schedule.name other than constant",
        lambda c: c.optimizer.schedule.name != "constant",
    ),
    (
        "parallel.offload", ("nvme_path",), "parallel.offload.optimizer or .parameters: nvme",
        lambda c: "nvme" in (c.parallel.offload.optimizer, c.parallel.offload.parameters),
    ),
    (
        "parallel", ("tensor_overlap",), "parallel.tensor above 1, and parallel.sequence: true",
        lambda c: c.parallel.tensor > 1 and c.parallel.sequence,
    ),
    ("parallel", ("virtual",), "parallel.pipeline above 1", lambda c: c.parallel.pipeline > 1),
    ("parallel", ("context_method",), "parallel.context above 1", lambda c: c.parallel.context > 1),
    ("data", ("temperature",), "several sources under data.train", lambda c: len(c.data.train) > 1),
)  # fmt: skip
"""A section, settings of it, what they need, and whether the config has that."""


def has_valid(config: Config) -> bool:
    """Return whether the config has validation data."""
    return bool(config.data.valid or (config.data.split and config.data.split[1]))


def no_effect(config: Config, start_step: int, world_size: int) -> list[str]:
    """List the settings that differ from their defaults and yet do nothing in a run of `config`
    from `start_step` on, with `world_size` ranks: one warning each."""
    return [
        f"warning: {line}"
        for line in (*_idle(config), *_out_of_range(config, start_step, world_size))
    ]


def _idle(config: Config) -> Iterator[str]:
    """Yield the settings that need another setting to have an effect."""
    for at, names, needs, is_met in IDLE:
        if is_met(config):
            continue
        section: BaseModel = reduce(getattr, at.split("."), config)
        for name in names:
            value = getattr(section, name)
            # A setting at its default may come from a config that was written out in full.
            if value != type(section).model_fields[name].get_default(call_default_factory=True):
                shown = list(value) if isinstance(value, tuple) else value
                yield f"{at}.{name} = {shown} has no effect; it needs {needs}"


def _out_of_range(config: Config, start_step: int, world_size: int) -> Iterator[str]:
    """Yield the settings that name steps or ranks which this start does not have."""
    steps, stop_at, profile = config.train.steps, config.train.stop_at, config.profile
    # Steps are counted from 1, and stop_at is the last one that is made.
    last = min(stop_at or steps, steps)
    if start_step >= last:
        what = f"train.stop_at = {stop_at}" if last < steps else f"train.steps = {steps}"
        # All else would be about steps that are not made.
        yield f"{what}, and {start_step} steps are done already: there is nothing to do"
        return
    if stop_at and stop_at > steps:
        yield f"train.stop_at = {stop_at} has no effect: the last step is train.steps = {steps}"
    if profile.steps and (profile.steps[0] > last or profile.steps[1] <= start_step):
        yield (
            f"profile.steps = {list(profile.steps)} has no effect: this start trains steps {start_step + 1} to {last}"
        )
    elif profile.steps and (profile.steps[1] > last or profile.steps[0] <= start_step):
        yield f"profile.steps = {list(profile.steps)} is cut: this start trains steps {start_step + 1} to {last}"
    if profile.steps and (beyond := [rank for rank in profile.ranks if not 0 <= rank < world_size]):
        yield f"profile.ranks = {list(profile.ranks)}: there is no rank {beyond[0]} among {world_size}"
    for phase in config.data.phases:
        if phase.after_step >= steps:
            yield f"data.phases: the phase after step {phase.after_step} never begins; train.steps = {steps}"
