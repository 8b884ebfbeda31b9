"""Say which text a step was trained on, or at which steps a text was (docs/trace.md).

It is exact, and of any step: which sample comes when is arithmetic."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("run", type=Path, help="a run, or a config (.yaml) of one to come")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--step", type=at_least(1), metavar="N", help="counted from 1")
    asked.add_argument(
        "--document", action="append", metavar="FILE:LINE",
        help="or PREFIX#NUMBER of a token file; may be repeated",
    )  # fmt: skip
    parser.add_argument("--sample", type=at_least(0), metavar="N", help="of the step, from 0")
    parser.add_argument("--token", type=at_least(0), metavar="N", help="of the sample, from 0")
    parser.set_defaults(verb=_trace)


def _trace(arguments: argparse.Namespace) -> None:
    """Print what a step was made of, or where documents were trained on."""
    from rich.console import Console

    from megalite.lineage.trace import print_document, print_step

    console = Console(soft_wrap=True)
    if arguments.document:
        print_document(arguments.run, arguments.document, console)
    else:
        print_step(arguments.run, arguments.step, arguments.sample, arguments.token, console)
