"""Show what is in token files, or the samples that a config makes of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_overrides


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "what", help="PREFIX of token files, or a config (.yaml) to see samples as its model will"
    )
    add_overrides(parser, "of a config, such as data.packing=best_fit")
    parser.add_argument(
        "--count", type=at_least(0), default=2, help="documents or samples to print (default: 2)"
    )
    parser.add_argument(
        "--start",
        type=at_least(0, 2**62),
        default=0,
        help="number of the first of them (default: 0)",
    )
    parser.add_argument(
        "--split", choices=("train", "valid", "test"), default="train", help="of a config"
    )
    parser.add_argument("--tokenizer", type=Path, help="for token files; a config names its own")
    parser.set_defaults(verb=_inspect)


def _inspect(arguments: argparse.Namespace) -> None:
    """Show token files, or the samples of a config."""
    from rich.console import Console

    from megalite.config_file import load_config
    from megalite.data.inspect import inspect_file, inspect_samples

    console, count, start = Console(soft_wrap=True), arguments.count, arguments.start
    # Token files have no ending: PREFIX stands for three files.
    if arguments.what.endswith((".yaml", ".yml")):
        config = load_config(arguments.what, arguments.overrides)
        inspect_samples(config, arguments.split, count, start, console)
    else:
        inspect_file(arguments.what, arguments.tokenizer, count, start, console)
