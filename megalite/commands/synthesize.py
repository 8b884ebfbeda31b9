"""Make training rows by a model behind an OpenAI-compatible endpoint, as a recipe says
(docs/synthetic.md).

Interrupted or killed, it goes on where it was when the same command is given again, and comes to the
same rows. What was rejected is in the output's rejected.jsonl, with the reason."""

from __future__ import annotations

import argparse
import signal

from rich.console import Console

from megalite.commands.parser import VerbParser, add_config
from megalite.errors import ConfigError


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "rows=400", "recipe", "YAML file, such as configs/synthesize/questions.yaml")
    interrupted = "interrupted; the same command goes on from here"
    parser.set_defaults(verb=_synthesize, interrupted=interrupted)


def _synthesize(arguments: argparse.Namespace) -> int:
    """Make the rows, and print what they came to."""
    # A cancelled job ends like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Imported only once the arguments are known to be right: these import datatrove.
        from megalite.synthesize.config import load_recipe
        from megalite.synthesize.report import lines_of
        from megalite.synthesize.run import synthesize
    except ImportError as error:
        raise ConfigError(f"{error}; pip install 'megalite[synthesize]'") from None
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    report = synthesize(recipe, Console(stderr=True))
    print(*lines_of(report, recipe), sep="\n")
    return 0
