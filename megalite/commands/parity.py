"""Compare the weights, losses and gradients that two runs recorded under `profile: {tensors: [1,
3]}`. The exit status is 0 where they agree, and 1 where they do not."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least, number
from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("a", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("b", type=Path, metavar="B", help="folder of another")
    parser.add_argument(
        "--step",
        type=at_least(1),
        action="append",
        default=[],
        help="compare this step (default: all)",
    )
    parser.add_argument(
        "--tolerance",
        type=number(0),
        default=1e-5,
        help="largest relative difference (default: %(default)s, for fp32)",
    )
    parser.set_defaults(verb=_parity)


def _parity(arguments: argparse.Namespace) -> int:
    """Compare two runs; return 1 where they differ."""
    from megalite.observe.parity import compare_runs

    lines, agree = compare_runs(arguments.a, arguments.b, arguments.tolerance, arguments.step)
    print(*lines, sep="\n")
    # As diff and cmp end.
    return 0 if agree else 1
