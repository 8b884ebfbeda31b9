"""Tell the classes of texts, a number for each text, or the labels of its words."""

from __future__ import annotations

import argparse

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_model, add_texts


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument("--pair", metavar="TEXT", help="a second text that goes with the TEXT")
    add_texts(parser, "", "a text a line; or rows as for training in a .jsonl")
    parser.add_argument(
        "--top-k", type=at_least(1), default=5, help="classes that are shown (default: %(default)s)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a row, as for training, for each text"
    )
    parser.set_defaults(verb=_classify)


def _classify(arguments: argparse.Namespace) -> None:
    """Print what a model tells of texts."""
    from megalite.errors import ConfigError
    from megalite.infer.classify import Classifier, Question, read_questions

    questions = [Question(text) for text in arguments.texts]
    if arguments.pair is not None:
        if len(questions) != 1:
            raise ConfigError(
                "--pair goes with one TEXT; more pairs are rows of an --input FILE.jsonl"
            )
        questions = [questions[0]._replace(pair=arguments.pair)]
    questions += read_questions(arguments.input)
    if not questions:
        raise ConfigError("give a TEXT, or --input FILE")
    classifier = Classifier.open(arguments.model)
    for question, verdict in zip(questions, classifier.classify(questions), strict=True):
        print(classifier.shown(question, verdict, arguments.top_k, arguments.json), flush=True)
