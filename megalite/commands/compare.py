"""Compare runs: what they came to, in which settings they differ, and their losses over steps, tokens
and hours, as compare.png and compare.html."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, 2 to 10"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("compare"),
        metavar="DIR",
        help="folder for the picture and the page (default: %(default)s)",
    )
    parser.set_defaults(verb=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from megalite.observe.compare import compare
    from megalite.utils.pages import aligned

    results, settings, written = compare(arguments.runs, arguments.output)
    print(*aligned(results), sep="\n")
    differ = aligned(settings) if settings[1:] else ["their configs differ in nothing"]
    print("", *differ, "", *written, sep="\n")
