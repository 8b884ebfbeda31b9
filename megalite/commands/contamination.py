"""Look for evaluation texts in training data, token by token, before training or after it, and say at
which steps they are trained on (docs/trace.md)."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("run", type=Path, help="a run, or a config (.yaml) of one to come")
    parser.add_argument(
        "--tasks", default="", metavar="NAME,NAME", help="of lm-evaluation-harness, as for `eval`"
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="where more tasks are")
    parser.add_argument("--limit", type=at_least(1), help="only so many documents of each task")
    parser.add_argument(
        "--data", nargs="+", default=[], metavar="FILE",
        help="rows of `text`, or of `prompt` and `completion`",
    )  # fmt: skip
    parser.add_argument(
        "--ngram", type=at_least(2), default=13, metavar="N",
        help="tokens that must be the same in a row (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="JSON lines of every document")
    parser.set_defaults(verb=_contamination)


def _contamination(arguments: argparse.Namespace) -> None:
    """Print how much of evaluation texts stands in training data."""
    from rich.console import Console

    from megalite.errors import ConfigError
    from megalite.lineage.contamination import print_contamination
    from megalite.lineage.ngrams import Asked, texts_of_rows
    from megalite.utils.outside import check_output

    if arguments.output:
        check_output(arguments.output, arguments.data)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names and not arguments.data:
        raise ConfigError("say what to look for: --tasks NAME,NAME or --data FILE")
    asked = texts_of_rows(arguments.data) if arguments.data else iter(())
    if names:
        from megalite.infer.evaluate import load_harness

        tasks = load_harness().load_tasks(names, arguments.include_path, arguments.limit, shots=0)
        asked = itertools.chain(asked, (Asked(*found) for found in tasks.texts()))
    console = Console(soft_wrap=True)
    print_contamination(arguments.run, asked, arguments.ngram, arguments.output, console)
