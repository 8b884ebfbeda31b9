"""A trace of some steps in Chrome's format, for https://ui.perfetto.dev: what each rank computed and sent, and when."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from megalite.config import ProfileConfig


class Profiler:
    """Writes RUN/trace/steps-A-B-rank-R.json.gz on the ranks that are asked for; does nothing on others."""

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, settle: Callable[[], None]):
        """`settle` waits for all messages under way: torch crashes where one that began under the profiler outlives
        it."""
        self.config, self.rank, self.settle = config, rank, settle
        self.folder = folder / "trace"
        self.active = bool(config.steps) and rank in config.ranks
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        # A run resumed in the middle records what is left.
        if self.active and self._profile is None and self.config.steps[0] <= step <= self.config.steps[1]:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities, profile_memory=self.config.memory, record_shapes=True)
            self._profile.start()

    def end(self, step: int) -> None:
        if self._profile is not None and step == self.config.steps[1]:
            self._write()

    def _write(self) -> None:
        assert self._profile is not None
        profiled, self._profile, self.active = self._profile, None, False
        self.settle()
        profiled.stop()
        first, last = self.config.steps
        path = self.folder / f"steps-{first}-{last}-rank-{self.rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                print(f"warning: {path} could not be written: {error}", file=sys.stderr, flush=True)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None and error is None:  # the run ended within the steps
            self._write()
