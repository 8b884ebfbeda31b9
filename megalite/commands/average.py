"""Average the weights of checkpoints or models, or merge them by another method.

Checkpoints of the flat part of a wsd schedule averaged are about what a decay would end in."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="checkpoints, or Hugging Face folders"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="a new Hugging Face folder"
    )
    parser.add_argument(
        "--shares", type=float, nargs="+", metavar="X", help="weigh the models (default: all alike)"
    )
    parser.add_argument(
        "--method", choices=("linear", "task_arithmetic", "ties", "slerp"), default="linear",
        help="the mean; sums of what models learned since --base, whole or trimmed and by elected sign; the point on "
        "the arc between two models (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--base", type=Path, metavar="MODEL", help="what the models began as")
    parser.add_argument(
        "--scale", type=float, metavar="X", help="of what is added to the base (default: 1)"
    )
    parser.add_argument(
        "--density", type=float, nargs="+", metavar="X",
        help="share of what a model learned that ties keeps, for all or one each (default: 0.2)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights (default: as stored)"
    )
    parser.set_defaults(verb=_average)


def _average(arguments: argparse.Namespace) -> None:
    """Write several models as one."""
    from rich.console import Console

    from megalite.checkpoint.average import average_of
    from megalite.checkpoint.convert import write_model
    from megalite.infer.generate import find_model

    model = average_of(
        # Found before any is read: the last of many may be misspelt.
        [find_model(path) for path in arguments.models],
        arguments.shares,
        arguments.method,
        arguments.base and find_model(arguments.base),
        arguments.scale,
        arguments.density,
    )
    write_model(model, arguments.output, arguments.dtype, console=Console(stderr=True))
    how = "the average" if arguments.method == "linear" else arguments.method
    print(f"{arguments.output}: {how} of {len(arguments.models)} models")
