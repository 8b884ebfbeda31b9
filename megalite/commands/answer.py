"""Find the answers to questions in texts."""

from __future__ import annotations

import argparse
import sys

from megalite.commands.parser import VerbParser, add_model, add_texts


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument("--question", help="with --context")
    parser.add_argument("--context", help="the text to find the answer in")
    add_texts(
        parser,
        None,
        "rows as for training in a .jsonl; where they have answers, exact match and F1 are told",
    )
    parser.add_argument(
        "--may-be-none", action="store_true", help="a text may not answer (SQuAD 2.0)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each question")
    parser.set_defaults(verb=_answer)


def _answer(arguments: argparse.Namespace) -> None:
    """Print the answers to questions, and how many of them are those that the rows have."""
    from megalite.errors import ConfigError
    from megalite.infer.reading import Asked, Reader, read_asked, scores

    asked = read_asked(arguments.input)
    if arguments.question and arguments.context:
        asked.append(Asked(arguments.question, arguments.context))
    elif arguments.question or arguments.context or not asked:
        raise ConfigError("give --question and --context, or --input FILE.jsonl")
    found = Reader.open(arguments.model).answer(asked, arguments.may_be_none)
    for each, answer in zip(asked, found, strict=True):
        print(answer.shown(each, arguments.json))
    if any(each.wanted is not None for each in asked):
        print(scores(asked, [answer.text for answer in found]), file=sys.stderr)
