"""Predict memory, step time and MFU of a config on a cluster, and find its best layout
(docs/planning.md)."""

from __future__ import annotations

import argparse
from pathlib import Path

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
        help="where --search writes it (default: best.yaml, if there is none yet)",
    )
    parser.add_argument("--picture", type=Path, help="PNG to draw the step's timeline to")
    parser.set_defaults(verb=_plan)


def _plan(arguments: argparse.Namespace) -> None:
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
