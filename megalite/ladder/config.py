"""What a ladder's YAML file says: the sizes, how long each is trained, and what is to be predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from megalite.config import Config, Section
from megalite.config.errors import describe_errors
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.plan import smallest_world
from megalite.sweep.config import spelled_out
from megalite.utils.counts import parse_count
from megalite.utils.resources import read_yaml, with_overrides


class Goal(Section):
    """Names a run whose loss is to be predicted."""

    parameters: float = Field(gt=0, description="Its parameters N, such as 7B.")
    tokens: float = Field(gt=0, description="Its tokens D, such as 140B.")

    @field_validator("parameters", "tokens", mode="before")
    @classmethod
    def _with_a_unit(cls, count: Any) -> Any:
        return parse_count(count) if isinstance(count, str) else count


Rates = Literal["deepseek", "step_law"]


def deepseek_rates(parameters: float, tokens: float) -> tuple[float, float]:
    """Return the best learning rate of AdamW, and tokens of a global batch, by FLOPs (DeepSeek LLM
    2024, section 3.1; fitted from 1e17 to 2e19 FLOPs)."""
    flops = 6 * parameters * tokens
    return 0.3118 * flops**-0.1250, 0.2920 * flops**0.3271


def step_law_rates(parameters: float, tokens: float) -> tuple[float, float]:
    """Return the best learning rate of AdamW, and tokens of a global batch, by parameters and
    tokens (Li et al. 2025; fitted from 60M to 1B parameters)."""
    return 1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571


MEASURED: dict[Rates, Callable[[float, float], tuple[float, float]]] = {
    "deepseek": deepseek_rates,
    "step_law": step_law_rates,
}


class LadderConfig(Section):
    """Holds all settings of a ladder."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="Name of its folder in dir.",
    )
    dir: Path = Path("runs")
    config: Path = Field(description="YAML file of the config that every run begins with.")
    settings: dict[str, Any] = Field({}, description="Settings of all runs.")
    sizes: tuple[dict[str, Any], ...] = Field(
        min_length=2, description="Settings of each size, such as {model.hidden_size: 128}."
    )
    tokens_per_parameter: tuple[float, ...] = Field(
        min_length=2, description="How long each size is trained, in tokens for each parameter."
    )
    rates: Rates | None = Field(
        None,
        description="Measured law that sets the learning rate and the global batch of each run: deepseek (by FLOPs) or "
        "step_law (by parameters and tokens). By default the config says both.",
    )
    predict: tuple[Goal, ...] = ()
    parallel: int = Field(1, gt=0, description="Runs at a time.")
    ranks: int | None = Field(
        None, gt=0, description="Ranks of a run. Defaults to the fewest that the config needs."
    )

    @model_validator(mode="after")
    def _enough_runs(self) -> LadderConfig:
        if any(not ratio > 0 for ratio in self.tokens_per_parameter):
            raise ValueError("tokens_per_parameter must be above 0")
        # By these names two runs would be one folder, in which both were trained at once.
        names = [ratio_name(ratio) for ratio in self.tokens_per_parameter]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"tokens_per_parameter has {twice[0]} twice; give each once")
        count = len(self.sizes) * len(self.tokens_per_parameter)
        if count < 6:
            raise ValueError(f"the law has five numbers, and {count} runs give too few losses")
        return self

    @property
    def folder(self) -> Path:
        return self.dir / self.name

    def rungs(self) -> Iterator[Rung]:
        """Yield all runs, the cheapest first. Raises ConfigError where one of them cannot be."""
        rungs = []
        for number, size in enumerate(self.sizes):
            for ratio in self.tokens_per_parameter:
                rungs.append(self._rung(f"size-{number}-{ratio_name(ratio)}", size, ratio))
        for rung in rungs:
            data = rung.config.data
            if not data.valid and not (data.split and data.split[1]):
                raise ConfigError(
                    f"a ladder fits valid_loss: give data.valid or data.split in {self.config}"
                )
        # A mistake that only a run shows costs the least so.
        yield from sorted(rungs, key=lambda rung: rung.parameters * rung.tokens)

    def _rung(self, name: str, size: dict[str, Any], ratio: float) -> Rung:
        own = {
            "run.name": name,
            "run.dir": str(self.folder),
            "train.tokens": None,
            "train.epochs": None,
        }
        origin = f"{self.config} with {', '.join(spelled_out(size))}"
        # Of one step, for its parameters and the tokens of a step.
        one_step = parse_config(self._values(size | own | {"train.steps": 1}), origin=origin)
        parameters = multiplied(one_step)
        if self.rates:
            own |= self._rates_of(one_step, parameters, ratio * parameters)
            one_step = parse_config(self._values(size | own | {"train.steps": 1}), origin=origin)
        steps = math.ceil(ratio * parameters / one_step.num_tokens)
        values = self._values(size | own | {"train.steps": steps})
        config = parse_config(values, origin=origin)
        return Rung(name, values, config, parameters, config.num_tokens)

    def _rates_of(self, config: Config, parameters: float, tokens: float) -> dict[str, Any]:
        """Return the settings of a run of so many `parameters` and `tokens` that the law sets."""
        assert self.rates
        if config.model.mup or config.optimizer.name != "adamw":
            raise ConfigError(
                f"rates: {self.rates} is of AdamW on models without muP; leave out rates, or take these"
            )
        lr, batch = MEASURED[self.rates](parameters, tokens)
        # Whole micro-batches of every replica.
        ranks = self.ranks or smallest_world(config)
        each = config.train.micro_batch_size * (ranks // smallest_world(config))
        samples = max(1, round(batch / config.sample_tokens / each)) * each
        return {"optimizer.lr": float(f"{lr:.3g}"), "train.global_batch_size": samples}

    def _values(self, settings: dict[str, Any]) -> dict[str, Any]:
        return with_overrides(read_yaml(self.config), spelled_out(self.settings | settings))


def ratio_name(ratio: float) -> str:
    """Return how the names of runs spell their tokens for each parameter."""
    return f"x{ratio:g}"


@dataclass(frozen=True)
class Rung:
    """Holds one run of a ladder: its config, and what it will have spent."""

    name: str
    values: dict[str, Any]
    """Its config, as YAML has it."""
    config: Config
    parameters: float
    tokens: int


def multiplied(config: Config) -> float:
    """Return the parameters N that a token is multiplied with: all but embeddings that are looked
    up, and of experts those that it visits."""
    return sum(weight.multiplied for weight in weight_table(config.model))


def load_ladder_config(path: Path, overrides: Sequence[str] = ()) -> LadderConfig:
    """Read the YAML file `path` and apply `overrides`. Raises ConfigError with every mistake."""
    values = with_overrides(read_yaml(path), overrides)
    try:
        return LadderConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_errors(error, LadderConfig, values)}") from None
