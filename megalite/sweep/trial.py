"""One trial: an ordinary run in a process of its own, watched by its metrics.jsonl."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from megalite.observe.jsonl import read_metrics
from megalite.runtime.exit_codes import Exit, describe, killed_by
from megalite.sweep.config import Metric
from megalite.utils.files import replacing

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
"""Loaded here: between fork and exec, in a process with threads, nothing may be loaded."""
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|MemoryError", re.IGNORECASE
)
GOES_ON = (Exit.HUNG, Exit.CORRUPTED)
"""Exit statuses after which the same command goes on."""
TAIL = 200_000
"""Bytes of a console's end that are searched for what went wrong."""


class TrialRun:
    """The run of a trial in `folder`, which an earlier start may have begun."""

    def __init__(
        self, folder: Path, values: dict[str, Any], ranks: int, environment: dict[str, str]
    ):
        """Write the config, `values`, beside what the run will write. `environment` is added to
        this process's."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._config = folder / "trial.yaml"
        # Whole or not at all: a ladder tells by it whether the run that is there is the same.
        with replacing(self._config) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        launcher = ["megalite"]
        if ranks > 1:
            launcher = [
                "megalite.launch", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}",
                "-m", "megalite",
            ]  # fmt: skip
        self._command = [sys.executable, "-m", *launcher, "train", str(self._config)]
        self._environment = dict(os.environ)
        # A sweep may itself be started by torchrun: a trial is no rank of it.
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            self._environment.pop(key, None)
        self._environment |= environment
        self._reported: set[int] = set()

    def start(self) -> None:
        """Start the process. It is asked to save and leave when this one dies."""
        with open(self.folder / "console.log", "ab") as console:
            self._began = console.tell()  # what earlier starts have said, says nothing of this one
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                env=self._environment, start_new_session=True, preexec_fn=partial(_end_with, os.getpid()),
            )  # fmt: skip

    def wait(self, seconds: float | None) -> int | None:
        """Wait up to so many seconds, None: until it ends; return the exit status as shells count
        it, None where it still runs."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return status if status >= 0 else killed_by(-status)

    def stop(self) -> None:
        """Ask the run to save and leave."""
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the run and all of its ranks at once."""
        with suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(self._process.pid, signal.SIGKILL)

    def reports(self, metric: str) -> Iterator[tuple[int, float]]:
        """Yield what validations have found since the last call: (step, value)."""
        for record in self._records():
            step = int(record["step"])
            # Evaluations alone: a step's own record has the loss.
            if metric in record and "loss" not in record and step not in self._reported:
                self._reported.add(step)
                if (value := _number(record[metric])) is not None:
                    yield step, value

    def value(self, metric: Metric) -> float | str:
        """Return the value of a metric at the end: its last; of what every step has, the median of
        the run's second half. Or why there is none, in words."""
        records = [record for record in self._records() if metric.metric in record]
        if not records:
            known = sorted({key for record in self._records() for key in record} - {"step"})
            return f"the run has no {metric.metric}; it has {', '.join(known)}"
        # In the first half a run warms up: compilation, caches.
        of_steps = [_number(record[metric.metric]) for record in records if "loss" in record]
        if not of_steps:
            last = _number(records[-1][metric.metric])
            return f"the last {metric.metric} is not finite" if last is None else last
        found = [value for value in of_steps[len(of_steps) // 2 :] if value is not None]
        return statistics.median(found) if found else f"{metric.metric} is not finite"

    def why(self, status: int) -> tuple[str, bool]:
        """Return why the run ended with a status that is no success, in words, and whether its
        settings are to blame: they diverge, or need too much memory."""
        text = self._console()
        if status == Exit.BAD_NUMBERS:
            return "diverged", True
        if status == killed_by(signal.SIGKILL):
            return "killed, as for want of memory", True
        # A mistake's text may quote the words.
        if OUT_OF_MEMORY.search(text) and status != Exit.MISTAKE:
            return "out of memory", True
        errors = re.findall(r"^(?:error.*|\w*Error: .*)$", text, re.MULTILINE)
        # The last is what ended the run.
        last = f": {errors[-1][:300]}" if errors else ""
        return f"{describe(status)}{last}", False

    def _console(self) -> str:
        """Return the end of what this start has printed."""
        path = self.folder / "console.log"
        with open(path, "rb") as file:
            file.seek(max(self._began, path.stat().st_size - TAIL))
            return file.read().decode(errors="replace")

    def _records(self) -> Sequence[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        return list(read_metrics(path)) if path.exists() else []


def _number(value: Any) -> float | None:
    """Return a finite number, or None: metrics.jsonl has null for one that is not."""
    return float(value) if isinstance(value, int | float) else None


def _end_with(parent: int) -> None:
    """Have the system ask this process to stop when its parent dies. Linux's alone."""
    # The parent is the thread that has started it: a worker's thread must live as long as its run.
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # it has died meanwhile
            os._exit(killed_by(signal.SIGTERM))
