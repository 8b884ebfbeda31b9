"""Train small models for several lengths, fit the law of their losses, and predict the loss of a
large model (docs/ladder.md)."""

from __future__ import annotations

import argparse

from megalite.commands.parser import VerbParser, add_config
from megalite.runtime.exit_codes import Exit


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "parallel=2", "ladder", "YAML file; see docs/ladder.md")
    parser.set_defaults(verb=_ladder)


def _ladder(arguments: argparse.Namespace) -> Exit:
    from megalite.ladder.run import run_ladder

    return run_ladder(arguments.ladder, arguments.overrides)
