"""Runs `megalite plan`: estimates one layout or searches for the best, prints the result and writes
it."""

from __future__ import annotations

from pathlib import Path

from megalite.config import Config
from megalite.config_file import parse_config, short_yaml
from megalite.errors import ConfigError
from megalite.plan import plan as plan_of
from megalite.planner.estimate import Estimate, estimate
from megalite.planner.hardware import DEFAULT_INTERCONNECT, Hardware, find_hardware
from megalite.planner.report import describe, describe_search, parse_tokens
from megalite.planner.search import search
from megalite.utils.outside import check_output

DEFAULT_OUTPUT = Path("best.yaml")


def run_plan(
    config: Config,
    *,
    num_gpus: int,
    gpu: str,
    gpus_per_node: int,
    interconnect: str | None,
    tokens: str | None,
    with_search: bool,
    output: Path | None,
    picture: Path | None,
) -> None:
    """Print the estimate of a config on `num_gpus` GPUs, or with `with_search` the best layouts.

    `gpu` and `interconnect` are names or YAML files (see `find_hardware`); a node has
    `gpus_per_node` GPUs. `tokens` is the length of the training, such as "300B". A search writes
    the best config, of that length, to `output`; `picture` is a PNG for the timeline. Raises ConfigError."""
    # All that can be wrong with the command is found before the search, which may take minutes.
    hardware = find_hardware(gpu, gpus_per_node, interconnect or DEFAULT_INTERCONNECT)
    wanted = parse_tokens(tokens) if tokens else None
    if not with_search:
        if output:
            raise ConfigError(
                f"--output {output} is where --search writes the best config; give --search as well"
            )
        one = _estimate(config, num_gpus, hardware, record=picture is not None)
    else:
        config = of_length(config, wanted) if wanted else config
        one = _search(config, num_gpus, hardware, _output(output), record=picture is not None)
    print(describe(one, wanted))
    if num_gpus > gpus_per_node and interconnect is None:
        print(
            f"Nodes are taken to be joined by {DEFAULT_INTERCONNECT}; --interconnect says otherwise."
        )
    if picture:
        _draw(one, picture)


def _estimate(config: Config, num_gpus: int, hardware: Hardware, record: bool) -> Estimate:
    plan = plan_of(config, num_gpus)
    return estimate(config, plan, hardware, record=record)


def of_length(config: Config, tokens: float) -> Config:
    """Return the config with the length of `tokens` in place of its own. Raises ConfigError where its
    schedule does not go with that."""
    values = config.model_dump(mode="json")
    values["train"] |= {"tokens": int(tokens), "steps": None, "epochs": None}
    return parse_config(values, origin=f"the config with --tokens {tokens:g}")


def _output(output: Path | None) -> Path:
    """Return where to write the best config. Checked before the search, which may take minutes."""
    if output is None and DEFAULT_OUTPUT.exists():
        raise ConfigError(f"{DEFAULT_OUTPUT} exists already; say where to write with --output")
    check_output(output or DEFAULT_OUTPUT)
    return output or DEFAULT_OUTPUT


def _search(
    config: Config,
    num_gpus: int,
    hardware: Hardware,
    output: Path,
    record: bool,
) -> Estimate:
    found = search(config, num_gpus, hardware)
    best = found.best[0].config
    print(describe_search(found))
    try:
        output.write_text(short_yaml(best), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from None
    print(f"\nThe best is written to {output}:\n")
    # Estimated anew from the config that was written: this is the plan that `megalite train` will
    # make of it.
    return _estimate(best, num_gpus, hardware, record)


def _draw(one: Estimate, picture: Path) -> None:
    try:
        from megalite.planner.timeline import draw_timeline

        draw_timeline(one, picture)
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install 'megalite[observe]'") from None
    except OSError as error:
        raise ConfigError(f"--picture {picture}: {error.strerror or error}") from None
    print(f"The timeline is drawn to {picture}.")
