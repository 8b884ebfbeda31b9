"""Write the rows of which a model is least certain for an annotation tool to import, with what the
model says of each. What is labelled there is read by `megalite preprocess --format`.

Rows are those that `megalite classify --input` takes, for models of classes, or prompts of a
generator: the lines of a text file, or of a .jsonl what stands under "prompt"."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_model

TOOLS = ("label-studio", "argilla", "doccano")
MEASURES = ("entropy", "margin", "confidence")


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument(
        "--input", type=Path, nargs="+", required=True, metavar="FILE", help="rows without labels"
    )
    parser.add_argument("--tool", choices=TOOLS, required=True, help="that imports the file")
    parser.add_argument("--output", type=Path, required=True, help="JSON, of doccano JSON lines")
    parser.add_argument(
        "--count",
        type=int,
        default=100,
        dest="num_rows",
        metavar="N",
        help="rows (default: %(default)s)",
    )
    parser.add_argument(
        "--by", choices=MEASURES, help="what tells how uncertain a class is (default: entropy)"
    )
    parser.add_argument(
        "--diverse",
        action="store_true",
        help="of classes: among five times as many, rows that differ most",
    )
    parser.add_argument("--chat", action="store_true", help="prompts as the chat template says")
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=128, help="of an answer (default: %(default)s)"
    )
    parser.set_defaults(verb=_annotate)


def _annotate(arguments: argparse.Namespace) -> None:
    from megalite.infer.annotate import Asked, write_tasks
    from megalite.utils.outside import check_output

    check_output(arguments.output, arguments.input)
    asked = Asked(**{name: getattr(arguments, name) for name in Asked._fields})
    print(*write_tasks(arguments.model, asked), sep="\n")
