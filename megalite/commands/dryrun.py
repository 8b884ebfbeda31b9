"""Run the training program as ranks of a cluster that is not there, and report memory, messages and
waits (docs/dryrun.md)."""

from __future__ import annotations

import argparse
import signal

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_cluster, add_config
from megalite.runtime.exit_codes import Exit


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "train.steps=100")
    add_cluster(parser)
    parser.add_argument(
        "--ranks",
        default="roles",
        help="roles: those that differ; all; or numbers such as 0,384 (default: roles)",
    )
    parser.add_argument(
        "--steps", type=at_least(2), default=3, help="steps that each rank makes (default: 3)"
    )
    parser.add_argument(
        "--restart-gpus", type=_counts, default=(), metavar="N[,N]",
        help="then restart from its checkpoint on so many GPUs, as after nodes are lost or come back; with "
        "parallel.elastic on as many of them as fit",
    )  # fmt: skip
    parser.set_defaults(verb=_dryrun)


def _dryrun(arguments: argparse.Namespace) -> Exit:
    from megalite.config_file import load_config
    from megalite.dryrun.run import run_dryrun

    # A cancelled job ends like an interrupted one: with its ranks.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_dryrun(
        load_config(arguments.config, arguments.overrides),
        num_gpus=arguments.gpus,
        gpu=arguments.gpu,
        gpus_per_node=arguments.nodes_of,
        ranks=arguments.ranks,
        steps=arguments.steps,
        restart_gpus=arguments.restart_gpus,
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(at_least(1), text.split(",")))
