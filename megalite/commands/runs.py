"""List the runs in a folder, and in folders below it: model, layout, steps, losses and state. The run
that wrote last comes first.

running: a process holds the folder; stopped: it goes on when started again; failed: it ended with an
error; killed: it left without saying so; new: it has made no step."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="(default: runs)"
    )
    parser.set_defaults(verb=_runs)


def _runs(arguments: argparse.Namespace) -> None:
    from megalite.observe.runs import table_of_runs
    from megalite.utils.pages import aligned

    print(*aligned(table_of_runs(arguments.folder)), sep="\n")
