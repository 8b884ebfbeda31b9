"""Search for the best settings of a config. Each trial is an ordinary run (docs/sweep.md)."""

from __future__ import annotations

import argparse

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_config
from megalite.runtime.exit_codes import Exit


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "trials=40", "sweep", "YAML file; see docs/sweep.md")
    parser.add_argument(
        "--coordinate-check", type=at_least(1), nargs="+", metavar="HIDDEN",
        help="the file is a config: train it a few steps at these hidden sizes, and draw how large its layers' outputs "
        "become (docs/mup.md)",
    )  # fmt: skip
    parser.add_argument(
        "--find-lr", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="the file is a config: train it for 200 steps at rates that rise from LOW to HIGH, and draw where "
        "the loss falls (docs/sweep.md)",
    )  # fmt: skip
    parser.set_defaults(verb=_sweep)


def _sweep(arguments: argparse.Namespace) -> Exit:
    if arguments.coordinate_check:
        from megalite.sweep.coordinates import check_coordinates

        print(check_coordinates(arguments.sweep, arguments.overrides, arguments.coordinate_check))
        return Exit.DONE
    if arguments.find_lr:
        from megalite.sweep.learning_rate import find_learning_rate

        print(find_learning_rate(arguments.sweep, arguments.overrides, *arguments.find_lr))
        return Exit.DONE
    from megalite.sweep.run import run_sweep

    return run_sweep(arguments.sweep, arguments.overrides)
