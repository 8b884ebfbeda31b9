"""Hands the records of a run to its sinks: console, environment.json, metrics.jsonl, samples.jsonl, TensorBoard, W&B,
MLflow, Prometheus, a webhook, loss.png. Rank 0 only.

A sink that fails is dropped with one warning: training never ends because something could not be
recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from megalite.config import Config
from megalite.observe.band import Band, BandSink
from megalite.observe.console import Console
from megalite.observe.environment import EnvironmentSink
from megalite.observe.jsonl import JsonlSink, SamplesSink
from megalite.observe.mlflow import MlflowSink
from megalite.observe.plot import PlotSink
from megalite.observe.prometheus import PrometheusSink
from megalite.observe.tensorboard import TensorboardSink
from megalite.observe.wandb import WandbSink
from megalite.observe.webhook import WebhookSink
from megalite.utils.secrecy import hide_secrets


class Sink(Protocol):
    """Receives the records of a run (see `Recorder` for their keys). `name` is how warnings call
    it."""

    name: str

    def step(self, record: dict[str, float]) -> None:
        """Receive the record of a training step."""

    def evaluation(self, record: dict[str, float]) -> None:
        """Receive the record of an evaluation."""

    def tasks(self, record: dict[str, float]) -> None:
        """Receive the results of downstream tasks."""

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Receive the answers to prompts after a step."""

    def close(self, status: str) -> None:
        """Write what is pending and end. No other call follows."""


S = TypeVar("S", bound=Sink)


class Recorder:
    """Hands each record to the sinks that `config.observe` asks for.

    They write to the run folder `folder`. `num_params` is the model's size; `start_step` the step
    of the checkpoint the run is resumed from, 0 for a new run; `wandb_id` the W&B run that
    checkpoint names; `layout` what the header shows of the parallel layout, such as {"tensor": 2,
    "data": 4}, and `hardware` of what it runs on; `band` says between what validation losses are
    expected."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        num_params: int,
        start_step: int = 0,
        wandb_id: str | None = None,
        layout: Mapping[str, object] | None = None,
        hardware: str = "",
        band: Band | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        self.wandb_id = wandb_id
        self._sinks: list[Sink] = []
        # None first: the console may fail to start, and `_add` then prints its warning without one.
        self._console: Console | None = None
        shown = layout or {}
        self._console = self._add(
            lambda: Console(config, folder, num_params, start_step, shown, hardware), "console"
        )
        self._add(
            lambda: EnvironmentSink(folder, start_step, shown, hardware), EnvironmentSink.name
        )
        self._add(lambda: JsonlSink(metrics, start_step, self.message), JsonlSink.name)
        if config.observe.samples.prompts:
            self._add(
                lambda: SamplesSink(folder / "samples.jsonl", start_step, self.message),
                SamplesSink.name,
            )
        if config.observe.tensorboard:
            self._add(
                lambda: TensorboardSink(folder / "tensorboard", start_step), TensorboardSink.name
            )
        if config.observe.wandb.mode != "disabled":
            wandb = self._add(
                lambda: WandbSink(config, folder, wandb_id, self.message), WandbSink.name
            )
            self.wandb_id = wandb.id if wandb else wandb_id
        if config.observe.mlflow.tracking_uri:
            self._add(lambda: MlflowSink(config, folder, self.message), MlflowSink.name)
        asked = config.observe.prometheus
        if asked.port or asked.textfile:
            self._add(
                lambda: PrometheusSink(config, num_params, start_step, shown), PrometheusSink.name
            )
        if config.observe.webhook:
            self._add(lambda: WebhookSink(config, start_step), WebhookSink.name)
        if band:
            self._add(lambda: BandSink(band, self.message), BandSink.name)
        # Last: it reads what jsonl wrote.
        self._add(lambda: PlotSink(metrics, folder / "loss.png", band), PlotSink.name)

    def step(self, record: dict[str, float]) -> None:
        """Record a training step.

        `record` has step, loss, lr, grad_norm, tokens (so far), tokens_per_s and step_time_s; where
        known tflops, mfu and memory_gb; tokens/NAME (so far) of each of several sources; straggler
        (a rank) and straggler_slowness (multiple of its peers' median) while one is reported;
        skipped_samples (so far) after a rewind; grad_norm/N, activation_rms/N, attention_logit/N and
        fp8_underflow/N of layers, and noise_scale, in steps that measure them; attention_logit under QK-clip. Flags
        are 1 or absent: not_finite, loss_spike, grad_norm_spike, no_labels (its loss is NaN),
        skipped (no update)."""
        self._each(lambda sink: sink.step(record))

    def evaluation(self, record: dict[str, float]) -> None:
        """Record an evaluation.

        `record` has step, valid_loss, valid_perplexity and valid_loss/NAME of each of several
        sources; or the same of test."""
        self._each(lambda sink: sink.evaluation(record))

    def tasks(self, record: dict[str, float]) -> None:
        """Record the results of downstream tasks. `record` has step and tasks/NAME/METRIC of
        each."""
        self._each(lambda sink: sink.tasks(record))

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Record the model's answers to prompts, after a step."""
        self._each(lambda sink: sink.samples(step, prompts, answers))

    def message(self, text: str) -> None:
        """Print a line on the console, or on stderr if there is none."""
        # Messages may quote a config or a URL, and logs are passed on.
        text = hide_secrets(text)
        try:
            if self._console is not None:
                self._console.message(text)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:  # nobody is left to tell
            self._console = None

    def close(self, status: str) -> None:
        """Close all sinks. `status` is "finished", "stopped" (to be resumed), "sent back" or
        "failed"."""
        # In reverse: what the other sinks still have to say stands above the console's last line.
        self._sinks.reverse()
        self._each(lambda sink: sink.close(status))
        self._sinks.clear()

    def _add(self, make: Callable[[], S], name: str) -> S | None:
        """Make a sink and add it; None, with a warning, if that fails."""
        try:
            sink = make()
        except Exception as error:
            self._warn(name, error)
            return None
        self._sinks.append(sink)
        return sink

    def _each(self, call: Callable[[Sink], None]) -> None:
        """Call every sink, and drop those that fail."""
        for sink in tuple(self._sinks):
            try:
                call(sink)
            except Exception as error:
                # Before the warning, which goes to the console: were it the one that failed, it
                # would fail again.
                self._sinks.remove(sink)
                if sink is self._console:
                    self._console = None
                self._warn(sink.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        hint = "; pip install 'megalite[observe]'" if isinstance(error, ImportError) else ""
        reason = str(error) or type(error).__name__
        self.message(f"warning: {name} turned off, training goes on: {reason}{hint}")
