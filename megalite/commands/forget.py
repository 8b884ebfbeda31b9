"""Take documents out of a run's data, and go back to before it was trained on them (docs/forget.md).

It writes token files without them, and a run that goes on from the newest checkpoint that has seen
none of them and ends bit for bit as one that never had them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--documents", type=Path, required=True, metavar="FILE",
        help="what to forget, a line each: FILE:LINE, or PREFIX#NUMBER of a token file",
    )  # fmt: skip
    parser.add_argument(
        "--register", type=Path, metavar="FILE",
        help="JSON lines of what was taken out (default: forgotten.jsonl beside the run's folder)",
    )  # fmt: skip
    parser.add_argument(
        "--corpora", action="store_true",
        help="also blank the lines of JSON that they were made of, in the files themselves",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="only say what it costs; nothing is written"
    )
    parser.set_defaults(verb=_forget)


def _forget(arguments: argparse.Namespace) -> None:
    """Say what forgetting costs, and prepare the run that makes the steps again."""
    from rich.console import Console

    from megalite.lineage.forget import forget, plan_removal, read_names

    console = Console(soft_wrap=True, highlight=False, markup=False)
    removal = plan_removal(arguments.run, read_names(arguments.documents), arguments.corpora)
    # Before it is done: lines that --corpora blanks cannot be put back.
    console.print(str(removal))
    if not arguments.dry_run:
        register = arguments.register or removal.run.config.run.dir / "forgotten.jsonl"
        forget(removal, register, console)
