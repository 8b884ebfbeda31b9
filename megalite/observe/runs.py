"""What is in the folders of runs: their model, layout, progress, losses and state."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError
from megalite.observe.environment import read_starts
from megalite.observe.jsonl import read_metrics
from megalite.runtime.run_folder import is_held
from megalite.utils.resources import read_yaml

TAIL = 1 << 20
"""Bytes at the end of a metrics.jsonl in which the last losses are looked for."""
AXES = {
    "tensor": "tensor",
    "pipeline": "pipeline",
    "context": "context",
    "expert": "expert",
    "zero_stage": "zero",
}
"""Settings of `parallel` that a table shows, with their names there."""


def run_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of runs in and below `root`, in the order of their names."""
    for folder, inner, files in os.walk(root):
        # A config alone may be one that somebody has written for runs to come.
        is_written = {"lock", "metrics.jsonl"} & {*files} or "checkpoints" in inner
        if "config.yaml" in files and is_written:
            yield Path(folder)
            inner.clear()  # `os.walk` goes no deeper: checkpoints have a config.yaml as well
        inner.sort()


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder has it."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return config.yaml. Raises ConfigError where it cannot be read."""
        return read_yaml(self.folder / "config.yaml")

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the config; empty where there is none."""
        with contextlib.suppress(ConfigError):
            found = self.config.get(name)
            return found if isinstance(found, dict) else {}
        return {}

    @property
    def model(self) -> str:
        """Return the preset, the Hugging Face folder or the family of the model."""
        model = self.section("model")
        path = Path(str(model.get("hf") or ""))
        # Of a checkpoint the run is named, RUN/checkpoints/step-N: many have the same number.
        name = path.parents[1].name if path.parent.name == "checkpoints" else path.name
        return str(model.get("preset") or name or model.get("family") or "-")

    @property
    def layout(self) -> str:
        """Return the axes of more than one rank, as the last start recorded them; without a record,
        as the config has them."""
        starts = read_starts(self.folder)
        axes = starts[-1].get("layout") if starts else None
        if not isinstance(axes, dict) or not axes:
            parallel = self.section("parallel")
            axes = {shown: parallel.get(name) for name, shown in AXES.items()}
        names = [name for name in ("data", *AXES.values()) if name != "zero"]
        many = [f"{name} {axes[name]}" for name in names if _above_one(axes.get(name))]
        if not many:
            return "one rank"
        if axes.get("zero"):
            many.append(f"ZeRO-{axes['zero']}")
        return ", ".join(many)

    @property
    def steps(self) -> int:
        """Return the steps that the run is to have; 0 where they are not known."""
        steps = self.section("train").get("steps")
        return steps if isinstance(steps, int) else 0

    @cached_property
    def last(self) -> dict[str, Any]:
        """Return the newest value of each metric that the end of metrics.jsonl has."""
        newest: dict[str, Any] = {}
        for record in _tail(self.folder / "metrics.jsonl"):
            newest |= record
        return newest

    @property
    def state(self) -> str:
        """Return running, finished, stopped, failed or killed; or new, before the first step."""
        if is_held(self.folder):
            return "running"
        starts = read_starts(self.folder)
        if starts and isinstance(ended := starts[-1].get("ended"), dict):
            return str(ended.get("status"))
        if self.steps and self.last.get("step", 0) >= self.steps:
            return "finished"
        # A start that leaves no end was not asked to leave.
        return "killed" if starts else "stopped" if self.last else "new"

    @property
    def changed(self) -> float:
        """Return when the run wrote last, in seconds since 1970."""
        for name in ("metrics.jsonl", "config.yaml"):
            with contextlib.suppress(OSError):
                return (self.folder / name).stat().st_mtime
        return 0.0

    def records(self) -> list[dict[str, Any]]:
        """Return all of metrics.jsonl; nothing where there is none."""
        with contextlib.suppress(OSError):
            return list(read_metrics(self.folder / "metrics.jsonl"))
        return []


def table_of_runs(root: Path) -> list[list[str]]:
    """Return a header and a row for each run in `root`, the one that wrote last first. Raises
    ConfigError where there is none."""
    found = [RunRecord(folder) for folder in run_folders(root)]
    if not found:
        raise ConfigError(f"{root} holds no run: no folder with a config.yaml that a run wrote")
    rows = [["run", "model", "layout", "steps", "loss", "valid", "state", "last written"]]
    for run in sorted(found, key=lambda run: run.changed, reverse=True):
        name = run.folder.relative_to(root) if run.folder != root else run.folder
        progress = f"{run.last.get('step', 0):,}/{run.steps:,}"
        losses = (_number(run.last.get(key)) for key in ("loss", "valid_loss"))
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.changed))
        rows.append([str(name), run.model, run.layout, progress, *losses, run.state, when])
    return rows


def _tail(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records in the last TAIL bytes."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
        for line in file.read(TAIL).splitlines():
            with contextlib.suppress(ValueError):  # a part of a line, or none
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    yield record


def _above_one(size: Any) -> bool:
    return isinstance(size, int) and size > 1


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
