"""A run as it is traced: its data, and which samples each of its steps was of."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megalite.checkpoint.folder import complete_steps, step_folder
from megalite.checkpoint.train_state import read_train_state
from megalite.config import Config
from megalite.config_file import load_config
from megalite.data.checks import open_data
from megalite.data.loader import Span, number_samples
from megalite.data.mixture import Mixture
from megalite.data.order import Int64s
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.observe.jsonl import read_metrics


@dataclass(frozen=True)
class TracedRun:
    """Holds what decides which token was trained on when."""

    config: Config
    tokenizer: Tokenizer | None
    mixture: Mixture
    skipped: tuple[Span, ...]
    """Samples that the run passed over."""
    done: dict[int, int]
    """Samples after each step that the run has noted."""
    refused: frozenset[int]
    """Steps among them that updated nothing, for bad numbers."""
    known_until: int
    """Last step whose samples are known: those passed over later are noted by the next
    checkpoint."""

    @classmethod
    def open(cls, what: Path) -> TracedRun:
        """Open a run's folder, or a config (.yaml) of a run to come. Raise ConfigError, or
        DataError where the data is not what the run was trained on."""
        is_run = what.is_dir()
        if is_run and not (what / "config.yaml").is_file():
            raise ConfigError(f"{what} is no run: there is no config.yaml in it")
        config, tokenizer, data = open_data(load_config(what / "config.yaml" if is_run else what))
        mixture = data["train"]
        assert mixture is not None
        state = newest_state(what) if is_run else None
        skipped: tuple[Span, ...] = ()
        if state is not None:
            mixture.check_state(state["data"])
            skipped = tuple((first, last) for first, last in state["data"].get("skipped", ()))
        done, refused, passed = _read_steps(what / "metrics.jsonl", config.sample_tokens)
        known = config.train.steps
        # metrics.jsonl counts the samples passed over at once, a checkpoint names them: where the
        # counts differ, those of the steps behind the checkpoint are not known yet.
        if passed != sum(last - first for first, last in skipped):
            known = 0 if state is None else int(state["step"])
        return cls(config, tokenizer, mixture, skipped, done, refused, known)

    def samples_after(self, step: int) -> int:
        """Return how many samples the run has trained on after a step: as noted, or, of steps that
        are not, as the config says."""
        if step in self.done:
            return self.done[step]
        earlier = bisect_left(self._steps, step)
        last = self._steps[earlier - 1] if earlier else 0
        if not last:
            return self.config.train.samples_after(step)
        samples = self.done[last]
        # The size of batches may have been another one before: go on from what is noted.
        for _ in range(step - last):
            samples += self.config.train.batch_size(samples)
        return samples

    @cached_property
    def _steps(self) -> list[int]:
        """Return the steps that are noted, ascending."""
        return sorted(self.done)

    @property
    def num_steps(self) -> int:
        """Return how many steps the run has made; of a run to come, will make."""
        last = self._steps[-1] if self._steps else self.config.train.steps
        return min(last, self.known_until)

    def samples_of(self, step: int) -> Int64s:
        """Return the samples, [G], of a step's global batch. Raise ConfigError for one that the
        run does not have."""
        if not 1 <= step <= self.config.train.steps:
            raise ConfigError(
                f"--step {step} is not in 1 … {self.config.train.steps}, the steps of the run"
            )
        if step > self.known_until:
            raise ConfigError(
                f"--step {step}: after a rewind the run passed over samples, which its next checkpoint will name; "
                f"until then steps up to {self.known_until} can be traced"
            )
        places = np.arange(self.samples_after(step - 1), self.samples_after(step))
        return number_samples(places, self.skipped)

    def step_of(self, sample: int) -> tuple[int, int] | None:
        """Return the step that a sample of the mixture was trained on in, and its number in that
        step's batch; None if it was passed over, or does not come in the run's steps."""
        # The inverse of `number_samples`. Each span is compared with the sample itself, not with
        # its place so far, so that their order does not matter.
        place = sample
        for first, last in reversed(self.skipped):
            if first <= sample < last:
                return None
            place -= max(min(sample, last) - first, 0)
        if place >= self.samples_after(self.num_steps):
            return None
        # The first step behind which the run has been through this place.
        step = bisect_left(range(self.num_steps + 1), place + 1, key=self.samples_after)
        return step, place - self.samples_after(step - 1)

    @property
    def num_samples(self) -> int:
        """Return how many samples of the mixture the run has been through, with those passed
        over."""
        last = self.samples_after(self.num_steps) - 1
        return int(number_samples(np.array([last]), self.skipped)[0]) + 1


def newest_state(folder: Path) -> dict[str, Any] | None:
    """Return the train_state.json of a run's newest checkpoint, None if it has none."""
    steps = complete_steps(folder / "checkpoints")
    return read_train_state(step_folder(folder / "checkpoints", steps[-1])) if steps else None


def _read_steps(path: Path, sample_tokens: int) -> tuple[dict[int, int], frozenset[int], int]:
    """Return the samples after each step in a metrics.jsonl, the steps that updated nothing, and
    how many samples the last one had passed over."""
    done, refused, passed = {}, set(), 0
    for record in read_metrics(path) if path.is_file() else ():
        # Records of evaluations have a step as well, but no loss.
        if isinstance(record.get("tokens"), int) and "loss" in record:
            step = int(record["step"])
            done[step] = record["tokens"] // sample_tokens
            passed = int(record.get("skipped_samples") or 0)
            if record.get("skipped"):
                refused.add(step)
    return done, frozenset(refused), passed
