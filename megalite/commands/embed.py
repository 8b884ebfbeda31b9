"""Make a vector of each text with an encoder."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import VerbParser, add_model, add_texts


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    add_texts(parser, "", "a text a line; .jsonl")
    parser.add_argument(
        "--output", type=Path, help=".npy, or .jsonl (default: JSON lines to the console)"
    )
    parser.add_argument(
        "--pooling",
        choices=("mean", "cls"),
        help="of tokens (default: as the model says, else mean)",
    )
    parser.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="to length 1 (default: as the model says, else not)",
    )
    parser.set_defaults(verb=_embed)


def _embed(arguments: argparse.Namespace) -> None:
    """Write the vectors of texts."""
    from megalite.errors import ConfigError
    from megalite.infer.encode import Encoder, read_texts, write_vectors
    from megalite.utils.outside import check_output

    output: Path | None = arguments.output
    if output and output.suffix not in (".npy", ".jsonl"):
        raise ConfigError(f"--output {output} must end in .npy or .jsonl")
    if output:
        check_output(output, arguments.input)
    # All are read before the model, so that a bad line is told at once.
    texts = [*arguments.texts, *read_texts(arguments.input)]
    if not texts:
        raise ConfigError("give a TEXT, or --input FILE")
    vectors = Encoder.open(arguments.model).embed(texts, arguments.pooling, arguments.normalize)
    write_vectors(output, texts, vectors)
    if output:
        print(f"{output}: {len(vectors):,} vectors of {vectors.shape[1]:,} numbers")
