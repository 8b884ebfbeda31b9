"""The console: one live line on a terminal or in a notebook, or one plain line every
`observe.log_every` steps in a log file."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import rich.console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from megalite.config import Config
from megalite.models import weight_table
from megalite.observe.jsonl import read_metrics
from megalite.utils.counts import compact
from megalite.utils.notebook import NotebookBar, in_notebook

REDRAW_SECONDS = 0.1


class Console:
    """Sink that prints the progress of a run for a person, and the messages of its parts."""

    name = "console"

    def __init__(
        self,
        config: Config,
        folder: Path,
        num_params: int,
        start_step: int,
        layout: Mapping[str, object],
        hardware: str = "",
    ) -> None:
        """Print the header. The parameters are those of `Recorder`; `folder` is the run's."""
        self._total = config.train.steps
        self._width = len(str(self._total))
        self._log_every = config.observe.log_every
        self._folder = folder
        self._first_step = start_step + 1
        self._loss: float | None = None
        # Of the steps since the last line of a log file.
        self._losses: list[float] = []
        # A resumed run goes on comparing with the validation losses from before.
        found = list(_valid_losses(folder / "metrics.jsonl", start_step)) if start_step else []
        self._valid: float | None = found[-1] if found else None
        self._best = min(found, default=math.inf)
        self._began = time.perf_counter()
        # When each of the last steps ended.
        self._pace: deque[tuple[float, int]] = deque(maxlen=100)
        self._drawn = 0.0
        self._lost = 0
        self._why = ""
        self._rich = rich.console.Console(highlight=False)
        # A log file gets plain prints: no width to wrap at, and flushed line by line.
        live = sys.stdout.isatty() and not self._rich.is_dumb_terminal
        self._progress = self._live_line(start_step) if live else None
        self._bar = NotebookBar() if in_notebook() else None
        self._header(config, num_params, start_step, layout, hardware)
        if self._progress:
            self._progress.start()
        if self._bar:
            self._bar.show(start_step, self._total, "first step ...")

    def _live_line(self, start_step: int) -> Progress:
        columns: list[ProgressColumn] = []
        if self._rich.width >= 100:  # on a narrow terminal the numbers need the room
            columns.append(BarColumn(bar_width=20, complete_style="cyan", finished_style="green"))
        count = f"{{task.completed:{self._width}.0f}}[dim]/{{task.total:.0f}}[/]"
        columns.append(TextColumn(f"{count}  {{task.fields[line]}}"))
        progress = Progress(
            *columns,
            console=self._rich,
            auto_refresh=False,  # drawn by `step`, not by a thread of rich
            transient=True,
        )
        self._task = progress.add_task(
            "", total=self._total, completed=start_step, line="[dim]first step ...[/]"
        )
        return progress

    def _header(
        self,
        config: Config,
        num_params: int,
        start_step: int,
        layout: Mapping[str, object],
        hardware: str,
    ) -> None:
        train = config.train
        tokens = train.global_batch_size * config.sample_tokens
        model = config.model.preset or config.model.family
        counted = f"{compact(num_params)} parameters"
        if config.lora:
            rows = weight_table(config.model, config.lora)
            trained = sum(row.numel for row in rows if not row.frozen)
            counted += f", {compact(trained)} of them trained"
        self._print(f"{config.run.name}  {model}, {counted}, {train.precision}", "bold")
        if layout:
            axes = [f"{key} {value}" for key, value in layout.items()]
            self._print("  ".join([hardware, *axes] if hardware else axes), "dim")
        in_all = compact(config.num_tokens)
        first = f"{train.batch_size(0) * config.sample_tokens:,} to " if train.batch_ramp else ""
        self._print(f"{self._total:,} steps of {first}{tokens:,} tokens, {in_all} in all", "dim")
        if phases := config.data.seq_length_warmup:
            short = ", ".join(
                f"{phase.seq_length:,} tokens up to step {phase.until_step:,}" for phase in phases
            )
            self._print(f"sequences of {short}, then of {config.data.seq_length:,}", "dim")
        if start_step:
            self._print(f"resumed after step {start_step:,}", "dim")
        warmup = config.optimizer.schedule.warmup(train.steps)
        if warmup >= train.steps:
            self.message(
                f"warning: optimizer.schedule.warmup_steps = {warmup} is not over at train.steps = {train.steps}: "
                "the learning rate only rises"
            )

    def step(self, record: dict[str, float]) -> None:
        """Redraw the live line, or print a line if one is due, with the mean loss of the steps since
        the one before."""
        step = int(record["step"])
        now = time.perf_counter()
        # For the line that closes the run.
        self._loss = record["loss"]
        self._pace.append((now, step))
        self._losses.append(record["loss"])
        if self._progress:
            # Short steps would spend their time drawing.
            due = now - self._drawn >= REDRAW_SECONDS or step == self._total
            self._progress.update(self._task, completed=step, line=self._live(record), refresh=due)
            if due:
                self._drawn = time.perf_counter()
        elif self._bar:
            line = re.sub(" {2,}", " ", self._plain(record))  # in one line, on a narrow page
            self._bar.show(step, self._total, line)
        elif step % self._log_every == 0 or step in (self._first_step, self._total):
            self._print(self._plain(record | {"loss": _mean(self._losses)}))
            self._losses.clear()

    def _live(self, record: dict[str, float]) -> str:
        # Only what fits into one line, since wrapping would break the live display; the record has
        # the rest.
        loss_style = "bold" if math.isfinite(record["loss"]) else "bold red"
        parts = [
            f"loss [{loss_style}]{record['loss']:.4f}[/]",
            f"[cyan]{compact(record['tokens_per_s'])} tokens/s[/]",
            f"ETA {self._eta(record)}",
            f"[dim]lr {record['lr']:.2e}  grad {record['grad_norm']:.2f}[/]",
        ]
        if "mfu" in record:
            parts.insert(3, f"{record['mfu']:.1%} MFU")
        return "  ".join(parts)

    def _plain(self, record: dict[str, float]) -> str:
        # Of fixed widths, so that the columns of a log stay in line.
        parts = [
            self._at("step ", record["step"]),
            f"loss {record['loss']:8.4f}",
            f"lr {record['lr']:.2e}",
            f"grad {record['grad_norm']:7.3f}",
            f"tokens {compact(record['tokens']):>6}",
            f"{compact(record['tokens_per_s']):>6} tokens/s",
            f"{record['step_time_s']:6.2f} s",
        ]
        if "mfu" in record:
            parts.append(f"mfu {record['mfu']:5.1%}")
        if "memory_gb" in record:
            parts.append(f"{record['memory_gb']:5.1f} GB")
        parts.append(f"eta {self._eta(record):>7}")
        return "  ".join(parts)

    def evaluation(self, record: dict[str, float]) -> None:
        """Print the losses of an evaluation and, for validation, how they compare with those
        before."""
        split = "test" if "test_loss" in record else "valid"
        loss = record[f"{split}_loss"]
        label = self._at(f"{split:<5}", record["step"])
        text = f"{label}  loss {loss:8.4f}"
        of_sources = []
        for key, x in record.items():
            if "_loss/" in key:
                source = key.removeprefix(f"{split}_loss/")
                of_sources.append(f"{source} {x:.4f}")
            elif key != "step" and "loss" not in key:
                name = key.removeprefix(f"{split}_")
                digits = ".4f"
                if name.startswith("perplexity"):
                    digits = ".2f" if x < 1e6 else ".2e"  # a model that learnt nothing has dozens
                text += f"  {name.replace('_', ' ')} {x:{digits}}"
        if of_sources:
            text += f"  ({', '.join(of_sources)})"
        if split == "test":
            self._print(text, "bold green")
            return
        if self._valid is not None:
            change = loss - self._valid
            if math.isfinite(change):
                text += f"  {'down' if change <= 0 else 'up'} {abs(change):.4f}"
            if loss < self._best:
                text += ", best so far"
        self._valid = loss
        # In this order: of two numbers that do not compare, `min` gives the first, and a loss that
        # is NaN must not be the best for good.
        self._best = min(self._best, loss)
        # In a log file, the mark makes evaluations stand out among the steps.
        live = self._progress or self._bar
        self._print(text if live else f"{text}  <<<", "bold green")

    def tasks(self, record: dict[str, float]) -> None:
        """Print the metrics of downstream tasks."""
        found = []
        for key, x in record.items():
            if key != "step":
                found.append(f"{key.removeprefix('tasks/')} {x:.4f}")
        label = self._at("tasks", record["step"])
        self._print(f"{label}  {', '.join(found)}", "bold green")

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Print an answer a line, quoted: what else it holds may not reach a terminal."""
        for prompt, answer in zip(prompts, answers, strict=True):
            self._print(f"{self._at('sample', step)}  {prompt!r} → {answer!r}", "cyan")

    def message(self, text: str) -> None:
        """Print a message of another part of the run."""
        self._print(text, "yellow" if text.startswith("warning") else "dim")

    def close(self, status: str) -> None:
        """Print how and where the run ended. `status` is that of `Recorder.close`."""
        if self._progress:
            self._progress.stop()
        if self._bar:
            self._bar.close()
        last = self._first_step - 1
        if self._pace:
            _, last = self._pace[-1]
        took = clock(time.perf_counter() - self._began)
        # A run may be resumed with fewer steps than it has.
        of = f" of {self._total:,}" if last <= self._total else ""
        text = f"{status} at step {last:,}{of} after {took}"
        if self._loss is not None:
            text += f", loss {self._loss:.4f}"
        if self._valid is not None:
            text += f", valid {self._valid:.4f}"
        self._print(f"{text}; see {self._folder}", "bold red" if status == "failed" else "bold")

    def _at(self, label: str, step: float) -> str:
        """Format a label with a step's number and the number of steps."""
        return f"{label} {int(step):>{self._width}}/{self._total}"

    def _eta(self, record: dict[str, float]) -> str:
        """Estimate the remaining time from the wall clock of the last steps, evaluations and saves
        included."""
        # The last hundred steps: long enough to even out an evaluation, short enough to follow a
        # change.
        since, from_step = self._pace[0]
        now, step = self._pace[-1]
        seconds = record["step_time_s"]
        if step > from_step:
            seconds = (now - since) / (step - from_step)
        return clock(seconds * (self._total - step))

    def _print(self, text: str, style: str = "") -> None:
        """Print a line. One that the disk of a log file refuses is counted, and the loss told with
        the next line."""
        try:
            if self._lost:
                print(
                    f"warning: {self._lost} lines were lost before this one: {self._why}",
                    flush=True,
                )
                self._lost = 0
            if self._progress:
                self._progress.refresh()  # the live line stays below this one: bring it up to date first
                self._rich.print(Text(text, style=style), soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError as error:  # the log's disk may have room again later
            self._lost += 1
            self._why = error.strerror or str(error)


def _mean(losses: Sequence[float]) -> float:
    """Return the mean of those losses that are finite, as a step without labels has none; NaN where
    there is none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def _valid_losses(metrics: Path, until: int) -> Iterator[float]:
    """Yield the validation losses up to a step. A resumed run repeats what came after it."""
    with contextlib.suppress(OSError):
        for record in read_metrics(metrics):
            loss = record.get("valid_loss")
            if loss is not None and (record["step"] or 0) <= until:
                yield loss


def clock(seconds: float) -> str:
    """Format seconds as m:ss, h:mm:ss or "3d 4h"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    if hours:
        return f"{hours}:{m:02}:{s:02}"
    return f"{m}:{s:02}"
