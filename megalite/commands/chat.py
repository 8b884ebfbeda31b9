"""Talk to a model in the terminal, by its chat template. Ctrl-C ends an answer, Ctrl-D the
conversation; /new begins another."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least, number
from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "model", type=Path, help="a run, a checkpoint of one, or a Hugging Face folder"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=512, help="of an answer (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=number(0),
        help="0 takes the likeliest token (default: as the model says)",
    )
    parser.add_argument("--top-p", type=number(0, 1), help="(default: as the model says)")
    parser.set_defaults(verb=_chat)


def _chat(arguments: argparse.Namespace) -> None:
    from megalite.infer.talk import open_talk, talk

    talk(
        open_talk(
            arguments.model,
            arguments.max_tokens,
            arguments.temperature,
            arguments.top_p,
            arguments.system,
        )
    )
