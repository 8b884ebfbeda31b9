"""What a sweep's YAML file says: the config to begin with, the space of settings to search, and
what is best."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megalite.config import Config, Section
from megalite.config.errors import describe_errors, refusal
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.utils.resources import read_yaml, with_overrides
from megalite.utils.urls import check_no_secret

GROWING = ("tokens_per_s", "tflops", "mfu")
SHRINKING = ("loss", "perplexity", "grad_norm", "step_time_s")
Value = bool | int | float | str | None
"""What optuna chooses between; of other values, their JSON."""


class Dimension(Section):
    """The values that one setting may have: between two, or one of several."""

    between: tuple[int | float, int | float] | None = Field(
        None, description="Smallest and largest value; whole numbers where both are."
    )
    values: tuple[Any, ...] | None = Field(
        None, description="The values to choose between; a plain list says the same."
    )
    log: bool = Field(False, description="Spread the values between evenly over their logarithms.")
    step: float | None = Field(None, gt=0, description="Distance of the values between.")
    when: dict[str, Any] = Field(
        {},
        description="Only where other settings of the space have these values, or one of these in a list.",
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        if (self.between is None) == (self.values is None):
            raise ValueError("give either `between` or `values`")
        if self.values is not None and (self.log or self.step or not self.values):
            raise ValueError("`values` must not be empty, and know no `log` and no `step`")
        if self.between is None:
            return self
        low, high = self.between
        if not low < high:
            raise ValueError(
                f"between {low} and {high} there is nothing; give the smaller one first"
            )
        if self.log and (low <= 0 or self.step):
            raise ValueError("log needs numbers above 0, and no step")
        if self.is_whole and self.step and self.step != int(self.step):
            raise ValueError(
                f"step {self.step} leads from a whole number to none; write {low}.0 for fractions"
            )
        return self

    @property
    def is_whole(self) -> bool:
        return self.between is not None and all(isinstance(end, int) for end in self.between)

    @property
    def points(self) -> tuple[Any, ...]:
        """Return all values. Raises ValueError where they cannot be counted."""
        if self.values is not None:
            return self.values
        assert self.between is not None
        low, high = self.between
        step = self.step or (1 if self.is_whole and not self.log else None)
        if step is None:
            raise ValueError("a grid needs `values`, or a `step`")
        # 0.3 / 0.1 is a little below 3: the last value counts all the same.
        count = int((high - low) / step + 1e-9) + 1
        if self.is_whole:
            return tuple(low + number * int(step) for number in range(count))
        # And 3 x 0.1 a little above 0.3, which lies outside of the space.
        return tuple(min(low + number * step, high) for number in range(count))

    @property
    def ends(self) -> tuple[Any, ...]:
        """Return the values, or the smallest and the largest."""
        return self.values or self.between or ()

    def holds(self, chosen: Mapping[str, Any]) -> bool:
        """Return whether `when` is met by the values chosen so far."""
        for key, wanted in self.when.items():
            allowed = wanted if isinstance(wanted, list) else [wanted]
            # A setting that was itself left out by its own `when` meets none.
            if key not in chosen or chosen[key] not in allowed:
                return False
        return True


class Metric(Section):
    """A number of metrics.jsonl to make best."""

    metric: str
    maximize: bool | None = Field(
        None, description="Whether more is better. Left out where the name says it."
    )

    @property
    def grows(self) -> bool:
        """Return whether more is better."""
        if self.maximize is not None:
            return self.maximize
        return (
            self.metric in GROWING
            or self.metric.startswith("tasks/")
            or self.metric.endswith("accuracy")
        )

    @model_validator(mode="after")
    def _direction_is_known(self) -> Metric:
        # valid_loss/NAME is that of a source: its name says nothing.
        known = self.grows or self.metric.split("/")[0].endswith((*SHRINKING, "_ema"))
        if self.maximize is None and not known:
            raise ValueError(f"say `maximize: true` or `false` beside metric: {self.metric}")
        return self


class SweepConfig(Section):
    """Holds all settings of a sweep."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="Name of its folder in dir.",
    )
    dir: Path = Path("runs")
    config: Path = Field(description="YAML file of the config that every trial begins with.")
    settings: dict[str, Any] = Field(
        {}, description="Settings of all trials, such as train.steps: 200."
    )
    space: dict[str, Dimension] = Field(min_length=1, description="Values to try, by setting.")
    objective: tuple[Metric, ...] = Field(
        (Metric(metric="valid_loss"),),
        min_length=1,
        description="Metrics to make best; of several, the Pareto front.",
    )
    sampler: Literal["tpe", "random", "grid", "gp"] = "tpe"
    pruner: Literal["none", "median", "hyperband"] = Field(
        "none", description="What ends trials early that are behind others at a validation."
    )
    trials: int | None = Field(
        None, gt=0, description="Number of trials. A grid's is that of its points."
    )
    parallel: int = Field(1, gt=0, description="Trials at a time on a machine.")
    ranks: int | None = Field(
        None, gt=0, description="Ranks of a trial. Defaults to the fewest that the config needs."
    )
    seed: int = Field(0, ge=0, description="Seed of the sampler.")
    seeds: Literal["same", "different"] = Field(
        "same",
        description="same: all trials have the config's train.seed, and so the same weights and batches at first.",
    )
    storage: str = Field(
        "journal", description="journal: a file in the sweep's folder. Or the URL of a database."
    )

    @property
    def folder(self) -> Path:
        return self.dir / self.name

    @field_validator("space", mode="before")
    @classmethod
    def _lists_are_values(cls, space: Any) -> Any:
        if not isinstance(space, dict):
            return space
        dimensions = {}
        for key, each in space.items():
            dimensions[key] = {"values": each} if isinstance(each, list) else each
        return dimensions

    @field_validator("objective", mode="before")
    @classmethod
    def _names_are_metrics(cls, objective: Any) -> Any:
        several = objective if isinstance(objective, list | tuple) else [objective]
        metrics = []
        for each in several:
            metrics.append({"metric": each} if isinstance(each, str) else each)
        return metrics

    @field_validator("storage")
    @classmethod
    def _shared_by_workers(cls, storage: str) -> str:
        if storage != "journal" and "://" not in storage:
            raise ValueError("must be journal, or a URL such as postgresql://host/sweeps")
        if storage.startswith("sqlite"):
            raise ValueError(
                "SQLite loses writes on shared disks; the journal is the file that does not"
            )
        check_no_secret(storage)
        return storage

    @model_validator(mode="after")
    def _parts_fit(self) -> SweepConfig:
        seen: set[str] = set()
        for key, dimension in self.space.items():
            try:
                self._check_dimension(key, dimension, seen)
            except ValueError as error:
                raise ValueError(f"space.{key}: {error}") from None
            seen.add(key)
        if self.sampler != "grid" and self.trials is None:
            raise ValueError("trials is required, unless for sampler: grid")
        if len(self.objective) > 1 and self.pruner != "none":
            raise ValueError(
                f"pruner: {self.pruner} compares by one metric; with several give pruner: none"
            )
        return self

    def _check_dimension(self, key: str, dimension: Dimension, above: Set[str]) -> None:
        """Raise ValueError where a setting cannot be searched. `above` are those that are chosen
        before it."""
        if key.startswith("run."):
            raise ValueError("a trial has its own")
        if key in self.settings:
            raise ValueError("is in settings, too")
        for other in dimension.when:
            if other not in above:
                raise ValueError(f"when names {other}, which must be in the space above it")
        if self.sampler == "grid":
            dimension.points  # noqa: B018 (raises where they cannot be counted)

    @property
    def budget(self) -> int:
        """Return the number of trials."""
        limits = [] if self.trials is None else [self.trials]
        if self.sampler == "grid":
            limits.append(len(self.grid_points))
        return min(limits)

    @cached_property
    def grid_points(self) -> tuple[dict[str, Any], ...]:
        """Return all points of the grid, made once: workers ask for them with every trial."""
        return tuple(self.grid())

    def choose(self, choose: Callable[[str, Dimension], Any]) -> dict[str, Any]:
        """Return a value for each setting of the space whose conditions are met, each by
        `choose`."""
        chosen: dict[str, Any] = {}
        for key, dimension in self.space.items():
            if dimension.holds(chosen):
                chosen[key] = choose(key, dimension)
        return chosen

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield each point of the grid once, in the order of the space."""
        # Points that differ only in settings whose `when` is not met are one.
        seen = set()
        for point in itertools.product(*(dimension.points for dimension in self.space.values())):
            by_key = dict(zip(self.space, point, strict=True))
            chosen = self.choose(lambda key, dimension, by_key=by_key: by_key[key])  # type: ignore[misc]
            if (spelled := json.dumps(chosen, sort_keys=True)) not in seen:
                seen.add(spelled)
                yield chosen

    def trial_values(self, chosen: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Return the config of a trial with the `chosen` settings, as YAML has it. `folder` is that
        of its run, whose name ends with the number that makes its seed a different one."""
        settings = self.settings | dict(chosen)
        settings |= {"run.name": folder.name, "run.dir": str(folder.parent)}
        values = with_overrides(read_yaml(self.config), spelled_out(settings))
        more: dict[str, Any] = {}
        if self.seeds == "different":
            # By the folder, not by the trial: one that goes on with another's run has its seed.
            seed = (values.get("train") or {}).get("seed", 0)
            more["train.seed"] = seed + int(folder.name.rpartition("-")[2])
        # A section with nothing below it is None.
        wandb = (values.get("observe") or {}).get("wandb") or {}
        if wandb.get("mode", "disabled") != "disabled":
            more["observe.wandb.group"] = self.name
        return with_overrides(values, spelled_out(more))

    def check(self) -> Config:
        """Return the config of a trial at an end of the space. Raises ConfigError where a setting
        is not known, or the objective is not measured."""
        for end in (0, -1):  # of every dimension: a mistake is found before the first trial
            chosen = self.choose(lambda key, dimension, end=end: dimension.ends[end])  # type: ignore[misc]
            values = self.trial_values(chosen, self.folder / "trial-0000")
            config = parse_config(
                values, origin=f"{self.config} with {', '.join(spelled_out(chosen))}"
            )
        validated = config.data.valid or (config.data.split and config.data.split[1])
        for each in self.objective:
            if each.metric.startswith("valid_") and not validated:
                raise ConfigError(
                    f"objective {each.metric} needs data.valid or data.split in {self.config}"
                )
            if each.metric.startswith("tasks/") and not config.observe.tasks.names:
                raise ConfigError(
                    f"objective {each.metric} needs observe.tasks.names in {self.config}"
                )
        return config


def encoded(value: Any) -> Value:
    """Return what optuna stores for a value to choose."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value)


def spelled_out(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as overrides."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def load_sweep_config(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read the YAML file `path` and apply `overrides`, such as `trials=40`. Raises ConfigError with
    every mistake."""
    values = with_overrides(read_yaml(path), overrides)
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        mistakes = describe_errors(error, SweepConfig, values).split("\n  ")
        raise refusal(mistakes, str(path), overrides) from None
