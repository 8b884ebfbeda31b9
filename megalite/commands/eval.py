"""Measure a trained model: by tasks of lm-evaluation-harness, by answers to prompts, by tests of bias.

Without --tasks, --data and --bias it tells the loss, perplexity and bits per byte on the validation
data of the run, or on --tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.bias import add_bias_arguments, asks_for_bias, measure_bias
from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_layout, add_model, layout_of


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument(
        "--tasks", default="", metavar="NAME,NAME", help="names or YAML files of tasks"
    )
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="where more tasks are")
    parser.add_argument(
        "--data",
        type=Path,
        help="jsonl of `prompt` and wanted `completion`, or chats: BLEU, ROUGE, F1 ...",
    )
    parser.add_argument(
        "--tokens",
        metavar="PREFIX",
        help="token files to measure the loss on (default: the run's own)",
    )
    add_bias_arguments(parser)
    parser.add_argument(
        "--limit",
        type=int,
        help="only so many documents of each task, or samples of a loss",
    )
    parser.add_argument(
        "--shots",
        type=at_least(0),
        help="examples before each document (default: as the task says)",
    )
    parser.add_argument("--chat", action="store_true", help="put prompts as the chat template says")
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=128, help="of an answer to a prompt of --data"
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="ends such an answer; repeatable",
    )
    parser.add_argument(
        "--output", type=Path, help="JSON file (default: in the folder `evaluations` of the run)"
    )
    parser.add_argument(
        "--samples",
        action="store_true",
        help="beside it, what was asked, said and wanted, as jsonl",
    )
    parser.add_argument(
        "--slots", type=at_least(1), default=8, help="answers generated at a time (default: 8)"
    )
    add_layout(parser)
    parser.set_defaults(verb=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from megalite.comm.mesh import leave
    from megalite.infer.evaluate import Asked, evaluate_model
    from megalite.utils.outside import check_output

    if arguments.output:
        check_output(arguments.output, makes_folder=True)
    if asks_for_bias(arguments):
        measure_bias(arguments)
        return
    # Options are called as the fields: one that is added to both is passed on.
    names = {name: getattr(arguments, name) for name in Asked._fields}
    asked = Asked(
        **names | {"tasks": [name.strip() for name in arguments.tasks.split(",") if name.strip()]}
    )
    evaluate_model(
        arguments.model, asked, arguments.output, arguments.slots, None, **layout_of(arguments)
    )
    leave()
