"""Write a model of which single weights, or whole parts, are left out.

Parts are left out by what they do on --data, and the model that stays is a smaller one of its
family; single weights of its layers' matrices become 0."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_calibration, add_model


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument("output", type=Path, help="a new Hugging Face folder")
    for word, what in (
        ("layers", "layers"), ("hidden", "channels of hidden states"), ("heads", "heads of queries"),
        ("kv-heads", "heads of keys and values"), ("inner", "inner features of an MLP, or of an expert"),
        ("experts", "experts of a layer"),
    ):  # fmt: skip
        parser.add_argument(f"--{word}", type=at_least(1), metavar="N", help=f"{what} that stay")
    parser.add_argument(
        "--sparsity", metavar="X", help="share of single weights to set to 0, or 2:4, of every four"
    )
    parser.add_argument(
        "--method", choices=("magnitude", "wanda", "sparsegpt"),
        help="single weights by size; times that of inputs; or making up for them (default: magnitude)",
    )  # fmt: skip
    add_calibration(parser)
    parser.set_defaults(verb=_prune)


def _prune(arguments: argparse.Namespace) -> None:
    """Write a pruned model, and say what it costs."""
    from megalite.infer.generate import find_model
    from megalite.pruning.run import prune_parts, prune_weights
    from megalite.pruning.structured import Target

    folder, target = find_model(arguments.model), Target(
        arguments.layers, arguments.hidden, arguments.heads, arguments.kv_heads, arguments.inner, arguments.experts
    )  # fmt: skip
    data = arguments.data, arguments.rows, arguments.length
    # --method is of single weights only, so that it asks for them by itself.
    if arguments.sparsity or arguments.method:
        prune_weights(folder, arguments.output, target, arguments.sparsity, arguments.method, *data)
    else:
        prune_parts(folder, arguments.output, target, *data)
