"""Hands what happens in a run to its sinks. Rank 0 only. A sink that fails is dropped with one warning: training never
ends because something could not be written down."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from megalite.config import Config
from megalite.observe.console import Console
from megalite.observe.jsonl import JsonlSink
from megalite.observe.plot import PlotSink
from megalite.observe.tensorboard import TensorboardSink
from megalite.observe.wandb import WandbSink
from megalite.secrecy import hide_secrets


class Sink(Protocol):
    """Where records go. `name` is what a warning calls it."""

    name: str

    def step(self, record: dict[str, float]) -> None: ...
    def evaluation(self, record: dict[str, float]) -> None: ...
    def tasks(self, record: dict[str, float]) -> None: ...
    def close(self, status: str) -> None: ...


S = TypeVar("S", bound=Sink)


class Recorder:
    """The sinks `config.observe` asks for, writing to the run folder `folder`.

    `start_step` is the step of the checkpoint the run is resumed from, 0 for a new run; `wandb_id` the one that
    checkpoint holds; `layout` what the header shows, such as {"tensor": 2, "data": 4}."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        num_params: int,
        start_step: int = 0,
        wandb_id: str | None = None,
        layout: Mapping[str, object] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        self.wandb_id = wandb_id
        self._sinks: list[Sink] = []
        self._console: Console | None = None
        self._console = self._add(lambda: Console(config, folder, num_params, start_step, layout or {}), "console")
        self._add(lambda: JsonlSink(metrics, start_step, self.message), JsonlSink.name)
        if config.observe.tensorboard:
            self._add(lambda: TensorboardSink(folder / "tensorboard", start_step), TensorboardSink.name)
        if config.observe.wandb.mode != "disabled":
            wandb = self._add(lambda: WandbSink(config, folder, wandb_id, self.message), WandbSink.name)
            self.wandb_id = wandb.id if wandb else wandb_id
        self._add(lambda: PlotSink(metrics, folder / "loss.png"), PlotSink.name)  # last: it reads what jsonl wrote

    def step(self, record: dict[str, float]) -> None:
        """`record`: step, loss, lr, grad_norm, tokens (so far), tokens_per_s, step_time_s; where known tflops, mfu,
        memory_gb; tokens/NAME (so far) of each source where there are several; straggler (a rank) and
        straggler_slowness (times its peers' median) while one is named; and as 1 where it is so: not_finite,
        loss_spike, grad_norm_spike, no_labels (its loss is NaN), skipped (the step updated nothing); skipped_samples
        (so far) after a rewind."""
        self._each(lambda sink: sink.step(record))

    def evaluation(self, record: dict[str, float]) -> None:
        """`record`: step, valid_loss, valid_perplexity, and valid_loss/NAME of each source where there are several; or
        the same of test."""
        self._each(lambda sink: sink.evaluation(record))

    def tasks(self, record: dict[str, float]) -> None:
        """`record`: step, and tasks/NAME/METRIC of each."""
        self._each(lambda sink: sink.tasks(record))

    def message(self, text: str) -> None:
        """A line on the console."""
        text = hide_secrets(text)
        try:
            if self._console is not None:
                self._console.message(text)
            else:
                print(text, file=sys.stderr, flush=True)
        except Exception:  # nobody is left to tell
            self._console = None

    def close(self, status: str) -> None:
        """`status` is "finished", "stopped" (to be resumed), "sent back" or "failed"."""
        # In reverse, so that what the others still have to say stands above the console's last line.
        self._sinks.reverse()
        self._each(lambda sink: sink.close(status))
        self._sinks.clear()

    def _add(self, make: Callable[[], S], name: str) -> S | None:
        try:
            sink = make()
        except Exception as error:
            self._warn(name, error)
            return None
        self._sinks.append(sink)
        return sink

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in tuple(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                if sink is self._console:
                    self._console = None
                self._warn(sink.name, error)

    def _warn(self, name: str, error: Exception) -> None:
        hint = "; pip install 'megalite[observe]'" if isinstance(error, ImportError) else ""
        self.message(f"warning: {name} turned off, training goes on: {error or type(error).__name__}{hint}")
