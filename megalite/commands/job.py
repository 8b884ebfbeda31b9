"""Print what a launcher must know: ranks a node, nodes to use, the run's folder."""

from __future__ import annotations

import argparse

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_config


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "train.steps=100")
    parser.add_argument(
        "--nodes", type=at_least(1), default=1, metavar="N", help="how many there are (default: 1)"
    )
    parser.add_argument(
        "--ranks-per-node",
        type=at_least(0),
        default=0,
        metavar="N",
        help="such as GPUs (default: what the config needs)",
    )
    parser.set_defaults(verb=_job)


def _job(arguments: argparse.Namespace) -> None:
    """Print the ranks per node, the number of nodes and the run's folder, on one line for shell
    scripts."""
    from megalite.config_file import load_config
    from megalite.models import weight_table
    from megalite.plan import nodes_that_fit, smallest_world

    config = load_config(arguments.config, arguments.overrides)
    # Without GPUs the smallest layout is spread over the nodes, rounded up.
    ranks = arguments.ranks_per_node or -(-smallest_world(config) // arguments.nodes)
    table = weight_table(config.model, config.lora)
    # In this order, which `slurm/pretrain.sh` reads.
    print(ranks, nodes_that_fit(config, table, arguments.nodes, ranks), config.run.folder)
