"""Look whether all nodes are fit for a run: start it as the run is."""

from __future__ import annotations

import argparse

from megalite.commands.parser import VerbParser, add_config
from megalite.runtime.exit_codes import Exit


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "train.steps=100")
    parser.add_argument(
        "--interconnect",
        help="what joins the nodes, a name from configs/interconnects.yaml or a YAML file: nodes whose GPUs do not "
        "come near its bandwidth are not fit",
    )
    parser.set_defaults(verb=_preflight)


def _preflight(arguments: argparse.Namespace) -> Exit:
    from megalite.comm.mesh import Launch
    from megalite.config_file import load_config
    from megalite.health.preflight import preflight

    launch, config = Launch.from_environment(), load_config(arguments.config, arguments.overrides)
    # No process group yet: it would wait for the very nodes that are to be found.
    store = launch.meet(config.health.hang_timeout_s or 1800.0)
    return preflight(config, launch, store, arguments.interconnect)
