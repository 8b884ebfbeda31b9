"""Predict memory, step time and MFU of a config on a cluster, and find its best layout
(docs/planning.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least, count
from megalite.commands.parser import VerbParser, add_cluster, add_config


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "train.steps=100")
    add_cluster(parser)
    parser.add_argument(
        "--interconnect",
        help="a name from configs/interconnects.yaml, or a YAML file (default: ib-ndr)",
    )
    parser.add_argument(
        "--tokens",
        help="of the whole training, such as 300B or 15T (default: those of the config's steps)",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank all layouts that fit, and write the best as a config",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="where --search writes it (default: best.yaml, if there is none yet); folder of --precision "
        "(default: runs/NAME-precision)",
    )
    parser.add_argument("--picture", type=Path, help="PNG to draw the step's timeline to")
    _add_precision(parser)
    parser.set_defaults(verb=_plan)


def _add_precision(parser: VerbParser) -> None:
    parser.add_argument(
        "--precision",
        action="store_true",
        help="train a small kin of the model on this machine in bf16 and in each recipe of fp8: what they cost in "
        "loss, and by prediction gain in time",
    )
    parser.add_argument(
        "--kin",
        type=count,
        default=30e6,
        metavar="COUNT",
        help="parameters of the layers of that kin (default: 30M)",
    )
    parser.add_argument(
        "--steps", type=at_least(10), default=300, help="that it is trained for (default: 300)"
    )
    parser.add_argument(
        "--seeds",
        type=at_least(2),
        default=2,
        help="of bf16, from which the noise is told (default: 2)",
    )
    parser.add_argument(
        "--parallel", type=at_least(1), default=1, help="runs at a time (default: 1)"
    )
    parser.add_argument(
        "--recipes", nargs="+", metavar="NAME", help="those of train.fp8 to try (default: all)"
    )
    parser.add_argument(
        "--kin-set",
        action="append",
        default=[],
        metavar="key=value",
        help="a setting of the kin's config, such as data.seq_length=512; may be repeated",
    )


def _precision(arguments: argparse.Namespace) -> None:
    from megalite.config_file import load_config
    from megalite.errors import ConfigError
    from megalite.kernels.recipes import RECIPES
    from megalite.planner.hardware import DEFAULT_INTERCONNECT, find_hardware
    from megalite.precision.run import Wanted, run_precision
    from megalite.utils.spelling import did_you_mean

    for option in ("search", "picture", "tokens"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option} and --precision are two questions; ask one at a time")
    config = load_config(arguments.config, arguments.overrides)
    network = arguments.interconnect or DEFAULT_INTERCONNECT
    hardware = find_hardware(arguments.gpu, arguments.nodes_of, network)
    folder = arguments.output or config.run.dir / f"{config.run.name}-precision"
    for name in arguments.recipes or ():
        if name not in RECIPES:
            hint = did_you_mean(name, list(RECIPES), f"known: {', '.join(RECIPES)}")
            raise ConfigError(f"--recipes: there is no recipe {name!r}; {hint}")
    wanted = Wanted(
        folder, arguments.kin, arguments.steps, arguments.seeds, arguments.parallel, tuple(arguments.kin_set),
        tuple(arguments.recipes or RECIPES),
    )  # fmt: skip
    run_precision(config, arguments.gpus, hardware, wanted)


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.precision:
        return _precision(arguments)
    from megalite.config_file import load_config
    from megalite.planner.run import run_plan
    from megalite.utils.outside import check_output

    for option, path in (("--output", arguments.output), ("--picture", arguments.picture)):
        if path:
            check_output(path, [arguments.config], option)
    run_plan(
        load_config(arguments.config, arguments.overrides),
        num_gpus=arguments.gpus,
        gpu=arguments.gpu,
        gpus_per_node=arguments.nodes_of,
        interconnect=arguments.interconnect,
        tokens=arguments.tokens,
        with_search=arguments.search,
        output=arguments.output,
        picture=arguments.picture,
    )
