"""What a run notes beside its weights, in train_state.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megalite.config.errors import describe_errors
from megalite.errors import CheckpointError
from megalite.health.numbers import WINDOW
from megalite.utils.outside import read_json

Count = Annotated[int, Field(ge=0, lt=2**62)]


class _State(BaseModel):
    # What later versions add is left to them.
    model_config = ConfigDict(strict=True, extra="ignore")


class _Numbers(_State):
    losses: list[float] = Field(max_length=WINDOW)
    grad_norms: list[float] = Field(max_length=WINDOW)
    entered: Count
    in_a_row: Count


class _Hooks(BaseModel):
    # Those of plugins judge their states themselves.
    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]

    guard: _Numbers | None = None


class _Data(_State):
    samples: Count
    fingerprint: str
    sources: dict[str, str] | None = None
    skipped: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []


class _Begun(_State):
    updates: Count
    weights: list[str]


class _TrainState(_State):
    step: Count
    data: _Data
    updates: Count = 0
    states_begun: list[_Begun] = []
    """Weights whose optimizer states began after so many updates, where that is above 0."""
    valid_loss: float | None = None
    refused: Count = 0
    doubted: bool = False
    hooks: _Hooks = _Hooks()
    numbers: _Numbers | None = None
    """State of the guard, as version 0.1 wrote it."""
    base: dict[str, str] | None = None
    wandb_id: str | None = None


def read_train_state(folder: Path) -> dict[str, Any]:
    """Return what a run noted beside its weights. Raises CheckpointError."""
    path = folder / "train_state.json"
    state = read_json(path, CheckpointError)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    try:
        _TrainState.model_validate(state)
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: {describe_errors(error, _TrainState).partition(chr(10))[0]}"
        ) from None
    if numbers := state.pop("numbers", None):
        state.setdefault("hooks", {}).setdefault("guard", numbers)
    # A resumed run and an evaluation index it; a state may leave it out.
    state.setdefault("wandb_id", None)
    return state
