"""What the YAML file of `megalite retrain` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from megalite.config import Section
from megalite.config.errors import describe_errors, refusal
from megalite.utils.resources import read_yaml, with_overrides


class RetrainConfig(Section):
    """Holds all settings of retraining."""

    served: Path = Field(
        description="Link to the model that is served; it is turned to a better one."
    )
    dir: Path = Field(Path("retrain"), description="Folder of the rounds.")
    config: Path = Field(description="YAML file of a finetuning run, which each round is one of.")
    rows: tuple[str, ...] = Field(
        ("ratings/completion.jsonl",),
        min_length=1,
        description="Files of ratings and corrections: those of the server, rows with a prompt and a completion, and "
        "exports of annotation tools; globs too. Rows that a round has used are not new.",
    )
    replay: tuple[str, ...] = Field(
        (),
        description="Prefixes of token files that the model was trained on before, against forgetting.",
    )
    replay_share: float = Field(
        0.5, gt=0, lt=1, description="Share of replayed tokens, where there are any."
    )
    min_rows: int = Field(20, gt=0, description="New rows to train on below which nothing happens.")
    held_out_share: float = Field(
        0.2, gt=0, lt=1, description="Share of questions that are never trained on, but judge."
    )
    margin: float = Field(
        0.0,
        ge=0,
        description="Gain of the mean log probability of held-out answers' tokens (nats) that must be exceeded surely.",
    )
    tasks: tuple[str, ...] = Field(
        (),
        description="Tasks that may not get worse: names of lm-evaluation-harness, or YAML files.",
    )
    task_limit: int | None = Field(
        None, gt=0, description="Documents of each task. Defaults to all."
    )
    task_drop: float = Field(
        0.02, ge=0, description="How much worse a metric of a task may get, in its own unit."
    )
    bias: tuple[Path, ...] = Field(
        (),
        description="Files of tests of bias, see `megalite eval --bias`, which may not get worse surely.",
    )
    reload: str = Field(
        "",
        pattern=r"^(https?://.+)?$",
        description="Address of the server, which is told by MEGALITE_ADMIN_KEY. Empty: send it SIGHUP yourself.",
    )
    keep: int = Field(3, ge=1, description="Models of former rounds that are kept.")


def load_retrain_config(path: Path, overrides: Sequence[str] = ()) -> RetrainConfig:
    """Read the YAML file `path` and apply `overrides`, such as `min_rows=50`. Raises ConfigError
    with every mistake."""
    values: dict[str, Any] = with_overrides(read_yaml(path), overrides)
    try:
        return RetrainConfig.model_validate(values)
    except ValidationError as error:
        mistakes = describe_errors(error, RetrainConfig, values).split("\n  ")
        raise refusal(mistakes, str(path), overrides) from None
