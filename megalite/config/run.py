"""The sections `run`, `checkpoint` and `health`: where a run lives, what it keeps, and what ends
it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from megalite.config.section import Section


class RunConfig(Section):
    """Name and folder of the run."""

    name: str = Field(
        # It names a folder, and the run to trackers: no separator, no option of a command, no hidden folder.
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        # File systems take names of 255 bytes, some of which are made of this one.
        max_length=200,
        description="Name of the run, and of its folder below `dir`.",
    )
    dir: Path = Field(Path("runs"), description="Folder that the folders of runs are in.")

    @property
    def folder(self) -> Path:
        return self.dir / self.name


class CheckpointConfig(Section):
    """When checkpoints are written, which are kept, and what a run resumes from."""

    every: int = Field(
        1000, ge=0, description="Steps between checkpoints. 0 saves after the last step only."
    )
    keep: int = Field(
        3,
        gt=0,
        description="Number of newest valid checkpoints to keep; one more where no step has followed any of them yet.",
    )
    keep_best: int = Field(
        0,
        ge=0,
        description="Number of checkpoints with the lowest validation loss to keep beside those.",
    )
    resume: Literal["auto", "never"] | Path = Field(
        "auto",
        description="auto: resume from the newest valid checkpoint of this run. Or the folder of a checkpoint to "
        "begin from, or to go back to.",
    )

    @field_validator("resume")
    @classmethod
    def _word_or_path(cls, resume: str | Path) -> str | Path:
        # A word that is misspelt, such as `nevr`, would be taken for the path of a folder.
        if isinstance(resume, Path) and len(resume.parts) < 2 and not resume.exists():
            raise ValueError("must be 'auto', 'never' or the folder of a checkpoint")
        return resume


Policy = Literal["report", "skip", "rewind", "stop"]


class HealthConfig(Section):
    """How hangs, stragglers and bad numbers are found, and what follows."""

    hang_timeout_s: float = Field(
        300.0,
        ge=0,
        description="Seconds without progress after which the run writes a hang report and exits. 0 disables.",
    )
    straggler_factor: float = Field(
        1.25,
        gt=1,
        description="Report a rank as a straggler when its compute time exceeds this multiple of its peers' median.",
    )
    straggler_every: int = Field(
        10, gt=0, description="Steps between comparisons of the ranks' compute times."
    )
    not_finite: Literal["skip", "rewind", "stop"] = Field(
        "skip",
        description="What to do about a loss or gradient that is not finite. skip: the step updates nothing; "
        "rewind: the run returns to its newest checkpoint and passes over that batch; stop: the run "
        "exits, saved as before that step.",
    )
    loss_spike: Policy = Field(
        "report",
        description="The same for a loss far above those of the last 128 steps. report: only report it.",
    )
    grad_norm_spike: Policy = Field("report", description="The same for a gradient norm.")
    spike_sigmas: float = Field(
        6.0, gt=0, description="Standard deviations above the mean that make a value a spike."
    )
    bad_steps_limit: int = Field(
        10,
        gt=0,
        description="Steps skipped in a row, or rewinds to one checkpoint, after which the run exits.",
    )
    weights_check_every: int = Field(
        100,
        ge=0,
        description="Steps between bitwise comparisons of what ranks must hold alike. 0 disables.",
    )

    def patience_s(self, phase: str) -> float:
        """Return how many seconds a rank that waits for no other may go without progress. Training
        steps are steady; a first step may compile, and loading, validating and saving may be one
        long piece of work."""
        return self.hang_timeout_s * (1 if phase == "training" else 4)

    @property
    def collective_timeout_s(self) -> float:
        """Return the timeout of collectives in seconds: long enough that the watchdog reports
        first, since it knows more."""
        return max(1800.0, 6 * self.hang_timeout_s)
