"""Runs `megalite plan --precision`: trains the kin of a model in bf16 and in each recipe of fp8, and
predicts what the recipes gain of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from megalite.config import Config, Fp8Config
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.kernels.fp8 import Name
from megalite.kernels.recipes import RECIPES
from megalite.models import weight_table
from megalite.models.fp8 import fp8_weights
from megalite.plan import plan as plan_of
from megalite.planner.estimate import Estimate, estimate
from megalite.planner.hardware import Hardware
from megalite.precision.curves import (
    BF16,
    Curves,
    draw,
    gaps,
    last_gap,
    read_curve,
    seeds_of,
    spread,
)
from megalite.precision.kin import kin_values, layer_parameters
from megalite.sweep.side_by_side import Job, SideBySide, check_same
from megalite.utils.counts import compact
from megalite.utils.files import replacing
from megalite.utils.progress import ProgressMeter

Case = tuple[str, int]
"""A recipe, or `BF16`, and a seed."""
GIB = 2**30


@dataclass(frozen=True)
class Wanted:
    """Says what is to be trained, and where."""

    folder: Path
    parameters: float
    """Of the kin's layers."""
    steps: int
    seeds: int
    """Of bf16; recipes are trained with the first."""
    parallel: int
    overrides: tuple[str, ...] = ()
    """Settings of the kin."""
    recipes: tuple[Name, ...] = tuple(RECIPES)


def run_precision(config: Config, num_gpus: int, hardware: Hardware, wanted: Wanted) -> None:
    """Train what is missing, and print the table that report.md and gap.png beside the runs show.
    Raises ConfigError for a mistake, before the first run, and for a run that fails."""
    kin = kin_values(config, wanted.parameters, wanted.steps, wanted.overrides)
    predicted = {BF16: _estimate(config, None, num_gpus, hardware)}
    cases: list[Case] = []
    refused: dict[str, str] = {}
    for recipe in wanted.recipes:
        fp8 = _of_recipe(config, recipe)
        try:
            predicted[recipe] = _estimate(config, fp8, num_gpus, hardware)
            plan_of(parse_config(_in_precision(kin, fp8), origin="the kin's config"), 1)
        except ConfigError as problem:
            refused[recipe] = str(problem)
        else:
            cases.append((recipe, config.train.seed))
    seeds = range(config.train.seed, config.train.seed + wanted.seeds)
    # Of bf16 first: without it nothing can be told of the others.
    cases = [*((BF16, seed) for seed in seeds), *cases]
    jobs = [_job(kin, config, case, wanted.folder) for case in cases]
    for job in jobs:
        check_same(wanted.folder / job.name, job.values, "give another --output")
    curves = train_all(wanted.folder, cases, jobs, wanted.parallel)
    lines = [_header(kin, config, wanted), ""]
    lines += table(curves, predicted, refused)
    _write(wanted.folder, curves, [name for name, _ in cases if name != BF16], lines)


def train_all(
    folder: Path, cases: Sequence[Case], jobs: Sequence[Job], parallel: int
) -> dict[Case, Any]:
    """Train the runs that are missing, and return the curve of each case. Progress is shown on
    stderr."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console, done = Console(stderr=True), 0
    with ProgressMeter("runs", len(jobs), columns, console) as meter:

        def tell(job: Job, loss: float) -> None:
            nonlocal done
            done += 1
            meter.show(done, f"{job.name}: {loss:.4f}", due=True)
            if console.is_terminal:
                console.print(f"{job.name}: {loss:.4f}", highlight=False)

        SideBySide(folder, jobs, parallel).losses(tell)
    names = [job.name for job in jobs]
    return {case: read_curve(folder / name) for case, name in zip(cases, names, strict=True)}


def table(curves: Curves, predicted: dict[str, Estimate], refused: dict[str, str]) -> list[str]:
    """Return the table of what was measured and predicted, in Markdown, and what was refused."""
    noise, plain = spread(curves)[-1], predicted[BF16]
    first = seeds_of(curves, BF16)[0]
    lines = [
        "| | last loss | from bf16's | step | tokens/s a GPU | memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in predicted.items():
        if name in refused:
            continue
        gap = "noise " + f"±{noise:.2%}" if name == BF16 else f"{last_gap(curves, name):+.2%}"
        if name != BF16 and abs(last_gap(curves, name)) <= 2 * noise:
            gap += ", within 2 × the noise"
        gain = "" if name == BF16 else f" ({plain.step_time_s / one.step_time_s:.2f} ×)"
        rate = one.tokens_per_s / one.plan.world_size
        lines.append(
            f"| {name} | {curves[name, first].losses[-1]:.4f} | {gap} | {one.step_time_s:.3f} s{gain} | {rate:,.0f} | "
            f"{one.fullest.total / GIB:.1f} GiB |"
        )
    return [*lines, *(f"\n{name} is refused: {why}" for name, why in refused.items())]


def _header(kin: dict[str, Any], config: Config, wanted: Wanted) -> str:
    model, train = kin["model"], kin["train"]
    small = parse_config(kin)
    of_kin, of_model = (_share_in_fp8(one, config) for one in (small, config))
    return (
        f"Losses are those of a kin of {model['num_layers']} layers × {model['hidden_size']} "
        f"({compact(layer_parameters(model))} parameters in them) after {wanted.steps} steps of "
        f"{train['global_batch_size']} × {small.sample_tokens:,} tokens; in fp8, {of_kin:.0%} of its layers' weights "
        f"are, and {of_model:.0%} of your model's. Times and memory are predicted for your model, and not measured."
    )


def _share_in_fp8(config: Config, given: Config) -> float:
    """Return the share of the layers' weights whose products fp8 takes, by `given`'s settings."""
    weights = weight_table(config.model)
    chosen = fp8_weights(weights, _of_recipe(given, "blockwise"), config.model.num_layers)
    layers = sum(weight.numel for weight in weights if isinstance(weight.place, int))
    return sum(weight.numel for weight in chosen) / layers


def _of_recipe(config: Config, recipe: Name) -> Fp8Config:
    """Return the settings of fp8 of a recipe, the rest as the config has it."""
    return (config.train.fp8 or Fp8Config()).model_copy(update={"recipe": recipe})


def _estimate(config: Config, fp8: Fp8Config | None, num_gpus: int, hardware: Hardware) -> Estimate:
    train = config.train.model_copy(update={"fp8": fp8})
    config = config.model_copy(update={"train": train})
    return estimate(config, plan_of(config, num_gpus), hardware)


def _in_precision(kin: dict[str, Any], fp8: Fp8Config | None, **more: Any) -> dict[str, Any]:
    values = fp8 and fp8.model_dump(mode="json")
    return kin | {"train": kin["train"] | {"fp8": values} | more}


def _job(kin: dict[str, Any], config: Config, case: Case, folder: Path) -> Job:
    name, seed = case
    fp8 = next((_of_recipe(config, recipe) for recipe in RECIPES if recipe == name), None)
    run = {"name": f"{name}-seed{seed}", "dir": str(folder)}
    return Job(run["name"], _in_precision(kin, fp8, seed=seed) | {"run": run})


def _write(folder: Path, curves: Curves, recipes: Sequence[str], lines: Sequence[str]) -> None:
    """Print the report, and write it and the picture to `folder`."""
    text = "\n".join(lines) + "\n"
    with replacing(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)
    if recipes and all(gaps(curves, recipe) for recipe in recipes):
        draw(folder / "gap.png", curves, recipes)
        print(f"{folder / 'gap.png'} shows the gap over the steps.")
