"""Profiles some steps into a Chrome trace for https://ui.perfetto.dev: what each rank computed and
sent, and when."""

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
    """Writes RUN/trace/steps-A-B-rank-R.json.gz on the ranks in `config.ranks`; does nothing on
    others."""

    def __init__(
        self, config: ProfileConfig, folder: Path, rank: int, wait_for_params: Callable[[], None]
    ):
        """Write to `folder`, the run's, as `rank`.

        `wait_for_params` waits for all messages in flight: torch crashes if one that began under
        the profiler outlives it."""
        self.config = config
        self.rank = rank
        self.wait_for_params = wait_for_params
        self.folder = folder / "trace"
        self.active = bool(config.steps) and rank in config.ranks
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Start the profiler if `step` is among those to profile. A run resumed among them profiles
        the rest."""
        if not self.active or self._profile is not None:
            return
        first, last = self.config.steps
        if first <= step <= last:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(
                activities=activities, profile_memory=self.config.memory, record_shapes=True
            )
            self._profile.start()

    def end(self, step: int) -> None:
        """Write the trace after the last step to profile."""
        if self._profile is not None and step == self.config.steps[1]:
            self._write()

    def _write(self) -> None:
        assert self._profile is not None
        profiled = self._profile
        self._profile = None  # also where the export fails: there is no second try
        self.active = False
        # Before the profiler stops, see __init__.
        self.wait_for_params()
        profiled.stop()
        first, last = self.config.steps
        path = self.folder / f"steps-{first}-{last}-rank-{self.rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiled.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # losing a trace must not end the run
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                print(f"warning: {path} could not be written: {error}", file=sys.stderr, flush=True)

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._profile is not None and error is None:  # the run ended within the steps
            self._write()
