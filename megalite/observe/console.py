"""What a person sees: one live line on a terminal, one plain line every `log_every` steps in a log file."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from megalite.config import Config
from megalite.models import weight_table
from megalite.observe.jsonl import read_metrics

REDRAW_SECONDS = 0.1


class Console:
    name = "console"

    def __init__(
        self, config: Config, folder: Path, num_params: int, start_step: int, layout: Mapping[str, object]
    ) -> None:
        self._total = config.train.steps
        self._width = len(str(self._total))
        self._log_every = config.observe.log_every
        self._folder = folder
        self._first_step = start_step + 1
        self._loss: float | None = None
        found = list(_valid_losses(folder / "metrics.jsonl", start_step)) if start_step else []
        self._valid: float | None = found[-1] if found else None
        self._best = min(found, default=math.inf)
        self._began = time.perf_counter()
        self._pace: deque[tuple[float, int]] = deque(maxlen=100)
        self._drawn = 0.0
        self._lost, self._why = 0, ""
        self._rich = rich.console.Console(highlight=False)
        # An ordinary print is what a log file needs: no width to wrap at, and flushed line by line.
        live = sys.stdout.isatty() and not self._rich.is_dumb_terminal
        self._progress = self._live_line(start_step) if live else None
        self._header(config, num_params, start_step, layout)
        if self._progress:
            self._progress.start()

    def _live_line(self, start_step: int) -> Progress:
        bar = BarColumn(bar_width=20, complete_style="cyan", finished_style="green")
        count = f"{{task.completed:{self._width}.0f}}[dim]/{{task.total:.0f}}[/]"
        progress = Progress(
            *([bar] if self._rich.width >= 100 else []),  # the numbers need the room
            TextColumn(f"{count}  {{task.fields[line]}}"),
            console=self._rich,
            auto_refresh=False,  # drawn when there is news, by no thread of its own
            transient=True,
        )
        self._task = progress.add_task("", total=self._total, completed=start_step, line="[dim]first step ...[/]")
        return progress

    def _header(self, config: Config, num_params: int, start_step: int, layout: Mapping[str, object]) -> None:
        train = config.train
        tokens = train.global_batch_size * config.data.seq_length
        spread = "  ".join(f"{key} {value}" for key, value in layout.items())
        model = config.model.preset or config.model.family
        counted = f"{compact(num_params)} parameters"
        if config.lora:
            rows = weight_table(config.model, config.lora)
            counted += f", {compact(sum(row.numel for row in rows if not row.frozen))} of them trained"
        self._print(f"{config.run.name}  {model}, {counted}, {train.precision}", "bold")
        for line in (
            spread,
            f"{self._total:,} steps of {tokens:,} tokens, {compact(self._total * tokens)} in all",
            f"resumed after step {start_step:,}" if start_step else "",
        ):
            if line:
                self._print(line, "dim")
        warmup = config.optimizer.schedule.warmup_steps
        if warmup >= train.steps:
            self.message(
                f"warning: optimizer.schedule.warmup_steps = {warmup} is not over at train.steps = {train.steps}: "
                "the learning rate only rises"
            )

    def step(self, record: dict[str, float]) -> None:
        step = int(record["step"])
        self._loss = record["loss"]
        self._pace.append((time.perf_counter(), step))
        if self._progress:
            due = time.perf_counter() - self._drawn >= REDRAW_SECONDS or step == self._total
            self._progress.update(self._task, completed=step, line=self._live(record), refresh=due)
            self._drawn = time.perf_counter() if due else self._drawn
        elif step % self._log_every == 0 or step in (self._first_step, self._total):
            self._print(self._plain(record))

    def _live(self, record: dict[str, float]) -> str:
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
        return "  ".join([*parts, f"eta {self._eta(record):>7}"])

    def evaluation(self, record: dict[str, float]) -> None:
        split = "test" if "test_loss" in record else "valid"
        loss = record[f"{split}_loss"]
        text = f"{self._at(f'{split:<5}', record['step'])}  loss {loss:8.4f}"
        others = {key.removeprefix(f"{split}_"): x for key, x in record.items() if key != "step" and "loss" not in key}
        text += "".join(
            f"  {name.replace('_', ' ')} {x:.{2 if name == 'perplexity' else 4}f}" for name, x in others.items()
        )
        of_source = {key.removeprefix(f"{split}_loss/"): x for key, x in record.items() if "_loss/" in key}
        text += f"  ({', '.join(f'{name} {x:.4f}' for name, x in of_source.items())})" if of_source else ""
        if split == "test":
            self._print(text, "bold green")
            return
        if self._valid is not None:
            text += f"  {'down' if loss <= self._valid else 'up'} {abs(loss - self._valid):.4f}"
            text += ", best so far" if loss < self._best else ""
        self._valid, self._best = loss, min(loss, self._best)
        self._print(f"{text}{'' if self._progress else '  <<<'}", "bold green")

    def tasks(self, record: dict[str, float]) -> None:
        found = ", ".join(f"{key.removeprefix('tasks/')} {x:.4f}" for key, x in record.items() if key != "step")
        self._print(f"{self._at('tasks', record['step'])}  {found}", "bold green")

    def message(self, text: str) -> None:
        self._print(text, "yellow" if text.startswith("warning") else "dim")

    def close(self, status: str) -> None:
        if self._progress:
            self._progress.stop()
        last = self._pace[-1][1] if self._pace else self._first_step - 1
        of = f" of {self._total:,}" if last <= self._total else ""  # of a run that had more steps before
        parts = [f"{status} at step {last:,}{of} after {clock(time.perf_counter() - self._began)}"]
        parts += [f"loss {self._loss:.4f}"] if self._loss is not None else []
        parts += [f"valid {self._valid:.4f}"] if self._valid is not None else []
        self._print(f"{', '.join(parts)}; see {self._folder}", "bold red" if status == "failed" else "bold")

    def _at(self, label: str, step: float) -> str:
        return f"{label} {int(step):>{self._width}}/{self._total}"

    def _eta(self, record: dict[str, float]) -> str:
        """From the wall clock over the last steps, so that evaluations and saves count; they are part of the wait."""
        (since, from_step), (now, step) = self._pace[0], self._pace[-1]
        seconds = (now - since) / (step - from_step) if step > from_step else record["step_time_s"]
        return clock(seconds * (self._total - step))

    def _print(self, text: str, style: str = "") -> None:
        try:
            if self._lost:
                print(f"warning: {self._lost} lines were lost before this one: {self._why}", flush=True)
                self._lost = 0
            if self._progress:
                self._progress.refresh()  # the live line stays below: bring it up to this step first
                self._rich.print(Text(text, style=style), soft_wrap=True)
            else:
                print(text, flush=True)
        except OSError as error:  # the log's disk may have room again later
            self._lost, self._why = self._lost + 1, error.strerror or str(error)


def _valid_losses(metrics: Path, until: int) -> Iterator[float]:
    """Up to a step, after which a resumed run begins anew."""
    with contextlib.suppress(OSError):
        for record in read_metrics(metrics):
            loss = record.get("valid_loss")
            if loss is not None and (record["step"] or 0) <= until:
                yield loss


def compact(number: float) -> str:
    """1234567 → 1.23M: three digits or a little more, for counts and rates."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            scaled = number / size
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds → m:ss, h:mm:ss or 3d 4h."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
